"""The commands as functions: `from ctxext import plan, convert, finetune, evaluate, merge, ...`.

Each function does the same as its command. It takes the command's options by name (a length is tokens, or text such as
"32k"), or a request of requests.py that has them. It returns the report that the command prints, and prints nothing: it
calls `say(line)` with messages for the user and `progress(what, done, total)` with the progress. Errors are those of
ctxext.errors; problems of arguments and files are raised before torch is imported. An output that exists is an error
unless `force`; without `out` the output is under ./runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import InputError
from ctxext.extras import require
from ctxext.progress import Progress, ignore
from ctxext.requests import (
    ChatRequest,
    ConvertRequest,
    EvalRequest,
    ExportRequest,
    FinetuneRequest,
    GenerateRequest,
    MergeRequest,
    PlanRequest,
    ProbeRequest,
    ReportRequest,
    VerifyRequest,
    accepts,
    eval_fields,
    probe_fields,
)
from ctxext.units import parse_tokens

if TYPE_CHECKING:
    from ctxext.doctor.finding import Finding
    from ctxext.evals.certificate import Certificate
    from ctxext.evals.suite import EvalReport
    from ctxext.export.matrix import Verdict
    from ctxext.export.write import Exported
    from ctxext.finetuning import PlannedRun
    from ctxext.generation import Conversation, GeneratedAnswer
    from ctxext.model.convert import ConversionReport
    from ctxext.model.merge import MergeReport
    from ctxext.multiplier_search import FoundMultiplier
    from ctxext.planning.answer import PlanAnswer
    from ctxext.planning.calibrate import Calibration
    from ctxext.probes.probe_finding import ProbeReport
    from ctxext.report.page import Report
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.metrics import StepMetrics
    from ctxext.train.multiplier import Trial

Say = Callable[[str], None]
OnStep = Callable[["StepMetrics"], None]
OnPlan = Callable[["PlannedRun"], None]
Where = str | Path
PLAN = "plan.json"


@accepts(PlanRequest)
def plan(request: PlanRequest, *, out: Where | None = None, force: bool = False) -> PlanAnswer:
    """Returns which ways to train at `ctx` fit in memory, with their speed and their commands.

    It needs no torch and no weights. With `out`, it also writes plan.json. It returns an answer even where nothing
    fits; then `answer.refuse()` raises CheckFailed.
    """
    from ctxext.planning.answer import answer, ask

    requested, rates = ask(
        request.model,
        None if request.ctx is None else str(request.ctx),
        hybrid=request.hybrid,
        gpu=request.gpu,
        memory=request.memory,
        cards_=request.gpus,
        preset=request.preset,
        fixed=request.settings,
    )
    # Check the output before the search, which takes the most time.
    if out is not None:
        check_free(Path(out), force, keep=[requested.source.path])
    found = answer(requested, rates)
    if out is not None:
        with staged_output(Path(out), force) as place:
            (place / PLAN).write_text(json.dumps(found.as_dict(), indent=2) + "\n", "utf-8")
            spec = {
                "model": request.model,
                "ctx": parse_tokens(requested.ctx),
                "preset": request.preset,
                **request.settings,
            }
            manifests.write(place, manifests.new("plan", spec=spec, parents={}, facts={"fitting": found.fitting}))
    return found


def calibrate(model: Where, *, say: Say = ignore) -> list[Calibration]:
    """Measures the speed of this machine, about 20 seconds, stores it for later plans, and returns it.

    `model` is only checked to exist, so that a wrong name fails before the measurement.
    """
    from ctxext.model.source import resolve
    from ctxext.planning.calibrate import calibrate as measure

    resolve(str(model), weights=False)
    measured = measure(say)
    for one in measured:
        say(f"{one.as_rates().source}: {one.rates['linear'][-1][1] / 1e9:,.0f} GFLOP/s in matrices")
    return measured


@accepts(ConvertRequest)
def convert(
    request: ConvertRequest,
    *,
    out: Where | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    say: Say = ignore,
    progress: Progress = ignore,
) -> ConversionReport:
    """Converts most layers to small sliding windows and keeps a few full layers.

    The conversion edits the layout and copies the weights; with `gate` it compares the result with the source.
    The report's `planner` is the choice of full layers where it was measured (full_layers "auto" or "retrieval").

    hybrid        a preset, a YAML file or a pattern of S, N, F
    full_layers   layers counted from 0, "odd", "even", "last"; "auto" searches by measuring layouts; "retrieval" takes
                  the layers with the strongest retrieval heads
    model_class   the output's model_type, such as "granite_swa"
    sinks         "auto" (fitted where the class has sinks and the model needs them) or "none"
    calibration   text for full_layers "auto" and "retrieval" and for sinks, such as a file; None: the embedded corpus
    """
    from ctxext.retrofit.conversion import choose_full_layers, plan_layers, planned_conversion, write_conversion

    plan = planned_conversion(request, _path(out), allow_pickle=allow_pickle, force=force)
    chosen = choose_full_layers(plan, plan_layers(plan, request), say, progress)
    report = write_conversion(
        plan, chosen, calibration=request.calibration, gate=request.gate, force=force, say=say, progress=progress
    )
    return replace(report, planner=chosen)


def on_rank_0(function: Callable[..., FinetuneReport]) -> Callable[..., FinetuneReport]:
    """Lets rank 0 of processes that another program started call `function`; the other ranks follow it.

    Every rank reaches `follow` or `leading` before it reads its arguments: an error before that would leave the others
    waiting. The arguments of the other ranks are not used.
    """

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> FinetuneReport:
        from ctxext.train.ranks import started_rank
        from ctxext.train.shared_run import follow, leading

        started = started_rank()
        if started is not None and started.rank > 0:
            return follow(started)
        with leading(started, keywords.get("say", ignore)):
            return function(*arguments, **keywords)

    return call


@on_rank_0
@accepts(FinetuneRequest)
def finetune(
    request: FinetuneRequest,
    *,
    out: Where | None = None,
    resume: bool = False,
    repeat: Where | None = None,
    force: bool = False,
    say: Say = ignore,
    on_plan: OnPlan = ignore,
    on_step: OnStep = ignore,
) -> FinetuneReport:
    """Trains a model at a longer context and returns the report.

    `ctx` may be stages, such as "8k,32k"; `settings` are fields of the spec by dotted path. `resume` continues the
    unfinished run at `out`, or the newest one. If a model is given, model and settings must be those that the run
    started with. Without a model, changed settings need `force`, and so does changed data. `repeat` is a run whose
    model, data and spec a new run has. `on_plan` gets the plan before training starts. The report's `finished` is False
    for a run that was stopped.

    Under torchrun, srun and the like, every process makes the same call. The ranks other than 0 take the run from rank
    0 (train/shared_run.py), and raise NoSharedRun where it has none. The process group stays for further calls:
    `end_ranks` ends it.
    """
    from ctxext.finetuning import plan_finetune, prepared_directory
    from ctxext.train.launch import check_environment, launch_run
    from ctxext.train.ranks import started_rank
    from ctxext.train.shared_run import share_run

    started = started_rank()
    planned = plan_finetune(request, out=_path(out), resume=resume, repeat=_path(repeat), force=force, say=say)
    on_plan(planned)
    plan, run, launch = planned.plan, planned.directory, planned.launch
    with prepared_directory(planned, force):
        if launch is not None and started is None:
            # The processes start before the import below, so that this one holds no torch while they train.
            fields = launch_run(run, launch, say, on_step)
            from ctxext.train.finetune import FinetuneReport

            return FinetuneReport(**fields)
        if launch is not None:
            check_environment(launch)
        from ctxext.train.finetune import run_finetune
        from ctxext.train.loop import Events

        if launch is not None and started is not None:
            # This process is rank 0 of ranks that another program started.
            share_run(started, run, launch)
        zero = launch.zero if launch is not None else None
        return run_finetune(plan, run, resume=resume, events=Events(say, on_step), zero=zero)


@accepts(FinetuneRequest)
def plan_finetune(
    request: FinetuneRequest,
    *,
    out: Where | None = None,
    resume: bool = False,
    repeat: Where | None = None,
    force: bool = False,
    say: Say = ignore,
) -> PlannedRun | None:
    """Returns the plan of a run with every derived number, and trains nothing. It needs no weights.

    None on a rank other than 0 of processes that another program started: rank 0 has the plan.
    """
    from ctxext.finetuning import plan_finetune as planned_run
    from ctxext.train.ranks import started_rank

    started = started_rank()
    if started is not None and started.rank > 0:
        return None
    return planned_run(
        request, out=_path(out), resume=resume, repeat=_path(repeat), force=force, needs_weights=False, say=say
    )


@accepts(FinetuneRequest)
def find_multiplier(
    request: FinetuneRequest,
    *,
    out: Where | None = None,
    force: bool = False,
    say: Say = ignore,
    on_plan: OnPlan = ignore,
    on_step: OnStep = ignore,
    on_trial: Callable[[Trial], None] = ignore,
) -> FoundMultiplier:
    """Trains a few steps at several values of lora.multiplier and returns their held-out losses and the best.

    Without `steps` a trial has 30. `on_trial` gets each finished trial.
    """
    from ctxext.multiplier_search import search
    from ctxext.train.ranks import started_rank

    if (started := started_rank()) is not None:
        raise InputError(f"--find-multiplier uses one process: start it without {started.starter}")
    return search(request, _path(out), force, say=say, on_plan=on_plan, on_step=on_step, on_trial=on_trial)


def end_ranks() -> None:
    """Waits for the other ranks of the last run and ends the process group, where another program started them."""
    from ctxext.train.ranks import leave, started_rank

    if started_rank() is not None:
        leave()


@accepts(EvalRequest)
def evaluate(
    request: EvalRequest,
    *,
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

    given = request.models
    if given is None:
        given = _newest("MODEL", ("conversion", "model", "finetune", "merge"), say)
    models = [given] if isinstance(given, str) else list(given)
    plan = plan_eval(models, request.suite, eval_fields(request), against=request.against, out=_path(out), force=force)
    if plan.resumes:
        say(f"resuming the unfinished evaluation of the same request in {plan.out}")
    report = eval_models(plan, force=force, progress=progress, notice=say)
    say(f"written to {plan.out}")
    return report


@accepts(ProbeRequest)
def probe(
    request: ProbeRequest,
    *,
    out: Where | None = None,
    force: bool = False,
    say: Say = ignore,
    progress: Progress = ignore,
) -> ProbeReport:
    """Runs probes on a model, and on `compare` if given; writes probes.json, figures and a manifest."""
    from ctxext.probes.plan_probes import plan_probe

    names = [request.names] if isinstance(request.names, str) else list(request.names)
    plan = plan_probe(request.model, names, probe_fields(request), preset=request.preset, compare=request.compare,
                      out=_path(out), force=force)  # fmt: skip
    # Imported only now: the plan is checked without torch.
    from ctxext.probes import run_probes

    report = run_probes.measure(plan, progress, say)
    pictures = run_probes.write(plan, report)
    say(f"written to {plan.out}: {', '.join(['probes.json', *pictures])}")
    return report


@accepts(MergeRequest)
def merge(request: MergeRequest, *, out: Where | None = None, force: bool = False, say: Say = ignore) -> MergeReport:
    """Merges an adapter, in fp32, into an ordinary Hugging Face directory, and checks that nothing is lost."""
    from ctxext.eval_and_merge import merge_run, plan_merge

    run = _newest("RUN", ("finetune",), say) if request.run is None else request.run
    plan = plan_merge(run, _path(out), request.dtype, force, alpha_multiplier=request.alpha_multiplier,
                      nope_scale=request.nope_scale, length=request.length, data=request.data,
                      restore=request.restore)  # fmt: skip
    return merge_run(plan, notice=say)


@accepts(ExportRequest)
def export_model(request: ExportRequest, *, out: Where | None = None, force: bool = False) -> Exported:
    """Exports a merged run or a model for another program: `target` is hf, vllm, gguf or ollama.

    Raises CheckFailed where the target would not honour its exact windows and NoPE layers.
    """
    from ctxext.export.write import export, plan_export

    return export(plan_export(request.model, request.target, _path(out), force))


@accepts(ExportRequest)
def check_export(request: ExportRequest, *, out: Where | None = None, force: bool = False) -> Verdict:
    """Returns whether a target supports the model, and why not. Writes nothing.

    Raises InputError where `out` exists, unless `force`.
    """
    from ctxext.export.write import plan_export

    return plan_export(request.model, request.target, _path(out), force).verdict


@accepts(ChatRequest)
def chat(request: ChatRequest, *, progress: Progress = ignore) -> Conversation:
    """Returns a conversation with a model, which is loaded: call `ask(text)` for each turn, `reset()` to start again.

    chat   whether to use the chat template; None: if the tokenizer has one
    dtype  None: bfloat16 on a GPU, else float32
    """
    from ctxext.generation import Conversation, plan_generation

    settings = {one.name: getattr(request, one.name) for one in fields(ChatRequest)}
    plan = plan_generation(settings.pop("model"), **settings)
    progress("loading", 0, 1)
    return Conversation(plan)


@accepts(GenerateRequest)
def generate(
    request: GenerateRequest, *, write: Callable[[str], None] = ignore, say: Say = ignore, progress: Progress = ignore
) -> GeneratedAnswer:
    """Returns the continuation of a prompt or of a long file; `write` gets each piece of it as it is generated.

    prompt    text to continue
    file      a text file to continue, instead of a prompt
    question  text that is added after the file
    """
    from ctxext.generation import read_prompt

    text = read_prompt(request.prompt, request.file, request.question)
    return chat(request, progress=progress).ask(text, write=write, progress=progress, warn=say)


def doctor(model: Where | None = None) -> dict[str, list[Finding]]:
    """Returns the findings about the environment and, under its name, about a model or run, each with its remedy."""
    from ctxext.doctor import model as models
    from ctxext.doctor.environment import environment

    return {"environment": environment()} | ({} if model is None else {str(model): models.model(str(model))})


@accepts(ReportRequest)
def write_report(request: ReportRequest, *, out: Where | None = None, force: bool = False) -> Report:
    """Writes evaluations, probes and training runs into one HTML file that needs no network."""
    require("matplotlib", "a report")
    from ctxext.report.page import plan_report
    from ctxext.report.page import write_report as write

    given = [request.runs] if isinstance(request.runs, str) else request.runs
    return write(plan_report([Path(run) for run in given], out=_path(out), title=request.title, force=force))


@accepts(VerifyRequest)
def verify(
    request: VerifyRequest,
    *,
    out: Where | None = None,
    force: bool = False,
    say: Say = ignore,
    progress: Progress = ignore,
) -> Certificate:
    """Measures which tokens a model's attention sees, layer by layer, as it runs, and writes the certificate.

    It returns the certificate even where checks failed (`certificate.failed`).
    """
    from ctxext.evals.verify import plan_launch, write_certificate
    from ctxext.evals.verify import verify as measure

    ctx = None if request.ctx is None else parse_tokens(request.ctx)
    launch = plan_launch(request.model, ctx=ctx, attention=request.attention)
    # Check the output before the measurement, which takes long.
    place = _path(out) or manifests.default_out("verify", launch.source.name)
    check_free(place, force, keep=launch.source.paths)
    found = measure(launch, progress=progress)
    write_certificate(found, launch, place, force=force)
    say(f"written to {place}")
    return replace(found, out=str(place))


def _newest(what: str, kinds: tuple[str, ...], say: Say) -> str:
    """The newest output of these kinds under ./runs, for an argument that was left out."""
    found = str(manifests.newest(manifests.RUNS, kinds))
    say(f"no {what} given; using the newest, {found}")
    return found


def _path(given: Where | None) -> Path | None:
    return None if given is None else Path(given)
