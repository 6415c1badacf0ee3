"""Checks that the text which steps read exists, before the first step runs. No torch.

Without this check a step would fail only after the steps before it have done their work.

Not checked: models (those of the hub would be downloaded), and inputs that an earlier step writes or names.
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
from ctxext.study.pipeline import Pipeline, PipelineJob
from ctxext.study.trust import check_inside

Read = tuple[str, str | None, Callable[[], Any]]  # argument name; its value; a check that raises what the step would


def check_inputs(pipeline: Pipeline, out: Path, *, begin: str | None, trusted: bool) -> None:
    """Checks the inputs of the steps from `begin` on (None: all steps).

    Raises SpecError with all missing inputs, each with the path of its step; InputError where `trusted` is False and
    a path leads out of the working directory; EnvironmentFault where the machine lacks what a suite needs.
    """
    faults: dict[str, str | None] = {}
    # Steps before `begin` do not run again, so their inputs may be gone.
    first = 0 if begin is None else pipeline.steps.index(begin)
    for job in pipeline.jobs:
        step = _known(job) if pipeline.steps.index(job.step) >= first else None
        if step is None:
            continue
        if not trusted:
            check_inside(job, step, out)
        for name, text, check in _reads(job.command, step):
            # Skip text that an earlier step names, or that an earlier step writes below `out`.
            if text is not None and (
                next(references(text), None) or Path(text).absolute().is_relative_to(out.absolute())
            ):
                continue
            # Collect all faults of inputs. A fault of the machine is the same for every step: raise it at once.
            try:
                check()
            except EnvironmentFault:
                raise
            except CtxextError as error:
                faults[f"steps.{job.step}.{name}: {error.message}"] = error.hint
    if faults:
        raise SpecError(pipeline.name, list(faults), hint=next(iter(faults.values())))


def _known(job: PipelineJob) -> Any:
    """The job's spec without the arguments that need a value from an earlier step; None where it is not valid then."""
    later = {name for name, value in job.arguments.items() if next(references(value), None)} - steps.MODELS
    try:
        step = steps.read(job.command, {k: v for k, v in job.arguments.items() if k not in later}, source=job.id)
        steps.resolved(job.command, step)
    except CtxextError:
        return None
    return step


def _reads(command: str, step: Any) -> Iterator[Read]:
    # Every text that the step reads. The embedded corpus and generated text need no check.
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

    # The checks of these two suites need no length, so the suite's own check can run here.
    if suite.suite in ("longbench", "short"):
        name = "data" if suite.suite == "longbench" else "include"
        yield name, getattr(suite, name), partial(CHECKS[suite.suite], suite)
        return
    # RULER with `from_cases` reads finished cases, and none of the files that cases are made from.
    made = getattr(suite, "from_cases", None) is None
    if made and suite.data not in (EMBEDDED, GRASS):
        yield "data", suite.data, partial(fingerprint, suite.data, text_field=suite.text_field)
    for name in ("squad", "hotpotqa") if made else ("from_cases",):
        if (path := getattr(suite, name, None)) is not None:
            yield name, path, partial(file_hash, path)
