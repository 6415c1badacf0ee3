"""The commands as functions: `from ctxext import plan, convert, finetune, evaluate, merge, ...`.

Each function does the same as its command, takes the command's options by name (a length is tokens, or text such as
"32k"), and returns the report that the command prints. The functions print nothing. They call `say(line)` with messages
for the user and `progress(what, done, total)` with the progress. Errors are those of ctxext.errors; problems of
arguments and files are raised before torch is imported. An output that exists is an error unless `force`; without `out`
the output is under ./runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import EnvironmentFault, InputError
from ctxext.extras import can_draw, require
from ctxext.progress import Progress, ignore
from ctxext.units import parse_tokens

if TYPE_CHECKING:
    from ctxext.evals.suite import EvalReport
    from ctxext.export.write import Exported
    from ctxext.model.convert import ConversionPlan, ConversionReport
    from ctxext.model.merge import MergeReport
    from ctxext.planning.answer import PlanAnswer
    from ctxext.probes.probe_finding import ProbeReport
    from ctxext.report.page import Report
    from ctxext.retrofit.layers import Request
    from ctxext.retrofit.planner import LayerPlan
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.metrics import StepMetrics
    from ctxext.train.parallel import Launch
    from ctxext.train.run_plan import RunPlan

Say = Callable[[str], None]
OnStep = Callable[["StepMetrics"], None]
Where = str | Path
AUTO = "auto"
PLAN = "plan.json"


def plan(
    model: Where,
    ctx: str | int,
    *,
    hybrid: str | None = None,
    gpu: str | None = None,
    memory: str | None = None,
    gpus: int = 1,
    preset: str = "lora-alpha",
    settings: Mapping[str, Any] | None = None,
    out: Where | None = None,
    force: bool = False,
) -> PlanAnswer:
    """Returns which ways to train at `ctx` fit in memory, with their speed and their commands.

    It needs no torch and no weights. With `out`, it also writes plan.json. It returns an answer even where nothing
    fits; then `answer.refuse()` raises CheckFailed.
    """
    from ctxext.planning.answer import answer, ask

    requested, rates = ask(str(model), str(ctx), hybrid=hybrid, gpu=gpu, memory=memory, cards_=gpus, preset=preset,
                       fixed=settings or {})  # fmt: skip
    # Check the output before the search, which takes the most time.
    if out is not None:
        check_free(Path(out), force, keep=[requested.source.path])
    found = answer(requested, rates)
    if out is not None:
        with staged_output(Path(out), force) as place:
            (place / PLAN).write_text(json.dumps(found.as_dict(), indent=2) + "\n", "utf-8")
            spec = {"model": str(model), "ctx": parse_tokens(ctx), "preset": preset, **dict(settings or {})}
            manifests.write(place, manifests.new("plan", spec=spec, parents={}, facts={"fitting": found.fitting}))
    return found


def convert(
    model: Where,
    hybrid: Where,
    *,
    out: Where | None = None,
    full_layers: str | Sequence[int] | None = None,
    budget: str | int | None = None,
    length: str | int | None = None,
    calibration: Where | None = None,
    calibration_tokens: str | int | None = None,
    i_know: bool = False,
    sliding_window: int | None = None,
    model_class: str = AUTO,
    sinks: str = AUTO,
    dtype: str | None = None,
    gate: bool = True,
    allow_pickle: bool = False,
    force: bool = False,
    say: Say = ignore,
    progress: Progress = ignore,
) -> ConversionReport:
    """Converts most layers to small sliding windows and keeps a few full layers.

    The conversion edits the layout and copies the weights; with `gate` it compares the result with the source.

    hybrid        a preset, a YAML file or a pattern of S, N, F
    full_layers   layers counted from 0, "odd", "even", "last", or "auto", which measures the layers to keep full
    model_class   the output's model_type, such as "granite_swa"
    sinks         "auto" (fitted where the class has sinks and the model needs them) or "none"
    calibration   text for full_layers "auto" and for sinks, such as a file; None: the embedded corpus
    """
    if full_layers is not None and not isinstance(full_layers, str):
        full_layers = ",".join(map(str, full_layers))
    plan = plan_convert(model, hybrid, out=out, full_layers=full_layers, sliding_window=sliding_window, dtype=dtype,
                        model_class=model_class, sinks=sinks, allow_pickle=allow_pickle, force=force)  # fmt: skip
    request = plan_layers(plan, full_layers, budget=budget, length=length,
                          calibration=None if calibration is None else str(calibration),
                          calibration_tokens=calibration_tokens, i_know=i_know or None)  # fmt: skip
    return write_conversion(plan, layers_for(plan, request, say, progress), calibration=calibration, gate=gate,
                            force=force, say=say, progress=progress)  # fmt: skip


def plan_convert(
    model: Where, hybrid: Where, *, out: Where | None, full_layers: str | None, **given: Any
) -> ConversionPlan:
    """Returns the plan of a conversion, without the planner's choice of layers; checks the model's files."""
    from ctxext.model.convert import plan_conversion

    return plan_conversion(
        str(model), str(hybrid), out=_path(out), full_layers=None if full_layers == AUTO else full_layers, **given
    )


def plan_layers(plan: ConversionPlan, full_layers: str | None, **given: Any) -> Request | None:
    """Returns the request to the planner, None where `full_layers` is not "auto".

    `given` are the planner's options (None: not given). Raises InputError where one is given without the planner.
    """
    from ctxext.model.convert import may_fit_sinks
    from ctxext.retrofit.layers import request_of

    source = plan.source
    requested = {name: value for name, value in given.items() if value is not None}
    if full_layers != AUTO and may_fit_sinks(plan):
        requested.pop("calibration", None)  # the sinks are fitted on this text
    return request_of(source.shape, source.kinds, plan.hybrid, source.usable_length, full_layers == AUTO, requested)


def layers_for(plan: ConversionPlan, request: Request | None, say: Say, progress: Progress) -> LayerPlan | None:
    """Returns the planner's choice of layers, by measurement; None without a request."""
    if request is None:
        return None
    from ctxext.retrofit.planner import choose_layers

    say(f"measuring which layers of {plan.source.name} to keep full")
    return choose_layers(plan, request, say=say, progress=lambda what, *counts: progress(f"measuring {what}", *counts))


def write_conversion(
    plan: ConversionPlan,
    chosen: LayerPlan | None,
    *,
    calibration: Where | None = None,
    gate: bool,
    force: bool,
    say: Say,
    progress: Progress,
) -> ConversionReport:
    """Writes the conversion, with the planner's results in the same directory.

    `calibration` is the text that sinks are fitted on; None: the embedded corpus.
    """
    from ctxext.model.convert import run_conversion, with_kinds

    attachments: dict[str, bytes] = {}
    facts: dict[str, object] = {}
    # The planner's layout replaces that of the plan, before sinks are fitted for it.
    if chosen is not None:
        plan = with_kinds(plan, chosen.kinds)
        facts["planner"] = chosen.facts()
        attachments = {"retrofit.json": (json.dumps(chosen.as_dict(), indent=2) + "\n").encode()}
        if can_draw(say, "pareto.png"):
            from ctxext.retrofit.picture import pareto_png

            attachments["pareto.png"] = pareto_png(chosen)
    sinks = None
    if plan.sinks:
        from ctxext.data.documents import EMBEDDED
        from ctxext.retrofit.fitted_sinks import fit_sinks

        progress("measuring the first token", 0, 1)
        sinks = fit_sinks(plan, say=say, calibration=str(calibration or EMBEDDED))
    say(f"converting {plan.source.name} to {plan.out}")
    return run_conversion(
        plan,
        gate=gate,
        force=force,
        sinks=sinks,
        attachments=attachments,
        facts=facts,
        progress=lambda done, total: progress("proving" if done == total else "copying weights", done, total),
    )


def finetune(
    model: Where | None = None,
    *,
    ctx: str | int | None = None,
    preset: str = "lora-alpha",
    data: str | None = None,
    steps: int | None = None,
    original_length: str | int | None = None,
    settings: Mapping[str, Any] | None = None,
    zero: str | None = None,
    nproc: int | None = None,
    hostfile: Where | None = None,
    out: Where | None = None,
    resume: bool = False,
    force: bool = False,
    say: Say = ignore,
    on_step: OnStep = ignore,
) -> FinetuneReport:
    """Trains a model at a longer context and returns the report.

    `ctx` may be stages, such as "8k,32k"; `settings` are fields of the spec by dotted path. `resume` continues the
    unfinished run at `out`. If a model is given, model and settings must be those that the run started with. Without a
    model, changed settings need `force`, and so does changed data. The report's `finished` is False for a run that was
    stopped.

    Under torchrun, srun and the like, every process makes the same call. The ranks other than 0 take the run from rank
    0 (train/shared_run.py). The process group stays for further calls: a script ends it as any script of torch does.
    """
    from ctxext.train.launch import launched
    from ctxext.train.ranks import started_rank
    from ctxext.train.run_directory import option_fields
    from ctxext.train.shared_run import follow, leading

    started = started_rank()
    # Every rank reaches `follow` or `leading` first: an error before that would leave the others waiting.
    if started is not None and started.rank > 0:
        report = follow(started)
        if isinstance(report, int):
            raise EnvironmentFault("rank 0 has no run for the other ranks", hint="the error of rank 0 says why")
        return report
    with leading(started, say):
        given = option_fields(ctx, data, steps, original_length) | dict(settings or {})
        plan, run = _planned_run(model, preset, given, _path(out), resume, force, say)
        plan, launch = launched(plan, zero, nproc, _path(hostfile), resume=resume)
        return carry_out(plan, run, resume=resume, force=force, launch=launch, say=say, on_step=on_step)


def _planned_run(
    model: Where | None, preset: str, given: dict[str, Any], out: Path | None, resume: bool, force: bool, say: Say
) -> tuple[RunPlan, Path]:
    """The plan of a run, new or resumed, and its directory."""
    from ctxext.train.run_directory import plan_from_options, plan_resumed, started_as

    if not resume:
        plan = plan_from_options(None if model is None else str(model), preset, given, needs_weights=True, say=say)
        return plan, out or manifests.default_out("finetune", f"{plan.source.name}-{plan.spec.ctx}")
    if out is None:
        raise InputError("resume needs a run", hint="give its directory as out")
    if model is None:
        if preset != "lora-alpha":
            raise InputError(
                f"resume: preset {preset!r} needs a model", hint="leave preset out: the run has its own spec"
            )
        # The given settings are changes of the run's spec.
        return plan_resumed(out, given, accept=force, say=say), out
    # Compare the plan of this model with the spec of the run.
    requested = plan_from_options(str(model), preset, given, needs_weights=True)
    if not started_as(out, requested, any_data=force):
        raise InputError(
            f"{out} was started with another model, data or settings",
            hint="give the same model, data and settings, or another out; force without resume starts it again",
        )
    return plan_resumed(out, {}, accept=force, say=say), out


def carry_out(
    plan: RunPlan,
    run: Path,
    *,
    resume: bool,
    force: bool,
    launch: Launch | None,
    repeats: Path | None = None,
    say: Say,
    on_step: OnStep,
) -> FinetuneReport:
    """Runs a plan, new or resumed; removes the directory of a new run that fails before it trained anything."""
    from ctxext.config.output import replacing
    from ctxext.train.launch import LOGS
    from ctxext.train.run_directory import alone, applied_changes, discard_unstarted, start_run

    if resume:
        with alone(run), applied_changes(plan, run):
            return _train(plan, run, True, launch, say, on_step)
    # `force` must not replace the model, the data, or the run that this one repeats.
    read = [Path(part.source) for part in plan.spec.data.parts]
    with replacing(run, force, keep=[plan.source.path, repeats, *(path for path in read if path.exists())]):
        start_run(plan, run)
        with alone(run):
            try:
                return _train(plan, run, False, launch, say, on_step)
            except BaseException:
                if not (run / LOGS).exists():  # the logs have the traceback of a process that died
                    discard_unstarted(run)
                raise


def _train(plan: RunPlan, run: Path, resume: bool, launch: Launch | None, say: Say, on_step: OnStep) -> FinetuneReport:
    from ctxext.train.launch import check_environment, launch_run
    from ctxext.train.ranks import started_rank
    from ctxext.train.shared_run import share_run

    started = started_rank() if launch else None
    if launch is not None and started is not None:
        check_environment(launch)
    # The launch comes before the imports below, so that this process holds no torch while the launched processes train.
    fields = launch_run(run, launch, say, on_step) if launch and started is None else None
    from ctxext.train.finetune import FinetuneReport, run_finetune
    from ctxext.train.loop import Events

    if fields is not None:
        return FinetuneReport(**fields)
    events = Events(say, on_step)
    if launch is None or started is None:
        return run_finetune(plan, run, resume=resume, events=events)
    # This process is rank 0 of ranks that another program started.
    share_run(started, run, launch)
    return run_finetune(plan, run, resume=resume, events=events, zero=launch.zero)


def evaluate(
    models: Where | Sequence[Where],
    *,
    suite: str = "perplexity",
    lengths: Sequence[str | int] | str | int | None = None,
    against: Where | None = None,
    data: str | None = None,
    text_field: str | None = None,
    protocol: str | None = None,
    evaluator: str | None = None,
    limit: str | int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    extrapolate: bool = False,
    nope_log_scale: float | None = None,
    settings: Mapping[str, Any] | None = None,
    out: Where | None = None,
    force: bool = False,
    say: Say = ignore,
    progress: Progress = ignore,
) -> EvalReport:
    """Measures one or more models with the same suites and returns the report.

    `suite` is a name, several names joined by commas, or an eval preset. `settings` are fields as for `--set`, such as
    {"passkey.cases": 4}. An unfinished evaluation of the same request is resumed.
    """
    from ctxext.eval_and_merge import eval_models, plan_eval
    from ctxext.evals.eval_spec import eval_fields

    given = {"data": data, "text_field": text_field, "protocol": protocol, "evaluator": evaluator, "limit": limit,
             "seed": seed, "dtype": dtype, "extrapolate": extrapolate, "nope_log_scale": nope_log_scale,
             "lengths": lengths}  # fmt: skip
    fields = eval_fields(given) | dict(settings or {})
    names = [str(model) for model in ([models] if isinstance(models, str | Path) else models)]
    plan = plan_eval(
        names, suite, fields, against=None if against is None else str(against), out=_path(out), force=force
    )
    if plan.resumes:
        say(f"{plan.out} is an unfinished evaluation of the same request: it is resumed")
    return eval_models(plan, force=force, progress=progress, notice=say)


def probe(
    model: Where,
    names: str | Sequence[str] = "all",
    *,
    compare: Where | None = None,
    preset: str | None = None,
    length: str | int | None = None,
    samples: int | None = None,
    ablate: int | None = None,
    data: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    extrapolate: bool = False,
    settings: Mapping[str, Any] | None = None,
    out: Where | None = None,
    force: bool = False,
    say: Say = ignore,
    progress: Progress = ignore,
) -> ProbeReport:
    """Runs probes on a model, and on `compare` if given; writes probes.json, figures and a manifest."""
    from ctxext.evals.eval_spec import set_arguments
    from ctxext.probes.plan_probes import plan_probe

    given = {"length": length, "samples": samples, "ablate": ablate, "data": data, "seed": seed, "dtype": dtype,
             "extrapolate": extrapolate}  # fmt: skip
    fields = set_arguments(given) | dict(settings or {})
    requested = [names] if isinstance(names, str) else list(names)
    before = None if compare is None else str(compare)
    plan = plan_probe(str(model), requested, fields, preset=preset, compare=before, out=_path(out), force=force)
    # Imported only now: the plan is checked without torch.
    from ctxext.probes import run_probes

    report = run_probes.measure(plan, progress, say)
    run_probes.write(plan, report)
    return report


def merge(
    run: Where,
    *,
    out: Where | None = None,
    dtype: str | None = None,
    alpha_multiplier: str | float | None = None,
    nope_scale: str | float | None = None,
    length: str | int | None = None,
    data: str | None = None,
    restore: str | None = None,
    force: bool = False,
    say: Say = ignore,
) -> MergeReport:
    """Merges an adapter, in fp32, into an ordinary Hugging Face directory, and checks that nothing is lost."""
    from ctxext.eval_and_merge import merge_run, plan_merge

    plan = plan_merge(str(run), _path(out), dtype, force, alpha_multiplier=alpha_multiplier, nope_scale=nope_scale,
                      length=length, data=data, restore=restore)  # fmt: skip
    return merge_run(plan, notice=say)


def export_model(model: Where, target: str = "hf", *, out: Where | None = None, force: bool = False) -> Exported:
    """Exports a merged run or a model for another program: `target` is hf, vllm, gguf or ollama.

    Raises CheckFailed where the target would not honour its exact windows and NoPE layers.
    """
    from ctxext.export.write import export, plan_export, refuse

    found = plan_export(str(model), target, _path(out), force)
    refuse(found.verdict)
    return export(found)


def write_report(
    runs: Where | Sequence[Where], *, out: Where | None = None, title: str | None = None, force: bool = False
) -> Report:
    """Writes evaluations, probes and training runs into one HTML file that needs no network."""
    require("matplotlib", "a report")
    from ctxext.report.page import plan_report
    from ctxext.report.page import write_report as write

    given = [runs] if isinstance(runs, str | Path) else runs
    return write(plan_report([Path(run) for run in given], out=_path(out), title=title, force=force))


def _path(given: Where | None) -> Path | None:
    return None if given is None else Path(given)
