"""What the steps of a pipeline read, looked for before the first of them runs: what is not there would else be missed
when the steps before have done their work. No torch.

Not looked for: models (of the hub they would be fetched), and what a step before makes or is to name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ctxext.data.documents import EMBEDDED, SELF, fingerprint
from ctxext.errors import CtxextError, EnvironmentFault, SpecError
from ctxext.evals.haystacks import GRASS
from ctxext.study import steps
from ctxext.study.flow import references
from ctxext.study.pipeline import Job, Pipeline
from ctxext.study.trust import check_inside

Read = tuple[str, str | None, Callable[[], Any]]  # an argument; the text it gives; what refuses that as its step would


def check_inputs(pipeline: Pipeline, out: Path, *, begin: str | None, trusted: bool) -> None:
    """Refuse a pipeline whose text is not there, each with its step's path. Raises SpecError; InputError for a path of
    an untrusted one that leads out; EnvironmentFault for what a suite needs and the machine has not."""
    faults: dict[str, str | None] = {}
    first = 0 if begin is None else pipeline.steps.index(begin)
    for job in pipeline.jobs:
        step = _known(job) if pipeline.steps.index(job.step) >= first else None
        if step is None:
            continue
        if not trusted:
            check_inside(job, step, out)
        for name, text, check in _reads(job.command, step):
            if text is not None and (
                next(references(text), None) or Path(text).absolute().is_relative_to(out.absolute())
            ):
                continue
            try:
                check()
            except EnvironmentFault:
                raise
            except CtxextError as error:
                faults[f"steps.{job.step}.{name}: {error.message}"] = error.hint
    if faults:
        raise SpecError(pipeline.name, list(faults), hint=next(iter(faults.values())))


def _known(job: Job) -> Any:
    """The job's spec without the arguments that wait for a step's number; None where it is none without these."""
    later = {name for name, value in job.arguments.items() if next(references(value), None)} - steps.MODELS
    try:
        step = steps.read(job.command, {k: v for k, v in job.arguments.items() if k not in later}, source=job.id)
        steps.resolved(job.command, step)
    except CtxextError:
        return None
    return step


def _reads(command: str, step: Any) -> Iterator[Read]:
    meant = steps.resolved(command, step)
    if command == "finetune":
        for part in meant.data.parts:
            if part.source not in (EMBEDDED, SELF):
                check = partial(fingerprint, part.source, text_field=part.text_field, format=part.format)
                yield "data", part.source, check
    elif command == "eval":
        for suite in meant.suites:
            yield from _of_suite(suite)
    elif command == "probe":
        texts = {getattr(probe, "data", EMBEDDED) for probe in meant.probes} - {EMBEDDED, GRASS}
        yield from (("data", text, partial(fingerprint, text)) for text in sorted(texts))
    for name in ("calibration", "data") if command in ("convert", "merge") else ():
        if (text := getattr(step, name, None)) not in (None, EMBEDDED):
            yield name, text, partial(fingerprint, text)


def _of_suite(suite: Any) -> Iterator[Read]:
    from ctxext.data.ruler import file_hash
    from ctxext.evals.suites import CHECKS

    if suite.suite in ("longbench", "short"):  # whose checks go by no length
        name = "data" if suite.suite == "longbench" else "include"
        yield name, getattr(suite, name), partial(CHECKS[suite.suite], suite)
        return
    made = getattr(suite, "from_cases", None) is None
    if made and suite.data not in (EMBEDDED, GRASS):
        yield "data", suite.data, partial(fingerprint, suite.data, text_field=suite.text_field)
    for name in ("squad", "hotpotqa") if made else ("from_cases",):
        if (path := getattr(suite, name, None)) is not None:
            yield name, path, partial(file_hash, path)
