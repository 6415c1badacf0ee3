"""The steps that a pipeline may have: commands of api.py, each with its request (requests.py). No torch.

A step does not name its output directory: the pipeline does. `settings` are fields by dotted path, as in `--set`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ctxext.config import presets
from ctxext.config.loader import build, set_value
from ctxext.errors import CtxextError, SpecError
from ctxext.requests import (
    ConvertRequest,
    EvalRequest,
    ExportRequest,
    FinetuneRequest,
    MergeRequest,
    PlanRequest,
    ProbeRequest,
    ReportRequest,
    eval_fields,
    probe_fields,
)

if TYPE_CHECKING:
    from ctxext.evals.eval_spec import EvalSpec
    from ctxext.probes.probe_spec import ProbeSpec
    from ctxext.train.finetune_spec import FinetuneSpec

REQUESTS: dict[str, type] = {
    "plan": PlanRequest,
    "convert": ConvertRequest,
    "finetune": FinetuneRequest,
    "eval": EvalRequest,
    "probe": ProbeRequest,
    "merge": MergeRequest,
    "export": ExportRequest,
    "report": ReportRequest,
}
# Arguments that a request may leave out and a step may not: a pipeline never takes the newest output under ./runs.
NAMED = {"plan": "ctx", "finetune": "model", "eval": "models", "merge": "run"}
MODELS = {"model", "models", "run", "runs", "compare", "against", "evaluator"}  # arguments that name models and runs


def read(command: str, arguments: dict[str, Any], source: str) -> Any:
    """Returns the request of a step from its arguments. Raises SpecError with every fault."""
    needed = NAMED.get(command)
    missing = [f"{needed}: missing; it has no default"] if needed is not None and arguments.get(needed) is None else []
    try:
        request = build(REQUESTS[command], arguments, source=source)
    except SpecError as error:
        raise SpecError(source, [*missing, *error.faults]) from None
    if missing:
        raise SpecError(source, missing)
    return request


def faults(command: str, step: Any) -> list[str]:
    """Returns the faults of a step's presets and fields. Models are not read: they may not exist yet."""
    try:
        resolved(command, step)
    except SpecError as error:
        return list(error.faults)
    except CtxextError as error:
        return [error.message]
    return []


def resolved(command: str, step: Any) -> Any:
    """Returns the spec of a step with its presets read; None for a command whose arguments name no preset."""
    return RESOLVED[command](step) if command in RESOLVED else None


def _convert(step: ConvertRequest) -> Any:
    from ctxext.model.layout import find_hybrid

    return find_hybrid(step.hybrid, step.sliding_window)


def _finetune(step: FinetuneRequest) -> FinetuneSpec:
    """The spec of a finetune step. Without a ctx it gets 2**30: a healing run takes the model's ctx at its start."""
    from ctxext.train.finetune_spec import FinetuneSpec
    from ctxext.train.run_directory import option_fields

    # Later entries replace earlier ones: the default, the preset, the arguments of the step, `settings`.
    fields: dict[str, Any] = {"ctx": 1 << 30} | dict(presets.find("finetune", step.preset).data)
    for key, value in (option_fields(step.ctx, step.data, step.steps, step.original_length) | step.settings).items():
        set_value(fields, key, value)
    return build(FinetuneSpec, fields, source="finetune")


def _evaluate(step: EvalRequest) -> EvalSpec:
    from ctxext.evals.eval_spec import eval_spec_from_options

    return eval_spec_from_options(step.suite, eval_fields(step))


def _probe(step: ProbeRequest) -> ProbeSpec:
    from ctxext.probes.probe_spec import PROBES, probe_spec_from_options

    names = [step.names] if isinstance(step.names, str) else list(step.names)
    return probe_spec_from_options(list(PROBES) if names == ["all"] else names, probe_fields(step), preset=step.preset)


def _plan(step: PlanRequest) -> FinetuneSpec:
    return _finetune(FinetuneRequest(model=step.model, ctx=step.ctx, preset=step.preset, settings=step.settings))


RESOLVED: dict[str, Callable[[Any], Any]] = {
    "plan": _plan,
    "convert": _convert,
    "finetune": _finetune,
    "eval": _evaluate,
    "probe": _probe,
}
