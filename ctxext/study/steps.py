"""The steps that a pipeline may have: commands of api.py, each with its arguments as a spec. No torch.

A step does not name its output directory: the pipeline does. `settings` are fields by dotted path, as in `--set`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, field
from typing import TYPE_CHECKING, Any

from ctxext.config import presets
from ctxext.config.loader import build, set_value, spec
from ctxext.errors import CtxextError, SpecError

if TYPE_CHECKING:
    from ctxext.evals.eval_spec import EvalSpec
    from ctxext.probes.probe_spec import ProbeSpec
    from ctxext.train.finetune_spec import FinetuneSpec

Length = str | int  # tokens, as a number or as text such as "32k"

# Each spec below has the arguments of the function in api.py with the name of its command. Output, callbacks and
# `force` are left out, since the pipeline gives them.


@spec
class PlanStep:
    """The arguments of a `plan` step."""

    model: str
    ctx: Length
    hybrid: str | None = None
    gpu: str | None = None
    memory: str | None = None
    gpus: int = 1
    preset: str = "lora-alpha"
    settings: dict[str, Any] = field(default_factory=dict)


@spec
class ConvertStep:
    """The arguments of a `convert` step."""

    model: str
    hybrid: str
    full_layers: str | None = None
    budget: str | int | None = None
    length: Length | None = None
    calibration: str | None = None
    calibration_tokens: Length | None = None
    i_know: bool = False
    sliding_window: int | None = None
    model_class: str = "auto"
    sinks: str = "auto"
    dtype: str | None = None
    gate: bool = True


@spec
class FinetuneStep:
    """The arguments of a `finetune` step."""

    model: str
    ctx: Length | None = None
    preset: str = "lora-alpha"
    data: str | None = None
    steps: int | None = None
    original_length: Length | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    zero: str | None = None
    nproc: int | None = None
    hostfile: str | None = None


@spec
class EvaluateStep:
    """The arguments of a `eval` step."""

    models: tuple[str, ...] | str
    suite: str = "perplexity"
    lengths: tuple[Length, ...] | Length | None = None
    against: str | None = None
    data: str | None = None
    text_field: str | None = None
    protocol: str | None = None
    evaluator: str | None = None
    limit: Length | None = None
    seed: int | None = None
    dtype: str | None = None
    extrapolate: bool = False
    nope_log_scale: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@spec
class ProbeStep:
    """The arguments of a `probe` step."""

    model: str
    names: tuple[str, ...] | str = "all"
    compare: str | None = None
    preset: str | None = None
    length: Length | None = None
    samples: int | None = None
    ablate: int | None = None
    data: str | None = None
    seed: int | None = None
    dtype: str | None = None
    extrapolate: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@spec
class MergeStep:
    """The arguments of a `merge` step."""

    run: str
    dtype: str | None = None
    alpha_multiplier: str | float | None = None
    nope_scale: str | float | None = None
    length: Length | None = None
    data: str | None = None
    restore: str | None = None


@spec
class ExportStep:
    """The arguments of a `export` step."""

    model: str
    target: str = "hf"


@spec
class ReportStep:
    """The arguments of a `report` step."""

    runs: tuple[str, ...] | str
    title: str | None = None


SPECS: dict[str, type] = {
    "plan": PlanStep,
    "convert": ConvertStep,
    "finetune": FinetuneStep,
    "eval": EvaluateStep,
    "probe": ProbeStep,
    "merge": MergeStep,
    "export": ExportStep,
    "report": ReportStep,
}
MODELS = {"model", "models", "run", "runs", "compare", "against", "evaluator"}  # arguments that name models and runs


def read(command: str, arguments: dict[str, Any], source: str) -> Any:
    """Builds the spec of a step from its arguments. Raises SpecError with every fault."""
    return build(SPECS[command], arguments, source=source)


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


def _convert(step: ConvertStep) -> Any:
    from ctxext.model.layout import find_hybrid

    return find_hybrid(step.hybrid, step.sliding_window)


def _finetune(step: FinetuneStep) -> FinetuneSpec:
    """The spec of a finetune step. Without a ctx it gets 2**30: a healing run takes the model's ctx at its start."""
    from ctxext.train.finetune_spec import FinetuneSpec
    from ctxext.train.run_directory import option_fields

    # Later entries replace earlier ones: the default, the preset, the arguments of the step, `settings`.
    fields: dict[str, Any] = {"ctx": 1 << 30} | dict(presets.find("finetune", step.preset).data)
    for key, value in (option_fields(step.ctx, step.data, step.steps, step.original_length) | step.settings).items():
        set_value(fields, key, value)
    return build(FinetuneSpec, fields, source="finetune")


def _evaluate(step: EvaluateStep) -> EvalSpec:
    from ctxext.evals.eval_spec import eval_fields, eval_spec_from_options

    given = {
        name: value for name, value in asdict(step).items() if name not in ("models", "suite", "against", "settings")
    }
    return eval_spec_from_options(step.suite, eval_fields(given) | step.settings)


def _probe(step: ProbeStep) -> ProbeSpec:
    from ctxext.evals.eval_spec import set_arguments
    from ctxext.probes.probe_spec import PROBES, probe_spec_from_options

    given = {
        name: value
        for name, value in asdict(step).items()
        if name not in ("model", "names", "compare", "preset", "settings")
    }
    names = [step.names] if isinstance(step.names, str) else list(step.names)
    return probe_spec_from_options(
        list(PROBES) if names == ["all"] else names, set_arguments(given) | step.settings, preset=step.preset
    )


def _plan(step: PlanStep) -> FinetuneSpec:
    return _finetune(FinetuneStep(model=step.model, ctx=step.ctx, preset=step.preset, settings=step.settings))


RESOLVED: dict[str, Callable[[Any], Any]] = {
    "plan": _plan,
    "convert": _convert,
    "finetune": _finetune,
    "eval": _evaluate,
    "probe": _probe,
}
