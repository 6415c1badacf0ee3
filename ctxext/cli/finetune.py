"""ctxext finetune"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxext.cli import console
from ctxext.cli.options import json_option, out_option, takes
from ctxext.errors import InputError, NoSharedRun
from ctxext.requests import DEFAULT_PRESET, FinetuneRequest

if TYPE_CHECKING:
    from ctxext.finetuning import PlannedRun
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.metrics import StepMetrics

PlanOption = Annotated[bool, typer.Option("--plan", help="Print every derived number and stop")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run (--out, or the newest)")]
RepeatOption = Annotated[
    Path | None, typer.Option(help="Directory of a run: start a new run with its spec, model and data")
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace an existing run; with --resume or --repeat, also accept a changed spec or data"
    ),
]
FindOption = Annotated[
    bool,
    typer.Option(
        "--find-multiplier",
        help="Train 30 steps, or --steps, at seven values of lora.multiplier; print the best by held-out loss",
    ),
]
EXAMPLES = """Examples:\n
  ctxext finetune --ctx 100k\n
  ctxext finetune llama2-7b --ctx 32k --preset longlora --data books/\n
  ctxext finetune tiny --ctx 2k --preset smoke\n
  ctxext finetune llama2-7b --ctx 100k --plan\n
  ctxext finetune llama2-7b --ctx 100k --zero 3 --nproc 8 --set global_batch_size=8\n
  ctxext finetune llama2-7b --ctx 32k --find-multiplier\n
  ctxext finetune --preset heal\n
  ctxext finetune --resume --out runs/20260101T000000.000000Z-finetune-tiny\n
  ctxext finetune --repeat runs/20260101T000000.000000Z-finetune-tiny --set seed=1"""


@takes(FinetuneRequest)
def finetune(
    request: FinetuneRequest,
    out: Annotated[Path | None, out_option("finetune-<name>", "Run directory")] = None,
    plan: PlanOption = False,
    find_multiplier: FindOption = False,
    resume: ResumeOption = False,
    repeat: RepeatOption = None,
    force: ForceOption = False,
    as_json: Annotated[bool, json_option("the plan or the report")] = False,
) -> None:
    """Train a model at a longer context: S²-Attn or dense, LoRA with embeddings and norms, RoPE scaled where needed."""
    from ctxext import api

    # A resumed or repeated run has its model and spec in its directory. Other options may change fields of that spec.
    if (resume or repeat) and (request.model is not None or request.preset != DEFAULT_PRESET or (resume and repeat)):
        raise InputError(
            "--resume and --repeat use the model and spec of the run",
            hint="give one of them, without MODEL and --preset",
        )
    console.quiet_libraries()
    given: dict[str, Any] = {"out": out, "force": force, "say": console.say}
    if find_multiplier:
        from ctxext.cli.multiplier import search

        search(request, out, force, as_json, plan=plan, resume=resume, repeat=repeat)
        return
    if plan:
        planned = api.plan_finetune(request, resume=resume, repeat=repeat, **given)
        if planned is not None:
            console.emit(planned.as_dict()) if as_json else console.pairs(planned.rows())
        return
    with training_display() as shown:
        try:
            report = api.finetune(
                request, resume=resume, repeat=repeat, on_plan=shown.on_plan, on_step=shown.on_step, **given
            )
        except NoSharedRun as error:
            raise typer.Exit(error.exit_code) from None
    api.end_ranks()
    # Rank 0 planned the run and reports it. The other ranks print nothing.
    if shown.planned is not None:
        _show(report, shown.planned, as_json)
    if not report.finished:
        raise typer.Exit(130)


def _show(report: FinetuneReport, planned: PlannedRun, as_json: bool) -> None:
    if as_json:
        console.emit(report.as_dict())
    elif report.finished:
        console.pairs(planned.finished_rows(report))
    if not report.finished:
        console.say(f"stopped after step {report.steps_done} of {report.steps}; resume with")
        console.say(f"  ctxext finetune --resume --out {planned.directory}")


class TrainingDisplay:
    """Shows a run on stderr: its plan before it starts, then a progress bar.

    Where stderr is no terminal, a line is printed after each tenth of the run.
    """

    def __init__(self, bar: ExitStack):
        self.planned: PlannedRun | None = None
        self.steps, self._bar = 0, bar

    def on_plan(self, planned: PlannedRun) -> None:
        """Prints the numbers of a planned run, and the predicted memory and time."""
        self.planned = planned
        console.pairs([*planned.rows(), ("predicted", planned.prediction()[0])], to_stderr=True)
        self.begin(planned.plan.steps)

    def begin(self, steps: int) -> None:
        """Shows the progress bar. A rank that plans nothing shows none."""
        self.steps = steps
        self.display = self._bar.enter_context(console.progress_display())
        self.task = self.display.add_task("preparing", total=steps, note="")

    def on_step(self, metrics: StepMetrics) -> None:
        """Shows a step with its loss and speed."""
        from ctxext.units import format_bytes

        speed = f"{metrics.tokens_per_second:,.0f} tokens/s  {format_bytes(metrics.memory)}"
        speed += f"  MFU {metrics.mfu:.0%}" if getattr(metrics, "mfu", None) else ""
        note = f"loss {metrics.loss:.3f}  {speed}"
        self.display.update(self.task, completed=metrics.step, description="training", note=note)
        if self.display.disable and metrics.step % max(1, self.steps // 10) == 0:
            console.say(f"step {metrics.step}/{self.steps}  {note}")


@contextmanager
def training_display() -> Iterator[TrainingDisplay]:
    """Yields a display for one run; its bar disappears at the end."""
    with ExitStack() as bar:
        yield TrainingDisplay(bar)
