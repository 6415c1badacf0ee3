"""Finds the multiplier on LoRA's alpha for a model and its data: seven short runs, compared on held-out text.

The rules in ops/low_rank.py give alpha as a function of rank and width; one factor is left to tune. All trials start
from the same weights (a new adapter adds nothing), with the same data in the same order and the same learning rate.
Only lora.multiplier differs. The held-out loss after the last step decides, never the training loss, which the largest
multipliers lower first.

Not done: a search over the learning rate (raise alpha, not the rate: arXiv 2606.12883). The best value of a few dozen
steps is not claimed to be the best of a long run. No torch before the first trial, so that refusals are quick.
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
from ctxext.train.run_directory import resume_hint, start_run
from ctxext.train.run_plan import RunPlan, plan_run

if TYPE_CHECKING:
    from ctxext.train.loop import Events

GRID = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # factors on the spec's own lora.multiplier
STEPS = 30  # of a trial, if none are requested: the steps of a preset are meant for a whole run
VALIDATIONS = 6  # of a trial, about; one more comes before its first step
SMALL = 0.02  # nats a token: smaller differences of held-out losses do not count, as in train/validation.py


@dataclass(frozen=True)
class Trial:
    """The result of one short run.

    `training` and `held_out` are (step, nats a token), `held_out` with finite losses only. `stopped`: why the trial
    counts as diverged.
    """

    multiplier: float
    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    stopped: str | None = None

    @property
    def final(self) -> float | None:
        """The held-out loss after the last step; None for a diverged trial or one without held-out losses."""
        return self.held_out[-1][1] if self.held_out and self.stopped is None else None


@dataclass(frozen=True)
class MultiplierSearch:
    """All trials by ascending multiplier. `given` is the multiplier of the spec itself, which is one of them.

    `best` is the trial with the lowest `final`.
    """

    trials: tuple[Trial, ...]
    given: float
    steps: int

    @property
    def best(self) -> Trial:
        """The trial with the lowest held-out loss after its last step."""
        return min((trial for trial in self.trials if trial.final is not None), key=lambda trial: trial.final or 0.0)

    @property
    def option(self) -> str:
        """The option that sets the best multiplier."""
        return f"--set lora.multiplier={self.best.multiplier:.6g}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know before using the option."""
        best, notes = self.best, list[str]()
        assert best.final is not None
        given = next(trial for trial in self.trials if trial.multiplier == self.given)
        if best is not given and given.final is not None and given.final - best.final < SMALL:
            notes.append(f"the difference to {self.given:g} is small ({given.final - best.final:.4f} nats a token)")
        if best in (self.trials[0], self.trials[-1]):
            notes.append(f"{best.multiplier:g} is at one end of the tried range: search again with {self.option}")
        if best.final >= best.held_out[0][1]:
            notes.append("no multiplier lowered the held-out loss: use more steps or another learning rate")
        return tuple(notes)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        trials = [asdict(trial) | {"final": trial.final} for trial in self.trials]
        return {"option": self.option, "remarks": list(self.remarks), "steps": self.steps, "trials": trials}


def plan_trials(plan: RunPlan) -> list[RunPlan]:
    """Returns the plans of the trials, one for each value of GRID, by ascending multiplier.

    A trial keeps the spec, including its steps, except for a warm-up of at most a fifth of the steps and for options
    that only a whole run needs. A trial stops where the run would roll back, since half the learning rate would be
    another trial. Raises InputError for a plan without a multiplier, with several contexts, or without held-out text.
    """
    spec = plan.spec
    if spec.tuning != "lora":
        raise InputError(f"tuning: {spec.tuning} has no lora.multiplier", hint="use tuning=lora")
    if spec.stages:
        raise InputError("a search for the multiplier trains at one context", hint="give the last context as --ctx")
    if spec.validation.every_steps is None:
        raise InputError(
            "validation.every_steps: null holds out no text, which comparing multipliers needs",
            hint="use another preset, or add --set validation.every_steps=50",
        )
    # Validate about VALIDATIONS times, and judge the last weights without passkeys or limits.
    validation = replace(
        spec.validation,
        every_steps=max(1, spec.steps // VALIDATIONS),
        result="last",
        passkey=None,
        max_short_ppl_increase=None,
    )
    # One checkpoint at most, and no telemetry: a trial is never resumed.
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
) -> MultiplierSearch:
    """Runs `trials` one after another below `scratch`, and removes their files.

    `events.say` gets the messages of the first trial only; `on_trial` gets every result. Raises InputError if the data
    is too short to hold some out, CheckFailed if every trial diverged, and KeyboardInterrupt if a trial is interrupted.
    """
    from ctxext.train.prepare import prepare_data

    # Check the data once and silently, before any trial trains.
    if prepare_data(trials[0], replace(events, say=lambda line: None))[1] is None:
        raise InputError(
            f"{trials[0].spec.data.described}: too short to hold out a part, which comparing multipliers needs",
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
    return MultiplierSearch(tuple(done), given, trials[0].steps)


def run_trial(plan: RunPlan, run: Path, events: Events | None = None) -> Trial:
    """Trains a plan in `run`, keeps its curves and removes the rest. A divergence is a result, not an error."""
    from ctxext.train import metrics
    from ctxext.train.finetune import run_finetune

    stopped = None
    with _removed(run):
        start_run(plan, run)
        try:
            # An unfinished run was interrupted by the user: end the whole search.
            if not run_finetune(plan, run, events=events).finished:
                raise KeyboardInterrupt
        except CheckFailed as error:
            stopped = error.message
        except EnvironmentFault as error:
            # The usual hint is to resume the run, but a trial is removed and cannot be resumed.
            error.hint = "free disk space, then search again" if error.hint == resume_hint(run) else error.hint
            raise
        # A stopped trial also has curves; read them before the directory is removed.
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
