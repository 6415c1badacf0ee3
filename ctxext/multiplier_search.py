"""Searches lora.multiplier with short trainings, and writes their losses as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import InputError
from ctxext.extras import can_draw
from ctxext.finetuning import PlannedRun, plan_finetune
from ctxext.requests import FinetuneRequest
from ctxext.train.multiplier import STEPS, MultiplierSearch, Trial, plan_trials

if TYPE_CHECKING:
    from ctxext.train.metrics import StepMetrics

CURVES, NUMBERS = "curves.png", "multiplier.json"


@dataclass(frozen=True)
class FoundMultiplier:
    """The result of a search and its directory."""

    search: MultiplierSearch
    out: Path

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        return self.search.as_dict() | {"out": str(self.out)}


def search(
    request: FinetuneRequest,
    out: Path | None,
    force: bool,
    *,
    say: Callable[[str], None],
    on_plan: Callable[[PlannedRun], None],
    on_step: Callable[[StepMetrics], None],
    on_trial: Callable[[Trial], None],
) -> FoundMultiplier:
    """Trains the run of a request at several multipliers.

    Writes multiplier.json, curves.png and a manifest into `out`, all or nothing.
    """
    refuse_beside(zero=request.zero, nproc=request.nproc, hostfile=request.hostfile)
    planned = plan_finetune(brief(request), out=out, say=say)
    plan = planned.plan
    trials = plan_trials(plan)
    out = out or manifests.default_out("multiplier", f"{plan.source.name}-{plan.spec.ctx}")
    check_free(out, force, keep=[plan.source.path])
    on_plan(planned)
    from ctxext.train.loop import Events
    from ctxext.train.multiplier import find_multiplier

    # The trials run inside the staged directory, so that nothing is left where the search fails.
    with staged_output(out, force) as staging:
        found = find_multiplier(trials, staging, plan.spec.lora.multiplier, Events(say, on_step), on_trial)
        (staging / NUMBERS).write_text(json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n", "utf-8")
        if can_draw(say, CURVES):
            _draw(found, staging / CURVES)
        facts = {"option": found.option, "remarks": [*found.remarks], "held_out": found.best.final}
        parents = {"base": manifests.parent(plan.source.directory)}
        manifests.write(staging, manifests.new("multiplier", spec=asdict(plan.spec), parents=parents, facts=facts))
    return FoundMultiplier(found, out)


def refuse_beside(**options: object) -> None:
    """Raises InputError where `options`, which belong to a single run, are combined with --find-multiplier."""
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise InputError(
            f"--find-multiplier is not allowed with {', '.join(given)}: it trains several short runs in one process",
            hint="run the search first, then start the run with the multiplier that it prints",
        )


def brief(request: FinetuneRequest) -> FinetuneRequest:
    """Returns the request with the number of steps of a trial, unless it gives one."""
    given = request.steps is not None or "steps" in request.settings
    return request if given else replace(request, steps=STEPS)


def _draw(found: MultiplierSearch, path: Path) -> None:
    from ctxext.report.figures import FigureLine, Point, curves

    # The y axis ends 0.5 nats above the loss at the start, so that a diverging trial does not squeeze the others.
    start = max(trial.held_out[0][1] for trial in found.trials if trial.held_out)
    lines = [
        FigureLine(
            f"{trial.multiplier:g}{'' if trial.final is not None else ', diverged'}",
            [Point(step, loss) for step, loss in trial.held_out],
            number,
            behind=[Point(step, loss) for step, loss in trial.training],
        )
        for number, trial in enumerate(found.trials)
    ]
    losses = [loss for trial in found.trials for _, loss in (*trial.held_out, *trial.training)]
    limits = (min(losses) - 0.05, min(max(losses), start + 0.5) + 0.05)
    curves(path, lines, "steps (thick: held out, thin: training)", "nats a token", limits=limits)
