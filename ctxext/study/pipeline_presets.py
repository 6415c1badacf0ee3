"""Validates presets by reading them in the same way as the commands do. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from ctxext.config import presets
from ctxext.config.loader import build
from ctxext.errors import CtxextError, SpecError
from ctxext.requests import ConvertRequest, EvalRequest, FinetuneRequest, ProbeRequest
from ctxext.study import steps
from ctxext.study.pipeline import read_pipeline


def _pretrain(name: str) -> Any:
    from ctxext.train.pretrain import PretrainSpec

    found = presets.find("pretrain", name)
    return build(PretrainSpec, found.data, source=str(found.path))


def _probe(name: str) -> Any:
    return steps.resolved("probe", ProbeRequest(model="tiny", preset=name))


READ: dict[str, Callable[[str], Any]] = {
    "models": lambda name: presets.model_preset(presets.find("models", name)),
    "hybrid": lambda name: steps.resolved("convert", ConvertRequest(model="tiny", hybrid=name)),
    "finetune": lambda name: steps.resolved("finetune", FinetuneRequest(model="tiny", preset=name)),
    "pretrain": _pretrain,
    "eval": lambda name: steps.resolved("eval", EvalRequest(models="tiny", suite=name)),
    "probe": _probe,
    "pipelines": read_pipeline,
}


def validated(name: str | None = None) -> list[tuple[str, list[str]]]:
    """Returns (KIND/NAME, faults) for one preset, or for all presets where `name` is None."""
    given = [presets.parted(name)] if name else [(kind, one) for kind in presets.KINDS for one in presets.names(kind)]
    return [(f"{kind}/{one}", _faults(kind, one)) for kind, one in given]


def differences(name: str) -> list[tuple[str, Any, Any]]:
    """Returns the fields of a finetune preset that differ from the preset `lora-alpha`, the default.

    Each is (dotted path, the preset's value, the default value; None where the default has no such field).
    """
    meant, default = (
        dict(_flat(asdict(steps.resolved("finetune", FinetuneRequest(model="tiny", preset=preset)))))
        for preset in (name, "lora-alpha")
    )
    return [(path, value, default.get(path)) for path, value in meant.items() if value != default.get(path)]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _faults(kind: str, name: str) -> list[str]:
    try:
        READ[kind](name)
    except SpecError as error:
        return list(error.faults)
    except CtxextError as error:
        return [error.message]
    return []
