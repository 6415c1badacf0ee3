"""The commands as functions: `from ctxext import plan, convert, finetune, evaluate, merge, ...`.

Each does what the command of its name does, takes its options by name (a length is tokens, or text such as "32k"), and
returns the report that the command prints. Nothing is printed: `say(line)` is told what a user should know, and
`told(what, done, in all)` how far it is. Errors are those of ctxext.errors; what arguments and files can decide is
refused before torch is imported. An output that exists is refused unless `force`; without `out` it is under ./runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import InputError
from ctxext.progress import Progress, ignore
from ctxext.units import parse_tokens

if TYPE_CHECKING:
    from ctxext.evals.suite import EvalReport
    from ctxext.export.write import Exported
    from ctxext.model.convert import ConversionPlan, ConversionReport
    from ctxext.model.merge import MergeReport
    from ctxext.planning.answer import Answer
    from ctxext.probes.finding import ProbeReport
    from ctxext.report.page import Report
    from ctxext.retrofit.layers import Request
    from ctxext.retrofit.planner import LayerPlan
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.metrics import StepMetrics
    from ctxext.train.parallel import Launch
    from ctxext.train.plan import RunPlan

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
) -> Answer:
    """What of the ways to train at `ctx` fits, how fast, and the commands; no torch, no weights. With `out`, plan.json.

    Where nothing fits it is returned all the same: `answer.refuse()` raises CheckFailed then.
    """
    from ctxext.planning.answer import answer, ask

    asked, rates = ask(str(model), str(ctx), hybrid=hybrid, gpu=gpu, memory=memory, cards_=gpus, preset=preset,
                       fixed=settings or {})  # fmt: skip
    if out is not None:
        check_free(Path(out), force, keep=[asked.source.path])
    found = answer(asked, rates)
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
    """Turn most layers into small sliding windows and leave a few full: a layout edit, the weights copied, a proof.

    `hybrid` is a preset, a YAML file or a pattern of S, N, F; `full_layers` layers from 0, "odd", "even", "last", or
    "auto", which measures the ones to keep full. `model_class` is the output's model_type, such as "granite_swa";
    `sinks` is "auto" (fitted where the class has them and the model needs them) or "none". `calibration` is text for
    both, such as a file; without it the embedded corpus.
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
    """The conversion without its planner's choice; refuses what the model's files can decide."""
    from ctxext.model.convert import plan_conversion

    return plan_conversion(
        str(model), str(hybrid), out=_path(out), full_layers=None if full_layers == AUTO else full_layers, **given
    )


def plan_layers(plan: ConversionPlan, full_layers: str | None, **given: Any) -> Request | None:
    """What the planner is asked for, None where it is not; its options (None: not given) are refused without it."""
    from ctxext.model.convert import may_fit_sinks
    from ctxext.retrofit.layers import request_of

    source = plan.source
    asked = {name: value for name, value in given.items() if value is not None}
    if full_layers != AUTO and may_fit_sinks(plan):
        asked.pop("calibration", None)  # it is the text that sinks are fitted on
    return request_of(source.shape, source.kinds, plan.hybrid, source.usable_length, full_layers == AUTO, asked)


def layers_for(plan: ConversionPlan, request: Request | None, say: Say, progress: Progress) -> LayerPlan | None:
    """The planner's choice, measured."""
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
    """The conversion on disk, with what the planner found beside it. `calibration`: text that sinks are fitted on."""
    from ctxext.model.convert import run_conversion, with_kinds

    attachments: dict[str, bytes] = {}
    facts: dict[str, object] = {}
    if chosen is not None:
        from ctxext.retrofit.picture import pareto_png

        plan = with_kinds(plan, chosen.kinds)
        facts["planner"] = chosen.facts()
        attachments = {
            "retrofit.json": (json.dumps(chosen.as_dict(), indent=2) + "\n").encode(),
            "pareto.png": pareto_png(chosen),
        }
    sinks = None
    if plan.sinks:
        from ctxext.retrofit.sinks import fit_sinks

        progress("measuring the first token", 0, 1)
        sinks = fit_sinks(plan, say=say, **({} if calibration is None else {"calibration": str(calibration)}))
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
    """Train at a longer context. `ctx` may be stages, "8k,32k"; `settings` are fields of the spec by dotted path.

    `resume` continues the unfinished run at `out`: a model that is given must be the one it started with, with these
    settings; without one, other settings need `force`, as changed data does. `finished` is False of what was stopped.
    """
    from ctxext.train.launch import launched
    from ctxext.train.run import asked_fields, plan_asked, plan_resumed, started_as

    given = asked_fields(ctx, data, steps, original_length) | dict(settings or {})
    if resume:
        if out is None:
            raise InputError("resume: which run?", hint="name it with out")
        if model is None and preset != "lora-alpha":
            raise InputError(f"resume: preset {preset!r} says nothing without a model", hint="a run has its own spec")
        run = Path(out)
        asked = None if model is None else plan_asked(str(model), preset, given, needs_weights=True)
        if asked is not None and not started_as(run, asked, any_data=force):
            raise InputError(
                f"{run} was started with another model, data or settings",
                hint="give what it was started with, or another out; or force, without resume, to begin anew",
            )
        plan = plan_resumed(run, {} if model is not None else given, accept=force, say=say)
    else:
        plan = plan_asked(None if model is None else str(model), preset, given, needs_weights=True, say=say)
        run = _path(out) or manifests.default_out("finetune", f"{plan.source.name}-{plan.spec.ctx}")
    plan, launch = launched(plan, zero, nproc, _path(hostfile), resume=resume)
    return carry_out(plan, run, resume=resume, force=force, launch=launch, say=say, on_step=on_step)


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
    """The run of a plan, new or resumed; a directory in which nothing was trained is removed again."""
    from ctxext.config.output import replacing
    from ctxext.train.launch import LOGS
    from ctxext.train.run import alone, discard_unstarted, going_on, start_run

    if resume:
        with alone(run), going_on(plan, run):
            return _train(plan, run, True, launch, say, on_step)
    read = [Path(part.source) for part in plan.spec.data.parts]
    with replacing(run, force, keep=[plan.source.path, repeats, *(path for path in read if path.exists())]):
        start_run(plan, run)
        with alone(run):
            try:
                return _train(plan, run, False, launch, say, on_step)
            except BaseException:
                if not (run / LOGS).exists():  # which have the traceback of a process that died
                    discard_unstarted(run)
                raise


def _train(plan: RunPlan, run: Path, resume: bool, launch: Launch | None, say: Say, on_step: OnStep) -> FinetuneReport:
    from ctxext.train.launch import launch_run

    fields = launch_run(run, launch, say, on_step) if launch else None
    from ctxext.train.finetune import FinetuneReport, run_finetune
    from ctxext.train.loop import Events

    return (
        FinetuneReport(**fields)
        if fields is not None
        else run_finetune(plan, run, resume=resume, events=Events(say, on_step))
    )


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
    """Measure models side by side. `suite` is a name, several joined by commas, or an eval preset; `settings` are
    fields as of `--set`, such as {"passkey.cases": 4}. An unfinished evaluation of the same request is gone on with."""
    from ctxext.evals.spec import eval_fields
    from ctxext.pipeline import eval_models, plan_eval

    given = {"data": data, "text_field": text_field, "protocol": protocol, "evaluator": evaluator, "limit": limit,
             "seed": seed, "dtype": dtype, "extrapolate": extrapolate, "nope_log_scale": nope_log_scale,
             "lengths": lengths}  # fmt: skip
    fields = eval_fields(given) | dict(settings or {})
    names = [str(model) for model in ([models] if isinstance(models, str | Path) else models)]
    plan = plan_eval(
        names, suite, fields, against=None if against is None else str(against), out=_path(out), force=force
    )
    if plan.resumes:
        say(f"{plan.out} is an unfinished evaluation of the same request: going on with it")
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
    """Look inside a model, and beside it at the one it is compared with: probes.json, pictures and a manifest."""
    from ctxext.evals.spec import said
    from ctxext.probes.plan import plan_probe

    given = {"length": length, "samples": samples, "ablate": ablate, "data": data, "seed": seed, "dtype": dtype,
             "extrapolate": extrapolate}  # fmt: skip
    fields = said(given) | dict(settings or {})
    asked = [names] if isinstance(names, str) else list(names)
    before = None if compare is None else str(compare)
    plan = plan_probe(str(model), asked, fields, preset=preset, compare=before, out=_path(out), force=force)
    from ctxext.probes import run

    report = run.measure(plan, progress, say)
    run.write(plan, report)
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
    force: bool = False,
    say: Say = ignore,
) -> MergeReport:
    """Merge an adapter, in fp32, into an ordinary Hugging Face directory, and prove that nothing was lost."""
    from ctxext.pipeline import merge_run, plan_merge

    plan = plan_merge(str(run), _path(out), dtype, force, alpha_multiplier=alpha_multiplier, nope_scale=nope_scale,
                      length=length, data=data)  # fmt: skip
    return merge_run(plan, notice=say)


def export_model(model: Where, target: str = "hf", *, out: Where | None = None, force: bool = False) -> Exported:
    """Give a merged run or a model to others. Raises CheckFailed where `target` (hf, vllm, gguf, ollama) would not
    honour its exact windows and layers without positions."""
    from ctxext.export.write import export, plan_export, refuse

    found = plan_export(str(model), target, _path(out), force)
    refuse(found.verdict)
    return export(found)


def write_report(
    runs: Where | Sequence[Where], *, out: Where | None = None, title: str | None = None, force: bool = False
) -> Report:
    """Put evaluations, probes and training runs into one HTML file, readable without a network."""
    from ctxext.report.page import plan_report
    from ctxext.report.page import write_report as write

    given = [runs] if isinstance(runs, str | Path) else runs
    return write(plan_report([Path(run) for run in given], out=_path(out), title=title, force=force))


def _path(given: Where | None) -> Path | None:
    return None if given is None else Path(given)
