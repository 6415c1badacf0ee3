"""ctxext finetune --find-multiplier"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.cli import console
from ctxext.requests import FinetuneRequest

if TYPE_CHECKING:
    from ctxext.finetuning import PlannedRun
    from ctxext.train.metrics import StepMetrics
    from ctxext.train.multiplier import MultiplierSearch, Trial


def search(request: FinetuneRequest, out: Path | None, force: bool, as_json: bool, **other_options: object) -> None:
    """Runs the search with a progress display, and prints the held-out losses and the option with the lowest loss.

    Raises InputError where one of `other_options` is given: they belong to a single run.
    """
    from ctxext import api
    from ctxext.multiplier_search import refuse_beside
    from ctxext.train.multiplier import GRID

    refuse_beside(**other_options)

    with ExitStack() as stack:
        bar: list[tuple[Any, Any]] = []  # the display and its task, once the number of steps is known

        def on_plan(planned: PlannedRun) -> None:
            console.pairs(planned.plan.rows(), to_stderr=True)
            # One bar for all trials: it advances by each step, and a trial that diverges leaves its share open.
            display = stack.enter_context(console.progress_display())
            bar.append((display, display.add_task("preparing", total=len(GRID) * planned.plan.steps, note="")))

        def on_step(metrics: StepMetrics) -> None:
            (display, task), *_ = bar
            display.update(task, advance=1, description="training", note=f"loss {metrics.loss:.3f}")

        found = api.find_multiplier(
            request, out=out, force=force, say=console.say, on_plan=on_plan, on_step=on_step, on_trial=_say_trial
        )
    if as_json:
        console.emit(found.as_dict())
        return
    _show(found.search)
    console.say(f"written to {found.out}")


def _say_trial(trial: Trial) -> None:
    start = f"{trial.held_out[0][1]:.4f}" if trial.held_out else "unknown"
    end = f"diverged ({trial.stopped})" if trial.final is None else f"{trial.final:.4f}"
    console.say(f"multiplier {trial.multiplier:g}: held-out loss {start} -> {end}")


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
