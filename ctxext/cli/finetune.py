"""ctxext finetune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxext.cli import console
from ctxext.errors import InputError

if TYPE_CHECKING:
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.metrics import StepMetrics
    from ctxext.train.parallel import Launch
    from ctxext.train.plan import RunPlan

DEFAULT_PRESET = "lora-alpha"
ZeroOption = Annotated[str | None, typer.Option(help="DeepSpeed ZeRO: 1, 2, 3, 2_offload, 3_offload or a JSON file")]
ProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Processes, under ZeRO 2 unless --zero says otherwise [default: 1, or the GPUs]"),
]
HostfileOption = Annotated[
    Path | None, typer.Option(help="Hosts with one file system, reached by ssh: lines `name slots=N`")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run (--out, or the newest)")]
RepeatOption = Annotated[
    Path | None, typer.Option(help="A run's directory: a new run of its spec on its model and data")
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an existing run; with --resume: go on with a changed spec; with --repeat: on what changed",
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
  ctxext finetune llama2-7b --ctx 100k --zero 3 --nproc 8\n
  ctxext finetune llama2-7b --ctx 32k --find-multiplier\n
  ctxext finetune --preset heal\n
  ctxext finetune --resume --out runs/20260101T000000.000000Z-finetune-tiny\n
  ctxext finetune --repeat runs/20260101T000000.000000Z-finetune-tiny --set seed=1"""


def finetune(
    model: Annotated[
        str | None, typer.Argument(help="A directory, preset or hub id [default: the newest conversion]")
    ] = None,
    ctx: Annotated[
        str | None,
        typer.Option(help="Training context in tokens, such as 8192, 100k (k = 1024), or stages: 8k,32k,100k"),
    ] = None,
    preset: Annotated[str, typer.Option(help="A finetune preset or a YAML file")] = DEFAULT_PRESET,
    data: Annotated[
        str | None, typer.Option(help="Files, a directory, or a datasets id [default: the embedded corpus]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory [default: ./runs/<time>-finetune-<name>]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of the preset's")] = None,
    original_length: Annotated[
        str | None, typer.Option(help="Tokens it was first trained at, if its files are wrong")
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
    """Train a model at a longer context: S²-Attn or dense, LoRA with embeddings and norms, positions where needed."""
    from ctxext.config import manifest as manifests

    given = _fields({"ctx": ctx, "data.source": data, "steps": steps, "original_length": original_length}, set_ or [])
    if (resume or repeat) and (model is not None or preset != DEFAULT_PRESET or (resume and repeat)):
        raise InputError(
            "--resume and --repeat take a run's own model and spec", hint="give one of them, without MODEL and --preset"
        )
    if find_multiplier:
        from ctxext.cli.multiplier import refuse_beside, search

        refuse_beside(plan=plan, resume=resume, repeat=repeat, zero=zero, nproc=nproc, hostfile=hostfile)
        search(_plan(model, preset, _briefly(given), needs_weights=True), out, force, as_json)
        return
    if resume:
        from ctxext.train.run import newest_unfinished, plan_resumed

        run = out or newest_unfinished(manifests.RUNS)
        decided = plan_resumed(run, given, accept=force)
    else:
        decided = _repeated(repeat, given, force) if repeat else _plan(model, preset, given, needs_weights=not plan)
        run = out or manifests.default_out("finetune", f"{decided.source.name}-{decided.spec.ctx}")
    decided, launch = _launched(decided, zero, nproc, hostfile, resume, repeat)
    if plan:
        _show_plan(decided, launch, as_json)
        return
    console.pairs(_rows(decided, launch), to_stderr=True)
    _run(decided, run, resume, force, as_json, launch, repeat)


def _launched(
    plan: RunPlan, zero: str | None, nproc: int | None, hostfile: Path | None, resume: bool, repeat: Path | None
) -> tuple[RunPlan, Launch | None]:
    """On how many processes a plan runs, and the plan with the memory of one of them."""
    from ctxext.train.launch import LAUNCH
    from ctxext.train.parallel import Launch, plan_launch
    from ctxext.train.plan import divided

    before = Launch.read(repeat / LAUNCH) if repeat and (repeat / LAUNCH).is_file() else None
    launch = plan_launch(plan, zero, nproc, hostfile, resume=resume, repeats=before)
    return (divided(plan, launch.partition) if launch else plan), launch


def _rows(plan: RunPlan, launch: Launch | None) -> list[tuple[str, str]]:
    return plan.rows() + ([("processes", f"{launch.summary()}; the memory is that of each")] if launch else [])


def _show_plan(plan: RunPlan, launch: Launch | None, as_json: bool) -> None:
    from ctxext.train.parallel import ALONE

    where = launch.as_dict() if launch else ALONE
    console.emit(plan.as_dict() | {"launch": where}) if as_json else console.pairs(_rows(plan, launch))


def _briefly(given: dict[str, Any]) -> dict[str, Any]:
    """Fields with the steps of a trial where the options name none."""
    from ctxext.train.multiplier import STEPS

    return {"steps": STEPS} | given


def _repeated(run: Path, given: dict[str, Any], force: bool) -> RunPlan:
    from ctxext.train.run import plan_repeated

    plan, moved = plan_repeated(run, given, accept=force)
    for what in moved:
        console.say(f"warning: no longer what {run} was trained on: {what}")
    return plan


def _fields(given: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    """What options say about the spec, by dotted path; `--set` comes last."""
    from ctxext.config.loader import assignments

    fields = {key: value for key, value in given.items() if value is not None}
    if "," in (fields.get("ctx") or ""):
        *fields["stages"], fields["ctx"] = [part.strip() for part in fields["ctx"].split(",")]
    return fields | assignments(sets, example="lora.rank=16")


def _plan(model: str | None, preset: str, given: dict[str, Any], *, needs_weights: bool) -> RunPlan:
    from ctxext.config import manifest as manifests
    from ctxext.config import presets
    from ctxext.config.loader import build, set_value
    from ctxext.model.source import resolve
    from ctxext.train.plan import plan_run
    from ctxext.train.spec import FinetuneSpec
    from ctxext.units import parse_tokens

    fields: dict[str, Any] = dict(presets.find("finetune", preset).data)
    for key, value in given.items():
        set_value(fields, key, value)
    if "ctx" not in fields and not fields.get("distill"):
        raise InputError("--ctx is missing", hint="give the context to train at, such as --ctx 32k")
    if model is None:
        newest = manifests.newest(manifests.RUNS, ("conversion", "model"))
        console.say(f"no MODEL given: taking the newest, {newest}")
        model = str(newest)
    source = resolve(model, weights=needs_weights)
    given_length = fields.get("original_length")
    length = source.original_length if given_length is None else parse_tokens(given_length)
    if "ctx" not in fields and length is not None:
        fields["ctx"] = length
        console.say(f"no --ctx given: healing at {length:,} tokens, the length it was first trained at")
    spec = build(FinetuneSpec, fields, source=f"finetune spec (preset {preset}, options)")
    return plan_run(source, spec)


def _run(
    plan: RunPlan, run: Path, resume: bool, force: bool, as_json: bool, launch: Launch | None, repeat: Path | None
) -> None:
    from ctxext.config.output import replacing
    from ctxext.train.launch import LOGS
    from ctxext.train.run import discard_unstarted, start_run
    from ctxext.units import format_bytes, format_duration

    if resume:
        report = train_with_progress(plan, run, resume=True, launch=launch)
    else:
        read = [Path(part.source) for part in plan.spec.data.parts]
        with replacing(run, force, keep=[plan.source.path, repeat, *(path for path in read if path.exists())]):
            start_run(plan, run)
            try:
                report = train_with_progress(plan, run, resume=False, launch=launch)
            except BaseException:
                if not (run / LOGS).exists():  # which have the traceback of a process that died
                    discard_unstarted(run)
                raise
    if as_json:
        console.emit(report.as_dict())
    elif report.finished:
        rows = [
            ("loss", _losses(report, plan)),
            ("held-out loss", _held_out(report)),
            ("trained tensors", f"{report.trained_tensors}, all found again on disk"),
            ("gradient spikes", f"{report.spikes} of {report.steps} steps scaled down"),
            ("rollbacks", str(report.rollbacks)),
            ("peak memory", format_bytes(report.peak_memory)),
            ("took", format_duration(report.seconds)),
            ("written to", report.out),
        ]
        console.pairs(rows)
    if not report.finished:
        console.say(f"stopped after step {report.steps_done} of {report.steps}; go on with")
        console.say(f"  ctxext finetune --resume --out {run}")
        raise typer.Exit(130)


def _losses(report: FinetuneReport, plan: RunPlan) -> str:
    if plan.spec.distill is None:
        return f"{report.first_loss:.3f} -> {report.final_loss:.3f} nats a token"
    if len(plan.spec.distill.objectives) > 1:  # the first is of another objective
        return f"{report.final_loss:.3f} of the last objective"
    return f"{report.first_loss:.3f} -> {report.final_loss:.3f} of what is learned from the teacher"


def _held_out(report: FinetuneReport) -> str:
    if report.held_out is None:
        return "not measured"
    return f"{report.held_out[0]:.3f} -> {report.held_out[1]:.3f}, under the attention it runs with"


def train_with_progress(plan: RunPlan, run: Path, *, resume: bool, launch: Launch | None = None) -> FinetuneReport:
    """Run a plan under a progress bar; a line every tenth of the way where stderr is no terminal."""
    from ctxext.train.launch import launch_run
    from ctxext.units import format_bytes

    with console.progress() as display:
        task = display.add_task("preparing", total=plan.steps, note="")

        def on_step(metrics: StepMetrics) -> None:
            speed = f"{metrics.tokens_per_second:,.0f} tokens/s  {format_bytes(metrics.memory)}"
            speed += f"  MFU {metrics.mfu:.0%}" if getattr(metrics, "mfu", None) else ""
            note = f"loss {metrics.loss:.3f}  {speed}"
            display.update(task, completed=metrics.step, description="training", note=note)
            if display.disable and metrics.step % max(1, plan.steps // 10) == 0:
                console.say(f"step {metrics.step}/{plan.steps}  {note}")

        fields = launch_run(run, launch, console.say, on_step) if launch else None
        console.quiet_libraries()
        from ctxext.train.finetune import FinetuneReport, run_finetune
        from ctxext.train.loop import Events

        if fields is not None:
            return FinetuneReport(**fields)
        return run_finetune(plan, run, resume=resume, events=Events(console.say, on_step))
