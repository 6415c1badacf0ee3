"""Plans finetune runs from requests, and prepares their directories. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.output import replacing
from ctxext.errors import InputError
from ctxext.ops.cost import WHOLE
from ctxext.planning.answer import prediction
from ctxext.planning.time import Estimate
from ctxext.requests import DEFAULT_PRESET, FinetuneRequest
from ctxext.train.launch import LOGS, launched
from ctxext.train.parallel import SINGLE_PROCESS, Launch
from ctxext.train.run_directory import (
    alone,
    applied_changes,
    discard_unstarted,
    newest_unfinished,
    option_fields,
    plan_from_options,
    plan_repeated,
    plan_resumed,
    start_run,
    started_as,
)
from ctxext.train.run_plan import RunPlan, on_gpu
from ctxext.units import counted, format_bytes, format_duration, format_tokens

if TYPE_CHECKING:
    from ctxext.train.finetune import FinetuneReport

Say = Callable[[str], None]


@dataclass(frozen=True)
class PlannedRun:
    """A finetune run before it starts.

    directory  of the run
    plan       with the memory of one process
    launch     the processes that train it; None: one process without DeepSpeed
    resume     whether the run continues
    repeats    the run whose model, data and spec this one repeats
    """

    directory: Path
    plan: RunPlan
    launch: Launch | None
    resume: bool
    repeats: Path | None

    def rows(self) -> list[tuple[str, str]]:
        """Returns every derived number as (name, value) lines."""
        processes = [("processes", f"{self.launch.summary()}; the memory is per process")] if self.launch else []
        return [*self.plan.rows(), *processes]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        return self.plan.as_dict() | {"launch": self.launch.as_dict() if self.launch else SINGLE_PROCESS}

    def prediction(self) -> tuple[str, Estimate | None]:
        """Returns the predicted memory and time as text, and the estimate of a step where rates are known."""
        return prediction(self.plan, self.launch.partition if self.launch else WHOLE)

    def finished_rows(self, report: FinetuneReport) -> list[tuple[str, str]]:
        """Returns the finished run as (name, value) lines, with predictions beside measurements."""
        _, predicted = self.prediction()
        step = f"{format_duration(report.seconds_per_step or 0.0)}, the median"
        beside = "no prediction" if predicted is None else f"predicted {format_duration(predicted.seconds)}"
        return [
            ("loss", _losses(report, self.plan)),
            ("held-out loss", _held_out(report, self.plan)),
            ("trained tensors", f"{report.trained_tensors}, all checked on disk"),
            ("gradient spikes", f"{report.spikes} of {counted(report.steps, 'step')} scaled down"),
            ("rollbacks", str(report.rollbacks)),
            ("peak memory", _peak_memory(report, self.plan)),
            ("a step", f"{step}; {beside}"),
            ("took", format_duration(report.seconds)),
            ("written to", report.out),
        ]


def plan_finetune(
    request: FinetuneRequest,
    *,
    out: Path | None,
    resume: bool = False,
    repeat: Path | None = None,
    force: bool = False,
    needs_weights: bool = True,
    say: Say,
) -> PlannedRun:
    """Returns the plan of a new run, of a resumed one, or of one that repeats an earlier run.

    Raises InputError for requests that contradict each other, and where a resumed run was started as another one.
    """
    given = finetune_fields(request)
    if resume and repeat:
        raise InputError("a run is resumed or repeated: --resume and --repeat exclude each other")
    if repeat and (request.model is not None or request.preset != DEFAULT_PRESET):
        raise InputError("--repeat uses the model and spec of the run", hint="leave out MODEL and --preset")
    if resume:
        run = out or newest_unfinished(manifests.RUNS)
        plan = _resumed(request, run, given, force, say)
    elif repeat:
        plan, moved = plan_repeated(repeat, given, accept=force)
        for what in moved:
            say(f"warning: changed since {repeat} was trained: {what}")
        run = out or _default_directory(plan)
    else:
        plan = plan_from_options(request.model, request.preset, given, needs_weights=needs_weights, say=say)
        run = out or _default_directory(plan)
    hostfile = None if request.hostfile is None else Path(request.hostfile)
    # The launch changes the memory and the time of one process.
    plan, launch = launched(plan, request.zero, request.nproc, hostfile, resume=resume, repeats=repeat)
    return PlannedRun(run, plan, launch, resume, repeat)


def finetune_fields(request: FinetuneRequest) -> dict[str, Any]:
    """Returns what a request sets in the spec of a run. What it leaves out keeps the value of the preset."""
    return option_fields(request.ctx, request.data, request.steps, request.original_length) | request.settings


def _default_directory(plan: RunPlan) -> Path:
    return manifests.default_out("finetune", f"{plan.source.name}-{plan.spec.ctx}")


def _resumed(request: FinetuneRequest, run: Path, given: dict[str, Any], force: bool, say: Say) -> RunPlan:
    if request.model is None:
        if request.preset != DEFAULT_PRESET:
            raise InputError(
                f"resume: preset {request.preset!r} needs a model", hint="leave preset out: the run has its own spec"
            )
        # The given fields are changes of the run's spec.
        return plan_resumed(run, given, accept=force, say=say)
    # A pipeline names the model again. Compare the plan of this model with the spec of the run.
    requested = plan_from_options(request.model, request.preset, given, needs_weights=True)
    if not started_as(run, requested, any_data=force):
        raise InputError(
            f"{run} was started with another model, data or settings",
            hint="give the same model, data and settings, or another out; force without resume starts it again",
        )
    return plan_resumed(run, {}, accept=force, say=say)


@contextmanager
def prepared_directory(planned: PlannedRun, force: bool) -> Iterator[None]:
    """Creates the directory of a new run, or takes that of a resumed one, and locks it while the block runs.

    Removes the directory of a new run that fails before it trained anything.
    """
    run, plan = planned.directory, planned.plan
    if planned.resume:
        with alone(run), applied_changes(plan, run):
            yield
        return
    # `force` must not replace the model, the data, or the run that this one repeats.
    read = [Path(part.source) for part in plan.spec.data.parts]
    with replacing(run, force, keep=[plan.source.path, planned.repeats, *(path for path in read if path.exists())]):
        start_run(plan, run)
        with alone(run):
            try:
                yield
            except BaseException:
                if not (run / LOGS).exists():  # the logs have the traceback of a process that died
                    discard_unstarted(run)
                raise


def _peak_memory(report: FinetuneReport, plan: RunPlan) -> str:
    """Measured and predicted peak memory. On a CPU they differ in kind: train/metrics.py measures the resident set."""
    measured, predicted = format_bytes(report.peak_memory), format_bytes(sum(plan.memory.values()))
    if on_gpu(plan.gpu):
        return f"{measured}, predicted {predicted}"
    return f"{measured} resident, freed blocks included; {predicted} predicted to be held"


def _losses(report: FinetuneReport, plan: RunPlan) -> str:
    losses = f"{report.first_loss:.3f} -> {report.final_loss:.3f}"
    if plan.spec.distill is None:
        return f"{losses} nats a token{_where(plan)}"
    what = "the last objective" if len(plan.spec.distill.objectives) > 1 else "the teacher's objective"
    return f"{losses} of {what}{_where(plan)}"


def _held_out(report: FinetuneReport, plan: RunPlan) -> str:
    if report.held_out is None:
        return "not measured"
    before, after = report.held_out
    return f"{before:.3f} -> {after:.3f} nats a token{_where(plan)}, with the attention of inference"


def _where(plan: RunPlan) -> str:
    """The context of a run's losses, where the run has several stages: it is the last one."""
    return f" at ctx {format_tokens(plan.spec.ctx)}" if plan.earlier else ""
