"""A checked plan of probes: the models, what is requested, and where it is written. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free
from ctxext.data import documents
from ctxext.errors import EnvironmentFault, InputError
from ctxext.evals.eval_spec import LongPpl
from ctxext.evals.haystacks import GRASS
from ctxext.evals.longppl import check as check_evaluator
from ctxext.evals.suite import check_length
from ctxext.model.companions import require_tokenizer
from ctxext.model.source import ModelSource, resolve
from ctxext.probes.probe_spec import (
    KEEP_CHECKPOINTS,
    LONGEST,
    PROBES,
    RUN_PROBES,
    SHORTEST,
    ProbeSpec,
    probe_spec_from_options,
)


@dataclass(frozen=True)
class ProbePlan:
    """The model, then the earlier one that it is compared with, if any; `spec` has every length filled in.

    left_out  what `all` left out and why, in words; empty where it left out nothing
    """

    sources: tuple[ModelSource, ...]
    spec: ProbeSpec
    out: Path
    force: bool
    left_out: str = ""


def plan_probe(
    model: str,
    names: list[str],
    given: dict[str, Any] | None = None,
    *,
    preset: str | None = None,
    compare: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> ProbePlan:
    """Finds the models and reads the request; `names` may be ["all"], which takes probes of a run only for runs.

    Raises InputError and ModelError for what arguments and files can decide, EnvironmentFault where scikit-learn is
    needed and missing.
    """
    sources = tuple(resolve(name) for name in (model, *([compare] if compare else [])))
    for source in sources:
        require_tokenizer(source.directory)
    if "all" in names and len(names) > 1:
        raise InputError(f"{' '.join(names)}: give `all` alone, or the names of probes")
    left_out = ""
    if names == ["all"]:
        names, left_out = _all(sources)
    # A named probe must fit every model; `all` has left out those that do not.
    for name, source in product(names, sources):
        if lack := _lack(name, source):
            raise InputError(f"{name} needs a training run, and {source.name} {lack[0]}", hint=lack[1])
    spec = probe_spec_from_options(names, given or {}, preset=preset)
    spec = replace(spec, probes=tuple(_filled(probe, sources, spec.extrapolate) for probe in spec.probes))
    if any(probe.probe == "layer-niah" for probe in spec.probes):
        _scikit_learn_is_there()
    out = out or manifests.default_out("probe", names[0] if len(names) == 1 else sources[0].name)
    check_free(out, force, keep=[path for source in sources for path in source.paths])
    return ProbePlan(sources, spec, out, force, left_out)


def _all(sources: tuple[ModelSource, ...]) -> tuple[list[str], str]:
    """Returns the probes that every model supports, and a line that lists the others and why."""
    left_out_by_reason: dict[str, list[str]] = {}
    for name in PROBES:
        found = next(((source, why) for source in sources if (why := _lack(name, source))), None)
        if found is not None:
            left_out_by_reason.setdefault(f"{found[0].name} {found[1][0]}", []).append(name)
    # Probes with the same reason share one entry of the line.
    without = [name for names in left_out_by_reason.values() for name in names]
    why = "; ".join(f"{' and '.join(names)} ({why})" for why, names in left_out_by_reason.items())
    return [name for name in PROBES if name not in without], f"all leaves out {why}" if why else ""


def is_run(source: ModelSource) -> bool:
    """Returns whether a model is the result of a finetune run, of adapters or of all weights of another model."""
    made = source.manifest
    return made is not None and (made.kind == "finetune" or (made.kind == "model" and "source" in made.parents))


def result_step(source: ModelSource) -> int:
    """Returns the step of a run whose weights are its result."""
    facts = source.manifest.facts if source.manifest else {}
    return int(facts.get("result_step") or facts.get("steps") or 0)


def _lack(name: str, source: ModelSource) -> tuple[str, str] | None:
    """Returns what a model lacks for the probe, and a hint; None where it lacks nothing."""
    if name not in RUN_PROBES:
        return None
    if not is_run(source):
        return "is not a finetune run", "name the directory of a finetune run"
    # The checkpoint of the result's own step adds nothing to the result.
    result = f"step-{result_step(source):06d}"
    between = [path for path in source.directory.glob("checkpoints/step-*") if path.name != result]
    if name == "retrieval-trace" and not between:
        return ("has no checkpoints left", KEEP_CHECKPOINTS)
    return None


def _filled(probe: Any, sources: tuple[ModelSource, ...], extrapolate: bool) -> Any:
    """Returns the probe with its length filled in, after checking its text and that every model supports the length."""
    if hasattr(probe, "data") and probe.data not in (documents.EMBEDDED, GRASS):
        documents.read_documents(probe.data)
    if not hasattr(probe, "length"):
        return probe
    length = probe.length or min(LONGEST, *(source.usable_length for source in sources))
    if length < SHORTEST:
        raise InputError(f"{probe.probe}: length {length} is less than {SHORTEST} tokens")
    if getattr(probe, "last", 1) > length:
        raise InputError(f"{probe.probe}: last {probe.last} positions of {length:,} tokens")
    for source in sources:
        check_length(source, max(length, *(getattr(probe, "lengths", None) or (0,))), extrapolate)
        _heads_are_there(probe, source)
    if probe.probe == "receptive-field":
        _loss_can_be_measured(probe, length)
    return replace(probe, length=length)


def _heads_are_there(probe: Any, source: ModelSource) -> None:
    """Raises InputError where a model has too few heads to mask or follow.

    Masking needs as many other heads as control.
    """
    heads = source.shape.num_layers * source.shape.num_heads
    ablated, followed = getattr(probe, "ablate", None) or 0, getattr(probe, "heads", 0)
    if 2 * ablated > heads:
        raise InputError(
            f"{probe.probe}: ablate {ablated} needs two sets of as many heads, the top ones and random others; "
            f"{source.name} has {heads} heads",
            hint=f"give at most {heads // 2}",
        )
    if followed > heads:
        raise InputError(f"{probe.probe}: heads is {followed}; {source.name} has only {heads} heads")


def _loss_can_be_measured(probe: Any, length: int) -> None:
    if probe.data == GRASS:
        raise InputError(
            "receptive-field measures the loss of its text; repeated sentences are not suitable",
            hint="give another text in --data, or leave it out; --set layer-niah.data=grass sets one probe alone",
        )
    if probe.evaluator is not None:
        check_evaluator(LongPpl(evaluator=probe.evaluator, lengths=(length,), data=probe.data))


def _scikit_learn_is_there() -> None:
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise EnvironmentFault(
            "layer-niah needs scikit-learn, which is not installed",
            hint="install ctxext[probe], or leave layer-niah out",
        )
