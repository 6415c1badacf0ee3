"""Runs probes on models, one model in memory at a time, and writes findings as JSON, pictures and a manifest."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import TypeAdapter

from ctxext.config import manifest as manifests
from ctxext.config.output import staged_output
from ctxext.data.files import distinct, recorded
from ctxext.errors import EnvironmentFault, ModelError
from ctxext.extras import can_draw
from ctxext.machine.memory import is_out_of_memory
from ctxext.probes import (
    attention_distance,
    gradient_influence,
    layer_niah,
    positions,
    qk_distance,
    receptive_field,
    retrieval_heads,
    retrieval_trace,
)
from ctxext.probes.plan_probes import ProbePlan
from ctxext.probes.probe_finding import ProbeFinding, ProbeReport, ProbeResult
from ctxext.probes.subject import Subject
from ctxext.progress import CountProgress, Progress, ignore

RESULTS = "probes.json"
MEASURES: dict[str, Callable[[Subject, Any, CountProgress], ProbeFinding]] = {
    "receptive-field": receptive_field.measure,
    "layer-niah": layer_niah.measure,
    "gradient-influence": gradient_influence.measure,
    "retrieval-heads": retrieval_heads.measure,
    "retrieval-trace": retrieval_trace.measure,
    "qk-distance": qk_distance.measure,
    "attention-distance": attention_distance.measure,
    "positions": positions.measure,
}


def measure(
    plan: ProbePlan, progress: Progress = ignore, notice: Callable[[str], None] = lambda _: None
) -> ProbeReport:
    """Runs every probe of the plan on each of its models; writes nothing.

    Calls `progress(what, done, in all)` and `notice(line)` while it runs. Raises EnvironmentFault where memory runs
    out.
    """
    began, found = time.monotonic(), list[list[ProbeFinding]]()
    can_draw(notice, "a picture of each probe")
    names = _names(plan)
    if plan.left_out:
        notice(plan.left_out)
    for name, source in zip(names, plan.sources, strict=True):
        subject = Subject(source, plan.spec.dtype)
        found.append([])
        for spec in plan.spec.probes:

            def count(done: int, total: int, what: str = f"{name} {spec.probe}") -> None:
                progress(what, done, total)

            count(0, 1)
            with recorded() as began_reading:
                finding = _in_memory(subject, spec, count)
            read = distinct(began_reading)
            if read:
                finding = replace(finding, facts=finding.facts | {"read": [one.as_dict() for one in read]})
            found[-1].append(finding)
            for line in (line for one in read for line in one.lines()):
                notice(f"{name}, {spec.probe}: {line}")
            for note in found[-1][-1].notes:
                notice(f"{name}, {spec.probe}: {note}")
        # Free this model before the next one is loaded.
        del subject
        gc.collect()
    results = [
        ProbeResult(spec.probe, _plain(asdict(spec)), tuple(of_model[i] for of_model in found))
        for i, spec in enumerate(plan.spec.probes)
    ]
    layouts = tuple("".join(kind.letter for kind in source.kinds) for source in plan.sources)
    return ProbeReport(tuple(names), layouts, time.monotonic() - began, tuple(results))


def write(plan: ProbePlan, report: ProbeReport) -> list[str]:
    """Writes probes.json, a PNG per picture, and ctxext.json last, all or nothing. Returns the pictures' names."""
    with staged_output(plan.out, plan.force) as place:
        (place / RESULTS).write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n", "utf-8")
        # Draw from the file, as `ctxext report` does later, so that both give the same pictures.
        read = TypeAdapter(ProbeReport).validate_json((place / RESULTS).read_bytes())
        pictures: list[str] = []
        if find_spec("matplotlib") is not None:
            from ctxext.report.panels import draw

            pictures = [drawn.path.name for drawn in draw(read, place)]
        parents = {f"model {i}": manifests.parent(source.directory) for i, source in enumerate(plan.sources)}
        facts = {"seconds": report.seconds, "pictures": pictures}
        manifests.write(place, manifests.new("probe", spec=_plain(asdict(plan.spec)), parents=parents, facts=facts))
    return pictures


def _in_memory(subject: Subject, spec: Any, progress: CountProgress) -> ProbeFinding:
    """Runs one probe.

    Raises EnvironmentFault with a hint where memory runs out, ModelError for a number that is not finite.
    """
    try:
        finding = MEASURES[spec.probe](subject, spec, progress)
        # Fails here, with the probe's name, rather than when the report is written.
        json.dumps(asdict(finding), allow_nan=False)
        return finding
    except ValueError as error:
        if "JSON compliant" not in str(error):
            raise
        raise ModelError(
            f"{spec.probe}: {subject.source.name} gives numbers that are not finite",
            hint="probe the model in float32; if it is float32 already, its weights may have NaN",
        ) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"out of memory in {spec.probe} of {subject.source.name}: {' '.join(str(error).split())[:200]}",
            hint="give a smaller --length or --samples, or --dtype bfloat16",
        ) from error
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _names(plan: ProbePlan) -> list[str]:
    """Returns one name for each model; equal names get their directory in front, then a number."""
    names = [source.name for source in plan.sources]
    if len(set(names)) < len(names):
        names = ["/".join(source.directory.absolute().parts[-2:]) for source in plan.sources]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data))
