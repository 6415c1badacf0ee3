"""Reads and checks the inputs of a report: evaluations, probes, training runs, and other outputs by their manifest.

A report compares only what was measured in the same way: rows are shown side by side only within one `Block`, which is
one suite requested with the same fields except the lengths. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ctxext.config import manifest as manifests
from ctxext.config.manifest import Manifest
from ctxext.errors import DataError, InputError
from ctxext.evals.compare import Difference
from ctxext.evals.item_runner import ResultRow
from ctxext.evals.suite import ModelResult
from ctxext.probes.probe_finding import ProbeReport

RESULTS, STEPS, VALIDATIONS, PROBES = "results.json", "metrics.jsonl", "validation.jsonl", "probes.json"
_BEGUN = {"spec.yaml": "ctxext finetune --resume", "request.json": "the same ctxext eval command again: it resumes"}
_LOOSE = ConfigDict(extra="ignore", strict=True)  # fields that a later version adds are ignored
_MOST_FAULTS = 5
_RUN_AGAIN_HINT = "another version of ctxext may have written it: run the command again"


@pydantic_dataclass(frozen=True, config=_LOOSE)
class Cell:
    """One cell of the passkey grid of a validation (train/passkey.py)."""

    length: int
    accuracy: float


@pydantic_dataclass(frozen=True, config=_LOOSE)
class RecordedGrid:
    cells: tuple[Cell, ...] = ()


@pydantic_dataclass(frozen=True, config=_LOOSE)
class Line:
    """The types of a line of metrics.jsonl or validation.jsonl. Only `step` is required."""

    step: int
    ctx: int | None = None
    loss: float | None = None
    short: float | None = None
    by_position: dict[Annotated[str, Field(pattern=r"^\d+$")], float] | None = None
    passkey: RecordedGrid | None = None
    gradient_norm: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    memory: float | None = None
    seconds: float | None = None
    mfu: float | None = None


@pydantic_dataclass(frozen=True, config=_LOOSE)
class RecordedRequest:
    """The part of the evaluation's spec that decides which numbers may be compared. The manifest has the whole spec."""

    suites: tuple[dict[str, Any], ...]
    dtype: str | None = None


@pydantic_dataclass(frozen=True, config=_LOOSE)
class RecordedResults:
    """The content of results.json: the results as evals wrote them."""

    spec: RecordedRequest
    models: tuple[ModelResult, ...]
    seconds: float | None = None
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class RecordedRun:
    """One directory of the report's input, the `number`-th, counted from 1.

    files        the sha256 of each file that was read, by name
    steps        the lines of metrics.jsonl; each has its `step`
    validations  the lines of validation.jsonl; each has its `step`
    """

    number: int
    directory: Path
    manifest: Manifest
    files: dict[str, str]
    results: RecordedResults | None = None
    steps: tuple[dict[str, Any], ...] = ()
    validations: tuple[dict[str, Any], ...] = ()
    probes: ProbeReport | None = None

    @property
    def name(self) -> str:
        """The name in the manifest, or else the name of the directory."""
        return str(self.manifest.facts.get("name") or self.directory.name)

    @property
    def measured(self) -> bool:
        """Whether the run has anything to show besides its manifest."""
        return bool(self.results or self.steps or self.validations or self.probes)

    @property
    def versions(self) -> str:
        """The versions of ctxext, torch, transformers and Python as text."""
        known = self.manifest.versions
        named = [f"{name} {known[name]}" for name in ("ctxext", "torch", "transformers") if known.get(name)]
        return ", ".join([*named, f"Python {known['python']}"] if known.get("python") else named) or "versions unknown"


@dataclass(frozen=True)
class Series:
    """The rows of one model in a block. `label` is unique in the block, also where one model was run twice."""

    label: str
    model: ModelResult
    run: RecordedRun
    rows: tuple[ResultRow, ...]
    notes: tuple[str, ...]

    def whole(self) -> dict[int, ResultRow]:
        """Returns the rows of the whole suite (not those of single tasks) by length."""
        return {row.length: row for row in self.rows if row.task == ""}


@dataclass(frozen=True)
class Block:
    """One suite, requested in one way. `requested`: its fields except the lengths, and the dtype of the weights."""

    suite: str
    requested: dict[str, Any]
    series: list[Series]

    @property
    def lengths(self) -> list[int]:
        """All measured lengths, ascending."""
        return sorted({row.length for series in self.series for row in series.rows})

    @property
    def shared_length(self) -> int | None:
        """The greatest length at which the whole suite has a number for every model.

        Where there is none: the greatest length with a number for any model; None where there is no number.
        """
        measured = [{n for n, row in s.whole().items() if row.value is not None} for s in self.series]
        lengths = set.intersection(*measured) or set.union(*measured)
        return max(lengths, default=None)


def read_runs(directories: list[Path]) -> list[RecordedRun]:
    """Reads every directory, in the given order.

    Errors: InputError (a directory that does not exist, has no manifest, is given twice or lacks its results),
    DataError (results that do not parse, with the file and the faults), ModelError (a broken manifest).
    """
    seen = set[Path]()
    for directory in directories:
        if directory.resolve() in seen:
            raise InputError(f"{directory} was given twice")
        seen.add(directory.resolve())
    return [_read(number, directory) for number, directory in enumerate(directories, start=1)]


def _read(number: int, directory: Path) -> RecordedRun:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory", hint="give the output of an eval, a probe or a finetune")
    manifest = manifests.read(directory)
    # The manifest is the last file of an output. Without it the output is unfinished, or not from ctxext.
    if manifest is None:
        for begun, command in _BEGUN.items():
            if (directory / begun).is_file():
                message = f"{directory} is not finished: it has {begun} and no {manifests.FILE_NAME}"
                raise InputError(message, hint=f"finish it first: {command}")
        raise InputError(
            f"{directory} has no {manifests.FILE_NAME}: it is not an output of ctxext",
            hint="give the output of an eval, a probe or a finetune",
        )
    readable = (manifests.FILE_NAME, RESULTS, STEPS, VALIDATIONS, PROBES)
    present = [name for name in readable if (directory / name).is_file()]
    wanted = {"eval": RESULTS, "finetune": STEPS, "probe": PROBES}.get(manifest.kind)
    if wanted is not None and wanted not in present:
        raise InputError(f"{directory} has no {wanted}: nothing was measured there", hint="run it again")
    files = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in present}
    run = RecordedRun(number, directory, manifest, files)
    # Other kinds than eval and probe may have step files. Without them the run is shown by its manifest alone.
    if manifest.kind == "eval":
        return replace(run, results=_results(directory / RESULTS))
    if manifest.kind == "probe":
        return replace(run, probes=_probes(directory / PROBES))
    return replace(run, steps=_lines(directory / STEPS), validations=_lines(directory / VALIDATIONS))


def _results(path: Path) -> RecordedResults:
    results = _validated(path, TypeAdapter(RecordedResults), "an evaluation's results")
    # `blocks` pairs each suite of the spec with the results at the same index.
    names = [suite.get("suite") for suite in results.spec.suites]
    for model in results.models:
        if [suite.suite for suite in model.suites] != names:
            raise DataError(
                f"{path}: the suites of {model.model} are not those of its spec, {names}", hint=_RUN_AGAIN_HINT
            )
    return results


def _probes(path: Path) -> ProbeReport:
    return _validated(path, TypeAdapter(ProbeReport), "what probes found")


def _validated(path: Path, adapter: TypeAdapter[Any], what: str) -> Any:
    try:
        return adapter.validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "\n".join(f"  {fault}" for fault in _faults(error))
        raise DataError(f"{path} does not hold {what}:\n{faults}", hint=_RUN_AGAIN_HINT) from None


def _faults(error: ValidationError) -> list[str]:
    """The first _MOST_FAULTS faults, each with its dotted path and message, and the number of the others."""
    first = error.errors(include_url=False)[:_MOST_FAULTS]
    lines = [f"{'.'.join(map(str, one['loc'])) or 'the whole file'}: {one['msg']}" for one in first]
    return [*lines, *[f"and {error.error_count() - len(first)} more"] * (error.error_count() > len(first))]


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The JSON objects of a file of lines, each with an integer `step`. No file gives no lines.

    A broken last line without a newline is left out: a killed process was writing it.
    """
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    lines, found, adapter = text.splitlines(), [], TypeAdapter(Line)
    for number, line in enumerate(lines, start=1):
        try:
            adapter.validate_json(line)
        except ValidationError as error:
            # Only the last line may be cut off; any other broken line is an error.
            if number == len(lines) and not text.endswith("\n"):
                break
            raise DataError(f"{path}:{number}: {'; '.join(_faults(error))}") from None
        # Keep the raw object, which has the fields that Line does not know.
        found.append(json.loads(line))
    return tuple(found)


def blocks(runs: list[RecordedRun]) -> list[Block]:
    """Groups the rows of all evaluations into blocks, in order of first appearance.

    A suite has one block for each way in which it was requested.
    """
    labels, found = _labels(runs), dict[str, Block]()
    for run in runs:
        for index, model in enumerate(run.results.models if run.results else ()):
            assert run.results is not None
            for requested, suite in zip(run.results.spec.suites, model.suites, strict=True):
                # Results with equal `fields` are comparable: they share a block. Its columns are lengths.
                fields = {name: value for name, value in requested.items() if name not in ("lengths", "suite")}
                fields["dtype"] = run.results.spec.dtype
                key = json.dumps([suite.suite, fields], sort_keys=True)
                block = found.setdefault(key, Block(suite.suite, fields, []))
                label = labels[_identity(run, index)]
                block.series.append(Series(label, model, run, suite.rows, suite.notes))
    return [replace(block, series=_with_labels(block.series)) for block in found.values()]


def models(runs: list[RecordedRun]) -> list[tuple[str, ModelResult, dict[str, str]]]:
    """Returns (label, model, hashes of the weights) of every evaluated model, once for each label."""
    labels, found = _labels(runs), dict[str, tuple[str, ModelResult, dict[str, str]]]()
    for run in runs:
        for index, model in enumerate(run.results.models if run.results else ()):
            label = labels[_identity(run, index)]
            found.setdefault(label, (label, model, _weights(run, index)))
    return list(found.values())


def _weights(run: RecordedRun, index: int) -> dict[str, str]:
    return dict(run.manifest.parents.get(f"model {index}", {}).get("weights") or {})


def _identity(run: RecordedRun, index: int) -> str:
    assert run.results is not None
    model = run.results.models[index]
    return json.dumps([model.model, model.path, _weights(run, index)], sort_keys=True)


def _labels(runs: list[RecordedRun]) -> dict[str, str]:
    """The label of each model by identity: its name, numbered where models of one name differ in path or weights."""
    labels, named = dict[str, str](), Counter[str]()
    for run in runs:
        for index, model in enumerate(run.results.models if run.results else ()):
            identity = _identity(run, index)
            if identity not in labels:
                named[model.model] += 1
                count = named[model.model]
                labels[identity] = model.model if count == 1 else f"{model.model} ({count})"
    return labels


def _with_labels(series: list[Series]) -> list[Series]:
    """Adds the run's number to the label of a model that is in a block more than once."""
    times = Counter(s.label for s in series)
    return [replace(s, label=f"{s.label}, run {s.run.number}") if times[s.label] > 1 else s for s in series]
