"""Reads a pipeline's YAML file into jobs: one job for each step and each cell of its matrix. No torch.

All that can be checked without running a step is checked here.

values: {model: tiny, ctx: 2k}            # values that steps refer to; --set NAME=VALUE changes them
over: {hybrid: [swa128-nope, SSSN]}       # matrix: a step that refers to an axis, directly or by a step, runs for each
steps:
  convert: {command: convert, model: "${model}", hybrid: "${hybrid}"}
  measure: {command: eval, models: ["${model}", "${convert}"], suite: smoke}
  page: {command: report, runs: ["${measure[*]}"]}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ctxext.config import presets
from ctxext.config.loader import build, set_value, spec
from ctxext.errors import SpecError
from ctxext.study import steps
from ctxext.study.flow import filled, malformed, references

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
MOST_JOBS = 1000
RESERVED = ("state", "pipeline.json", "results.json", "results.md", "ctxext.json")  # names in the output directory
PARTS = ("values", "over", "steps")
Axis = str | int | float | bool


@spec
class PipelineSpec:
    """The content of the file. A step is a mapping of its `command` and the arguments of that command."""

    steps: dict[str, dict[str, Any]]
    values: dict[str, Any] = field(default_factory=dict)
    over: dict[str, list[Axis]] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineJob:
    """One step at one cell of the matrix.

    id         the step's name, followed by the cell's values; also the name of the output directory
    arguments  values and axes are filled in; references to steps stay until those steps are done
    uses       step name -> id of the job it refers to
    collects   step name -> ids of all jobs of the step, for references with [*]
    """

    id: str
    step: str
    command: str
    cell: dict[str, Axis]
    arguments: dict[str, Any]
    uses: dict[str, str] = field(default_factory=dict)
    collects: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline. `jobs` are in the order in which they run."""

    name: str
    values: dict[str, Any]
    over: dict[str, list[Axis]]
    jobs: tuple[PipelineJob, ...]

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the steps, in order."""
        return tuple(dict.fromkeys(job.step for job in self.jobs))


def read_pipeline(name: str, changes: Mapping[str, Any] | None = None) -> Pipeline:
    """Reads the pipeline of a preset name or a YAML file.

    `changes`: new values by name, or new parts of the file by dotted path.
    Raises SpecError with every fault, each with its path; InputError for a file that does not exist.
    """
    found = presets.find("pipelines", name)
    # Copy the two upper levels, so that `changes` do not alter the preset's own data.
    data = {part: dict(value) if isinstance(value, dict) else value for part, value in found.data.items()}
    values = data.get("values") if isinstance(data.get("values"), dict) else {}
    faults = []
    for path, value in (changes or {}).items():
        if path.split(".")[0] in PARTS:
            set_value(data, path, value)
        elif path in values:
            values[path] = value
        # A value that is a mapping, such as `settings`: its keys are dotted paths themselves.
        elif isinstance(values.get(path.partition(".")[0]), dict):
            name, _, key = path.partition(".")
            values[name] = {**values[name], key: value}
        else:
            faults.append(f"--set {path}: no value has this name; allowed: {', '.join(values) or 'none'}")
    if faults:
        raise SpecError(str(found.path), faults)
    pipeline = build(PipelineSpec, data, source=str(found.path))
    # Jobs can be made only from valid names and references. One fault may appear in many cells: report it once.
    faults = [*_name_faults(pipeline), *_reference_faults(pipeline)]
    if not faults:
        try:
            jobs = _jobs(pipeline)
        except LookupError as error:
            raise SpecError(str(found.path), [str(error.args[0])]) from None
        faults = list(dict.fromkeys(fault for job in jobs for fault in _job_faults(job)))
    if faults:
        raise SpecError(str(found.path), faults)
    return Pipeline(found.name, pipeline.values, pipeline.over, tuple(jobs))


def _name_faults(pipeline: PipelineSpec) -> Iterator[str]:
    # Faults of names, axes and commands, and a matrix that is too large.
    if not pipeline.steps:
        yield "steps: none; allowed: at least one"
    for part in PARTS:
        for name in getattr(pipeline, part):
            if not NAME.fullmatch(name):
                yield f"{part}.{name}: allowed are names of letters, digits, - and _"
            if any(name in getattr(pipeline, other) for other in PARTS[: PARTS.index(part)]):
                yield f"{part}.{name}: the name is taken by a value or an axis"
    # Axis values become parts of directory names, so their slugs must differ too.
    for name, axis in pipeline.over.items():
        if not axis or len({_slug(value) for value in axis}) < len(axis):
            yield f"over.{name}: {'empty' if not axis else 'a value is given twice'}; allowed: different values"
    for name, step in pipeline.steps.items():
        given = step.get("command", "none")
        if not isinstance(given, str) or given not in steps.REQUESTS:
            yield f"steps.{name}.command: got {given!r}; allowed: {', '.join(steps.REQUESTS)}"
    # An upper bound: a step that does not depend on an axis does not run for each of its values.
    cells = 1
    for axis in pipeline.over.values():
        cells *= len(axis)
    if cells * len(pipeline.steps) > MOST_JOBS:
        yield f"over: {cells:,} cells of {len(pipeline.steps)} steps; allowed: {MOST_JOBS:,} in all"


def _reference_faults(pipeline: PipelineSpec) -> Iterator[str]:
    # Values and axes must not hold references themselves.
    for part in ("values", "over"):
        for name, value in getattr(pipeline, part).items():
            if next(references(value), None):
                yield f"{part}.{name}: a value may not hold a reference; write the reference where the value is used"
    before: list[str] = []
    for name, step in pipeline.steps.items():
        for text in malformed(step):
            yield f"steps.{name}: {text!r} is not a reference; allowed: ${{name}}, ${{step.key}}, ${{step[*]}}"
        # A step may refer to values, axes and the steps before it. [*] is allowed for steps only.
        for reference in references(step):
            known = [*before, *([] if reference.every else [*pipeline.values, *pipeline.over])]
            if reference.name not in known:
                later = reference.name in pipeline.steps
                why = "this step does not come before" if later else "no value, axis or step has this name"
                yield f"steps.{name}: {reference.text}: {why}; allowed: {', '.join(known) or 'none'}"
        before.append(name)
    used = {reference.name for step in pipeline.steps.values() for reference in references(step)}
    for part in ("values", "over"):
        yield from (f"{part}.{name}: no step uses it" for name in getattr(pipeline, part) if name not in used)


def _jobs(pipeline: PipelineSpec) -> list[PipelineJob]:
    # One job for each step and each cell of the axes that the step depends on.
    jobs: list[PipelineJob] = []
    axes: dict[str, tuple[str, ...]] = {}  # step name -> the axes it depends on
    for name, step in pipeline.steps.items():
        # A step depends on the axes it names, and on those of the steps it refers to. With [*] it collects all cells
        # of a step and does not depend on that step's axes.
        found = [reference for reference in references(step) if not reference.every]
        own = {reference.name for reference in found} & set(pipeline.over)
        own |= {axis for reference in found for axis in axes.get(reference.name, ())}
        axes[name] = tuple(axis for axis in pipeline.over if axis in own)
        for values in product(*(pipeline.over[axis] for axis in axes[name])):
            cell = dict(zip(axes[name], values, strict=True))
            arguments = filled({key: value for key, value in step.items() if key != "command"}, pipeline.values | cell)
            # The job of another step at this cell: that step may depend on fewer axes.
            uses = {r.name: _id(r.name, {axis: cell[axis] for axis in axes[r.name]}) for r in found if r.name in axes}
            every = {reference.name for reference in references(step) if reference.every}
            collects = {other: tuple(job.id for job in jobs if job.step == other) for other in every}
            jobs.append(PipelineJob(_id(name, cell), name, step["command"], cell, arguments, uses, collects))
    return jobs


def _job_faults(job: PipelineJob) -> list[str]:
    """Faults of a job's arguments, as far as they do not depend on the report of another step."""
    where, later = f"steps.{job.step}", {name for name, value in job.arguments.items() if next(references(value), None)}
    if job.id in RESERVED:
        return [f"{where}: {job.id} is the name of a file in the output of every pipeline; allowed: another name"]
    try:
        step = steps.read(job.command, job.arguments, source=where)
    except SpecError as error:
        # An argument that refers to a step is a string now and may become a number later: ignore its faults.
        return [f"{where}.{fault}" for fault in error.faults if re.split(r"[.:]", fault)[0] not in later]
    if later - steps.MODELS:
        return []
    return [f"{where}: {fault}" for fault in steps.faults(job.command, step)]


def _id(step: str, cell: Mapping[str, Axis]) -> str:
    return ".".join([step, *(_slug(value) for value in cell.values())])


def _slug(value: Axis) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", str(value)) or "empty"
