"""The multiplier on LoRA's alpha that suits a model and its data: short runs at seven of them, judged on held-out text.

The rules of ops/low_rank.py give alpha's shape in rank and width; what is left to tune is one factor. Every trial has
the same start (the adapter adds nothing yet), the same data in the same order and the same learning rate, and differs
in lora.multiplier alone. Judged by the held-out loss after the last step, never by the training loss, which the largest
multipliers lower soonest.

Not done: a search over the learning rate as well (raise alpha, not the rate: arXiv 2606.12883), and any claim that the
best of a few dozen steps is the best of a long run. No torch before the first trial: refusals are quick.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.errors import CheckFailed, EnvironmentFault, InputError
from ctxext.train.plan import RunPlan, plan_run
from ctxext.train.run import start_run, way_out

if TYPE_CHECKING:
    from ctxext.train.loop import Events

GRID = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # times the spec's own lora.multiplier
STEPS = 30  # of a trial, where none are asked for: those of the preset are meant for a whole run
VALIDATIONS = 6  # of a trial, about, beside that before its first step
SMALL = 0.02  # nats a token by which two held-out losses must differ to be called different, as in train/validation.py


@dataclass(frozen=True)
class Trial:
    """A short run. `training` and `held_out` are (step, nats a token), finite; `stopped`: why it counts as diverged."""

    multiplier: float
    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    stopped: str | None = None

    @property
    def final(self) -> float | None:
        """The held-out loss after the last step; None where there is none to judge by."""
        return self.held_out[-1][1] if self.held_out and self.stopped is None else None


@dataclass(frozen=True)
class Search:
    """Every trial, by ascending multiplier, with the one that the spec itself has; `best` has the lowest `final`."""

    trials: tuple[Trial, ...]
    given: float
    steps: int

    @property
    def best(self) -> Trial:
        return min((trial for trial in self.trials if trial.final is not None), key=lambda trial: trial.final or 0.0)

    @property
    def option(self) -> str:
        return f"--set lora.multiplier={self.best.multiplier:.6g}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be known before the option is used."""
        best, said = self.best, list[str]()
        assert best.final is not None
        given = next(trial for trial in self.trials if trial.multiplier == self.given)
        if best is not given and given.final is not None and given.final - best.final < SMALL:
            said.append(f"the difference to {self.given:g} is small ({given.final - best.final:.4f} nats a token)")
        if best in (self.trials[0], self.trials[-1]):
            said.append(f"{best.multiplier:g} is at the edge of what was tried: search again with {self.option}")
        if best.final >= best.held_out[0][1]:
            said.append("no multiplier lowered the held-out loss: more steps, or another learning rate")
        return tuple(said)

    def as_dict(self) -> dict[str, Any]:
        trials = [asdict(trial) | {"final": trial.final} for trial in self.trials]
        return {"option": self.option, "remarks": list(self.remarks), "steps": self.steps, "trials": trials}


def plan_trials(plan: RunPlan) -> list[RunPlan]:
    """The plan's trials, one for each of GRID, by ascending multiplier.

    A trial keeps the spec, its steps included, but for a warm-up of at most a fifth of them, and what only a whole run
    wants. It stops where the run would have rolled back: half the learning rate is another trial. Raises InputError for
    a plan that has no multiplier, several contexts, or nothing to judge by.
    """
    spec = plan.spec
    if spec.tuning != "lora":
        raise InputError(f"tuning: {spec.tuning} has no lora.multiplier", hint="search with tuning=lora")
    if spec.stages:
        raise InputError("a search for the multiplier trains at one context", hint="give the last of them as --ctx")
    if spec.validation.every_steps is None:
        raise InputError(
            "validation.every_steps: null holds nothing out, and multipliers are judged on held-out text",
            hint="use another preset, or add --set validation.every_steps=50",
        )
    validation = replace(
        spec.validation,
        every_steps=max(1, spec.steps // VALIDATIONS),
        result="last",
        passkey=None,
        max_short_ppl_increase=None,
    )
    trial = replace(
        spec,
        optimizer=replace(spec.optimizer, warmup_steps=min(spec.optimizer.warmup_steps, spec.steps // 5)),
        validation=validation,
        faults=replace(spec.faults, on_divergence="stop", save_steps=spec.steps, save_minutes=None, keep=1),
        telemetry=replace(spec.telemetry, tensorboard=False, wandb=None),
    )
    own = spec.lora
    return [plan_run(plan.source, replace(trial, lora=replace(own, multiplier=x * own.multiplier))) for x in GRID]


def find_multiplier(
    trials: list[RunPlan], scratch: Path, given: float, events: Events, on_trial: Callable[[Trial], None]
) -> Search:
    """Run `trials` one after the other below `scratch`, and leave nothing there; `events` talk during the first alone.

    Raises InputError where the data is too short to hold some out, CheckFailed where every trial diverged, and
    KeyboardInterrupt when one is interrupted.
    """
    from ctxext.train.prepare import prepare_data

    if prepare_data(trials[0], replace(events, say=lambda line: None))[1] is None:
        raise InputError(
            f"{trials[0].spec.data.described}: too short to hold some out, and multipliers are judged on held-out text",
            hint="give more text, or a shorter ctx",
        )
    done = list[Trial]()
    for plan in trials:
        done.append(run_trial(plan, scratch / "trial", events))
        on_trial(done[-1])
        events = replace(events, say=lambda line: None)
    if all(trial.final is None for trial in done):
        raise CheckFailed(
            f"every multiplier from {done[0].multiplier:g} to {done[-1].multiplier:g} diverged: {done[0].stopped}",
            hint="lower optimizer.learning_rate, or lora.multiplier",
        )
    return Search(tuple(done), given, trials[0].steps)


def run_trial(plan: RunPlan, run: Path, events: Events | None = None) -> Trial:
    """Train a plan at `run`, keep its curves and remove the rest. One that diverges is a result, not an error."""
    from ctxext.train import metrics
    from ctxext.train.finetune import run_finetune

    stopped = None
    with _removed(run):
        start_run(plan, run)
        try:
            if not run_finetune(plan, run, events=events).finished:
                raise KeyboardInterrupt
        except CheckFailed as error:
            stopped = error.message
        except EnvironmentFault as error:
            # A trial by itself is not resumed, and is removed.
            error.hint = "make room, then search again" if error.hint == way_out(run) else error.hint
            raise
        training, held_out = (
            tuple((line["step"], line["loss"]) for line in metrics.read(run / name))
            for name in (metrics.STEPS, metrics.VALIDATIONS)
        )
    finite = tuple((step, loss) for step, loss in held_out if math.isfinite(loss))
    if stopped is None and finite != held_out:
        stopped = "the held-out loss is not finite"
    return Trial(plan.spec.lora.multiplier, training, finite, stopped)


@contextmanager
def _removed(run: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(run, ignore_errors=True)
