"""ctxext finetune --find-multiplier"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ctxext.cli import console
from ctxext.errors import InputError
from ctxext.extras import can_draw

if TYPE_CHECKING:
    from ctxext.train.metrics import StepMetrics
    from ctxext.train.multiplier import MultiplierSearch, Trial
    from ctxext.train.run_plan import RunPlan

CURVES, NUMBERS = "curves.png", "multiplier.json"


def refuse_beside(**options: object) -> None:
    """Raises InputError where `options`, which belong to a single run, are combined with --find-multiplier."""
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise InputError(
            f"--find-multiplier is not allowed with {', '.join(given)}: it trains several short runs in one process",
            hint="run the search first, then start the run with the multiplier that it prints",
        )


def search(plan: RunPlan, out: Path | None, force: bool, as_json: bool) -> None:
    """Trains `plan` at several multipliers, prints their held-out losses and the option with the lowest loss.

    Writes multiplier.json, curves.png and a manifest into `out`.
    """
    from ctxext.config import manifest as manifests
    from ctxext.config.output import check_free, staged_output
    from ctxext.train.multiplier import plan_trials

    trials = plan_trials(plan)
    out = out or manifests.default_out("multiplier", f"{plan.source.name}-{plan.spec.ctx}")
    check_free(out, force, keep=[plan.source.path])
    console.pairs(plan.rows(), to_stderr=True)
    # The trials run inside the staged directory, so that nothing is left where the search fails.
    with staged_output(out, force) as staging:
        found = _train(trials, staging, plan.spec.lora.multiplier)
        (staging / NUMBERS).write_text(json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n", "utf-8")
        if can_draw(console.say, CURVES):
            _draw(found, staging / CURVES)
        facts = {"option": found.option, "remarks": [*found.remarks], "held_out": found.best.final}
        parents = {"base": manifests.parent(plan.source.directory)}
        manifests.write(staging, manifests.new("multiplier", spec=asdict(plan.spec), parents=parents, facts=facts))
    if as_json:
        console.emit(found.as_dict() | {"out": str(out)})
        return
    _show(found)
    console.say(f"written to {out}")


def _train(trials: list[RunPlan], scratch: Path, given: float) -> MultiplierSearch:
    console.quiet_libraries()
    from ctxext.train.loop import Events
    from ctxext.train.multiplier import find_multiplier

    # One bar for all trials: it advances by each step, and a trial that diverges leaves its share open.
    with console.progress_display() as display:
        task = display.add_task("preparing", total=sum(plan.steps for plan in trials), note="")

        def on_step(metrics: StepMetrics) -> None:
            display.update(task, advance=1, description="training", note=f"loss {metrics.loss:.3f}")

        def on_trial(trial: Trial) -> None:
            start = f"{trial.held_out[0][1]:.4f}" if trial.held_out else "unknown"
            console.say(f"multiplier {trial.multiplier:g}: held-out loss {start} -> {_outcome(trial)}")

        return find_multiplier(trials, scratch, given, Events(console.say, on_step), on_trial)


def _outcome(trial: Trial) -> str:
    return f"diverged ({trial.stopped})" if trial.final is None else f"{trial.final:.4f}"


def _show(found: MultiplierSearch) -> None:
    """Prints the held-out losses by step, the option to use, and remarks."""
    steps = sorted({step for trial in found.trials for step, _ in trial.held_out})
    rows = []
    for trial in found.trials:
        losses = dict(trial.held_out)
        last = "diverged" if trial.final is None else f"{trial.training[-1][1]:.4f}"
        marked = f"{trial.multiplier:g}{' *' if trial is found.best else ''}"
        rows.append([marked, *(f"{losses[step]:.4f}" if step in losses else "" for step in steps), last])
    console.say("\nheld-out loss in nats a token; last column: the training loss of the last step")
    console.table(["multiplier", *(f"step {step}" for step in steps), "training"], rows)
    print(f"\n{found.option}")
    for remark in found.remarks:
        console.say(f"note: {remark}")


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
