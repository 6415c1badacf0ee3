"""ctxext finetune"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxext.cli import completion, console
from ctxext.errors import InputError

if TYPE_CHECKING:
    from ctxext.planning.time import Estimate
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.metrics import StepMetrics
    from ctxext.train.parallel import Launch
    from ctxext.train.ranks import StartedRank
    from ctxext.train.run_plan import RunPlan

DEFAULT_PRESET = "lora-alpha"
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="A directory, preset or hub id [default: the newest conversion]", autocompletion=completion.of("models")
    ),
]
CtxOption = Annotated[
    str | None, typer.Option(help="Training context in tokens, such as 8192, 100k (k = 1024), or stages: 8k,32k,100k")
]
PresetOption = Annotated[
    str, typer.Option(help="A finetune preset or a YAML file", autocompletion=completion.of("finetune"))
]
ZeroOption = Annotated[str | None, typer.Option(help="DeepSpeed ZeRO: 1, 2, 3, 2_offload, 3_offload or a JSON file")]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of processes, with ZeRO 2 unless --zero is given [default: 1, or the number of GPUs]"
    ),
]
HostfileOption = Annotated[
    Path | None, typer.Option(help="File of hosts that share a file system, reached by ssh: lines `name slots=N`")
]
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


def finetune(
    model: ModelArgument = None,
    ctx: CtxOption = None,
    preset: PresetOption = DEFAULT_PRESET,
    data: Annotated[
        str | None, typer.Option(help="Files, a directory, or a datasets id [default: the embedded corpus]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory [default: ./runs/<time>-finetune-<name>]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of the preset's")] = None,
    original_length: Annotated[
        str | None, typer.Option(help="Tokens that the model was first trained at, if its files are wrong")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of the spec, as key=value; may be repeated")
    ] = None,
    zero: ZeroOption = None,
    nproc: ProcessesOption = None,
    hostfile: HostfileOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print every derived number and stop")] = False,
    find_multiplier: FindOption = False,
    resume: ResumeOption = False,
    repeat: RepeatOption = None,
    force: ForceOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the report as JSON")] = False,
) -> None:
    """Train a model at a longer context: S²-Attn or dense, LoRA with embeddings and norms, RoPE scaled where needed."""
    from ctxext.config.loader import assignments
    from ctxext.train.launch import launched
    from ctxext.train.ranks import started_rank
    from ctxext.train.run_directory import option_fields, plan_from_options
    from ctxext.train.shared_run import leading

    started = started_rank()
    if started is not None and find_multiplier:
        raise InputError(f"--find-multiplier uses one process: start it without {started.starter}")
    # Every rank reaches `follow` or `leading` first: an error before that would leave the others waiting.
    if started is not None and started.rank > 0:
        _follow(started, has_run=not plan)
        return
    with leading(None if plan else started, console.say):
        given = option_fields(ctx, data, steps, original_length) | assignments(set_ or [], example="lora.rank=16")
        # A resumed or repeated run has its model and spec in its directory. `given` may change fields of that spec.
        if (resume or repeat) and (model is not None or preset != DEFAULT_PRESET or (resume and repeat)):
            raise InputError(
                "--resume and --repeat use the model and spec of the run",
                hint="give one of them, without MODEL and --preset",
            )
        if find_multiplier:
            from ctxext.cli.multiplier import refuse_beside, search

            refuse_beside(plan=plan, resume=resume, repeat=repeat, zero=zero, nproc=nproc, hostfile=hostfile)
            trials = plan_from_options(model, preset, _briefly(given), needs_weights=True, say=console.say)
            search(trials, out, force, as_json)
            return
        # A plan alone needs no weights. The launch is decided next: it changes the memory and the time per process.
        run, decided = _decided(model, preset, given, out, resume, repeat, force, needs_weights=not plan)
        decided, launch = launched(decided, zero, nproc, hostfile, resume=resume, repeats=repeat)
        if plan:
            _show_plan(decided, launch, as_json)
            return
        console.pairs([*_rows(decided, launch), ("predicted", _predicted(decided, launch)[0])], to_stderr=True)
        _run(decided, run, resume, force, as_json, launch, repeat)


def _follow(started: StartedRank, *, has_run: bool) -> None:
    """Trains as a rank other than 0, which prints nothing. Exits as rank 0, if that rank has no run."""
    from ctxext.train.ranks import leave
    from ctxext.train.shared_run import follow

    if not has_run:
        return
    console.quiet_libraries()
    report = follow(started)
    if isinstance(report, int):
        raise typer.Exit(report)
    leave()
    if not report.finished:
        raise typer.Exit(130)


def _decided(
    model: str | None,
    preset: str,
    given: dict[str, Any],
    out: Path | None,
    resume: bool,
    repeat: Path | None,
    force: bool,
    *,
    needs_weights: bool,
) -> tuple[Path, RunPlan]:
    """The directory of the run and its plan: resumed, repeated or new."""
    from ctxext.config import manifest as manifests
    from ctxext.train.run_directory import newest_unfinished, plan_from_options, plan_resumed

    # With --resume, --out names the existing run. Otherwise it is the place of a new one.
    if resume:
        run = out or newest_unfinished(manifests.RUNS)
        return run, plan_resumed(run, given, accept=force, say=console.say)
    if repeat:
        plan = _repeated(repeat, given, force)
    else:
        plan = plan_from_options(model, preset, given, needs_weights=needs_weights, say=console.say)
    return out or manifests.default_out("finetune", f"{plan.source.name}-{plan.spec.ctx}"), plan


def _rows(plan: RunPlan, launch: Launch | None) -> list[tuple[str, str]]:
    return plan.rows() + ([("processes", f"{launch.summary()}; the memory is per process")] if launch else [])


def _predicted(plan: RunPlan, launch: Launch | None) -> tuple[str, Estimate | None]:
    from ctxext.ops.cost import WHOLE
    from ctxext.planning.answer import prediction

    return prediction(plan, launch.partition if launch else WHOLE)


def _show_plan(plan: RunPlan, launch: Launch | None, as_json: bool) -> None:
    from ctxext.train.parallel import SINGLE_PROCESS

    where = launch.as_dict() if launch else SINGLE_PROCESS
    console.emit(plan.as_dict() | {"launch": where}) if as_json else console.pairs(_rows(plan, launch))


def _briefly(given: dict[str, Any]) -> dict[str, Any]:
    """Adds the number of steps of a trial to the fields, unless the options give one."""
    from ctxext.train.multiplier import STEPS

    return {"steps": STEPS} | given


def _repeated(run: Path, given: dict[str, Any], force: bool) -> RunPlan:
    from ctxext.train.run_directory import plan_repeated

    plan, moved = plan_repeated(run, given, accept=force)
    for what in moved:
        console.say(f"warning: changed since {run} was trained: {what}")
    return plan


def _run(
    plan: RunPlan, run: Path, resume: bool, force: bool, as_json: bool, launch: Launch | None, repeat: Path | None
) -> None:
    from ctxext import api
    from ctxext.train.ranks import leave, started_rank

    # With a launch, the started processes load the model and train; this one only reports.
    started = started_rank() if launch else None
    if launch is None or started is not None:
        console.quiet_libraries()
    with training_progress(plan) as on_step:
        report = api.carry_out(
            plan, run, resume=resume, force=force, launch=launch, repeats=repeat, say=console.say, on_step=on_step
        )
    if started is not None:
        leave()
    if as_json:
        console.emit(report.as_dict())
    elif report.finished:
        console.pairs(report_rows(report, plan, _predicted(plan, launch)[1]))
    if not report.finished:
        console.say(f"stopped after step {report.steps_done} of {report.steps}; resume with")
        console.say(f"  ctxext finetune --resume --out {run}")
        raise typer.Exit(130)


def report_rows(report: FinetuneReport, plan: RunPlan, predicted: Estimate | None) -> list[tuple[str, str]]:
    """Returns a finished run as (name, value) lines, with predictions beside measurements."""
    from ctxext.units import counted, format_duration

    return [
        ("loss", _losses(report, plan)),
        ("held-out loss", _held_out(report, plan)),
        ("trained tensors", f"{report.trained_tensors}, all checked on disk"),
        ("gradient spikes", f"{report.spikes} of {counted(report.steps, 'step')} scaled down"),
        ("rollbacks", str(report.rollbacks)),
        ("peak memory", _peak_memory(report, plan)),
        ("a step", _step_row(report, predicted)),
        ("took", format_duration(report.seconds)),
        ("written to", report.out),
    ]


def _step_row(report: FinetuneReport, predicted: Estimate | None) -> str:
    from ctxext.units import format_duration

    beside = "no prediction" if predicted is None else f"predicted {format_duration(predicted.seconds)}"
    return f"{format_duration(report.seconds_per_step or 0.0)}, the median; {beside}"


def _peak_memory(report: FinetuneReport, plan: RunPlan) -> str:
    """Measured and predicted peak memory. On a CPU they differ in kind: train/metrics.py measures the resident set."""
    from ctxext.train.run_plan import on_gpu
    from ctxext.units import format_bytes

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
    from ctxext.units import format_tokens

    return f" at ctx {format_tokens(plan.spec.ctx)}" if plan.earlier else ""


@contextmanager
def training_progress(plan: RunPlan) -> Iterator[Callable[[StepMetrics], None]]:
    """Yields the callback for steps of a run. It updates a progress bar.

    Where stderr is no terminal, it prints a line after each tenth of the run.
    """
    from ctxext.units import format_bytes

    with console.progress_display() as display:
        task = display.add_task("preparing", total=plan.steps, note="")

        def on_step(metrics: StepMetrics) -> None:
            speed = f"{metrics.tokens_per_second:,.0f} tokens/s  {format_bytes(metrics.memory)}"
            speed += f"  MFU {metrics.mfu:.0%}" if getattr(metrics, "mfu", None) else ""
            note = f"loss {metrics.loss:.3f}  {speed}"
            display.update(task, completed=metrics.step, description="training", note=note)
            if display.disable and metrics.step % max(1, plan.steps // 10) == 0:
                console.say(f"step {metrics.step}/{plan.steps}  {note}")

        yield on_step
