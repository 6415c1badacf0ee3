"""Runs suites over models and lengths: rows for tables, a dict for JSON. Imports no torch until a suite runs."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.data.files import distinct, recorded
from ctxext.data.store import tokenizer_hash
from ctxext.errors import EnvironmentFault, InputError
from ctxext.evals.eval_spec import EvalSpec
from ctxext.evals.item_runner import STAR, Ledger, Outcome, ResultRow, SuiteJob, run_job
from ctxext.evals.suites import PREPARED, module_of
from ctxext.machine.memory import is_out_of_memory
from ctxext.model.companions import require_tokenizer
from ctxext.model.layout import pattern_text
from ctxext.model.source import ModelSource, resolve
from ctxext.progress import Progress, ignore
from ctxext.units import format_tokens

if TYPE_CHECKING:  # these modules import torch, which is imported only after all arguments are checked
    from ctxext.evals.compare import Difference
    from ctxext.model.load import LoadedModel


@dataclass(frozen=True)
class SuiteResult:
    """The rows of one suite on one model, the notes shown beside them, and what was read of its data.

    `read` holds readings as plain data (data/files.py, Reading).
    """

    suite: str
    notes: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    read: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ModelResult:
    """The results of one model. Lengths in tokens.

    usable_length     by the model's own config
    original_length   length at which the model was first trained
    layout            the layers' attention kinds and windows
    positions         the RoPE parameters, and the log scale of N layers where there is one
    """

    model: str
    path: str
    usable_length: int
    original_length: int | None
    layout: str
    positions: str
    suites: list[SuiteResult] = field(default_factory=list)


@dataclass(frozen=True)
class EvalReport:
    """All results of one `evaluate`."""

    spec: EvalSpec
    seconds: float
    models: list[ModelResult]
    differences: list[Difference] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one flat row for each number; `extrapolated` is true where the model does not support the length."""
        return [
            {"model": model.model, **asdict(row)}
            for model in self.models
            for suite in model.suites
            for row in suite.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return asdict(self)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Returns (caption, header, rows) for each suite: a row per model, a column per length; then one by
        task, if any.

        A * marks a length beyond what the model supports. Where rows have different protocols, the caption names all of
        them.
        """
        made = []
        for index, suite in enumerate(self.spec.suites):
            # Flatten first: models may differ in lengths and tasks, so cells are looked up by (task, model, length).
            rows = [{"model": model.model, **asdict(row)} for model in self.models for row in model.suites[index].rows]
            lengths = sorted({row["length"] for row in rows})
            header = [suite.suite, *[format_tokens(length) if length else "" for length in lengths]]
            protocols = "; ".join(dict.fromkeys(row["protocol"] for row in rows))
            star = f"; {STAR}" if any(row["extrapolated"] for row in rows) else ""
            cells = {(row["task"], row["model"], row["length"]): row for row in rows}
            by_task: list[list[str]] = []
            for metric, task in _tasks(rows):
                names = dict.fromkeys(row["model"] for row in rows if row["task"] == task)
                body = [[name, *[_cell(cells.get((task, name, n))) for n in lengths]] for name in names]
                if task:
                    by_task += [[f"{task}: {name}", *rest] for name, *rest in body]
                else:
                    made.append((f"{metric}: {protocols}{star}", header, body))
            if by_task:
                made.append((f"{suite.suite} by task", header, by_task))
        return made


def evaluate(
    models: Sequence[Any],
    spec: EvalSpec,
    *,
    against: int | None = None,
    place: Path | None = None,
    device: str | None = None,
    progress: Progress = ignore,
    notice: Callable[[str], None] = lambda _: None,
) -> EvalReport:
    """Runs the suites of `spec` on each model, with one model in memory at a time.

    models     names, paths or sources for `ctxext.model.load`, or models that are already loaded
    against    index of the model that the others are compared with (compare.py); None compares nothing
    place      directory of the cases, keys and outcomes. What it already holds is not run again; the caller must make
               sure that it belongs to the same request. None: nothing is kept
    progress   called as `progress(what, done, in all)`
    notice     called with a line to show

    A length beyond a model's usable length is refused unless `spec.extrapolate` is set; its rows are then marked
    `extrapolated`.

    Errors: InputError and ModelError for what arguments and the models' files can decide, all before torch is imported;
    errors of the data and of loading when they occur; EnvironmentFault where memory runs out (finished outcomes are in
    `place`).
    """
    if not models:
        raise InputError("no model was given to evaluate")
    found = [resolve(str(model)) if isinstance(model, str | Path) else model for model in models]
    spec = with_lengths(spec, [_source(model) for model in found])
    began = time.monotonic()
    if place is None:
        # Keys, cases and outcomes go through files, so use a temporary directory.
        with tempfile.TemporaryDirectory() as scratch:
            return evaluate(found, spec, against=against, place=Path(scratch), device=device, progress=progress,
                            notice=notice)  # fmt: skip
    # Some suites load a model of their own or fetch data. Do this first, while no evaluated model is in memory.
    for suite in (suite for suite in spec.suites if suite.suite in PREPARED):
        with _memory_runs_out("the preparation", suite.suite):
            module_of(suite.suite).prepare(suite, place, spec.dtype, device, progress)
    results: list[ModelResult] = []
    names = _names([_source(model) for model in found])
    outcomes: list[list[list[Outcome]]] = []  # of each model, of each suite
    tokenizers: list[str] = []
    for number, model in enumerate(found):
        loaded = _load(model, spec, device)
        results.append(_described(names[number], loaded, spec))
        outcomes.append([])
        tokenizers.append(tokenizer_hash(loaded.tokenizer) if against is not None else "")
        for index, suite in enumerate(spec.suites):
            # The ledger reads the outcomes of an interrupted run, so that only the missing items run.
            ledger = Ledger(place / "outcomes" / f"{index}-{suite.suite}-{number}.jsonl")
            with _memory_runs_out(names[number], suite.suite):
                job, read = _job(suite, loaded, place)
                for note in job.notes:
                    notice(f"{names[number]}: {note}")
                count_items = partial(progress, f"{names[number]} {suite.suite}")
                rows = run_job(job, ledger, spec.tokens_per_batch, count_items)
            rows = [replace(row, extrapolated=row.length > results[-1].usable_length) for row in rows]
            results[-1].suites.append(SuiteResult(suite.suite, job.notes, tuple(rows), read))
            outcomes[-1].append([ledger.outcomes[item.id] for item in job.items])
        # Free this model before the next one is loaded.
        del loaded
        gc.collect()
    report = EvalReport(spec, time.monotonic() - began, results)
    if against is None:
        return report
    return replace(report, differences=_compared(report, outcomes, tokenizers, against, notice))


def _job(suite: Any, loaded: LoadedModel, place: Path) -> tuple[SuiteJob, tuple[dict[str, Any], ...]]:
    """Returns a suite's job and its readings as plain data; the job's notes begin with lines on what was read."""
    with recorded() as began_reading:
        job: SuiteJob = module_of(suite.suite).job(loaded, suite, place)
    read = distinct(began_reading)
    lines = tuple(f"{suite.suite}: {line}" for one in read for line in one.lines())
    return replace(job, notes=lines + job.notes), tuple(one.as_dict() for one in read)


@contextmanager
def _memory_runs_out(model: str, suite: str) -> Iterator[None]:
    """Turns an out-of-memory error into an EnvironmentFault with a hint; the outcomes so far are on disk."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"out of memory in {suite} of {model}: {' '.join(str(error).split())[:200]}",
            hint="--set tokens_per_batch=1 runs row by row, --dtype bfloat16 halves the cache; the same command "
            "resumes where this one ended",
        ) from error


def with_lengths(spec: EvalSpec, sources: Sequence[ModelSource]) -> EvalSpec:
    """Returns the spec with every length filled in, in ascending order.

    Where lengths are not given, the shortest usable length of the models is taken. Raises InputError for a length
    beyond what a model supports.
    """
    shortest = min(source.usable_length for source in sources)
    _check_log_scale(sources, spec.nope_log_scale)
    suites = []
    for suite in spec.suites:
        if hasattr(suite, "lengths"):
            lengths = tuple(sorted(set(suite.lengths or (shortest,))))
            if lengths[0] < 2:
                raise InputError(f"{suite.suite}: lengths are {list(lengths)}; each is at least 2 tokens")
            suite = replace(suite, lengths=lengths)
            for source in sources:
                check_length(source, lengths[-1], spec.extrapolate)
        suites.append(suite)
    return replace(spec, suites=tuple(suites))


def check_length(source: ModelSource, length: int, extrapolate: bool) -> None:
    """Raises InputError for a length beyond what the model supports, unless `extrapolate`."""
    if length <= source.usable_length or extrapolate:
        return
    raise InputError(
        f"length {format_tokens(length)} is beyond the usable length of {source.name}, "
        f"{format_tokens(source.usable_length)} tokens: its layers with RoPE were not trained on such distances",
        hint="give --extrapolate to measure it anyway, or shorter lengths",
    )


def _source(model: Any) -> Any:
    """Returns what is known of a model without its weights: its source, or the loaded model itself."""
    return model if not hasattr(model, "source") else model.source


def _names(sources: Sequence[Any]) -> list[str]:
    """Returns one name for each model; equal names get the ends of their paths, or a number."""
    names = [source.name for source in sources]
    for parts in (2, 3):
        tails = ["/".join(Path(source.path or source.name).absolute().parts[-parts:]) for source in sources]
        names = [tail if names.count(name) > 1 else name for name, tail in zip(names, tails, strict=True)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _described(name: str, loaded: LoadedModel, spec: EvalSpec) -> ModelResult:
    source = loaded.source
    rope = source.config.fields["rope_parameters"]
    a = spec.nope_log_scale
    log = "" if a is None or not _has_nope(source) else f"; N layers' queries at t times log(t + {a:g}) / log({a:g})"
    return ModelResult(
        name,
        str(source.path),
        loaded.usable_length,
        source.original_length,
        pattern_text(source.kinds),
        (", ".join(f"{key} {value}" for key, value in rope.items()) if rope else "none") + log,
    )


def _compared(
    report: EvalReport,
    outcomes: list[list[list[Outcome]]],
    tokenizers: list[str],
    against: int,
    notice: Callable[[str], None],
) -> list[Difference]:
    """Compares every other model with `against`, suite by suite, where items pair.

    Losses in nats per token are compared between models of the same tokenizer only.
    """
    from ctxext.evals.compare import LOWER_IS_BETTER, differences

    names, found = [model.model for model in report.models], list[Any]()
    for number, of_model in enumerate(outcomes):
        if number == against:
            continue
        for suite, mine, others in zip(report.spec.suites, of_model, outcomes[against], strict=True):
            if suite.suite == "short":
                notice("short is not compared item by item: lm-eval gives one number per task, with its standard error")
                continue
            # A nat per token of one tokenizer is not comparable with a nat per token of another.
            if suite.suite in LOWER_IS_BETTER and tokenizers[number] != tokenizers[against]:
                notice(
                    f"{names[number]} and {names[against]} have different tokenizers, so their {suite.suite} is not "
                    "compared: nats per token need the same tokens; perplexity has bits_per_byte in results.json"
                )
                continue
            found += differences(suite.suite, names[number], mine, names[against], others)
    return found


def _load(model: Any, spec: EvalSpec, device: str | None) -> LoadedModel:
    """Loads a source; returns a model that is already loaded unchanged."""
    from ctxext.model.load import load_model

    if hasattr(model, "tokenizer"):
        if spec.nope_log_scale is not None:
            raise InputError(
                "nope_log_scale: the model is loaded already and cannot be changed; load it with the scale"
            )
        return model
    require_tokenizer(model.directory)
    a = spec.nope_log_scale if _has_nope(model) else None
    return load_model(model, dtype=spec.dtype, device=device, nope_log_scale=a)


def _has_nope(source: ModelSource) -> bool:
    return any(kind.letter == "N" for kind in source.kinds)


def _check_log_scale(sources: Sequence[ModelSource], a: float | None) -> None:
    """Raises InputError if no model has an N layer.

    One is enough: models without N layers are measured unchanged.
    """
    if a is None or any(_has_nope(source) for source in sources):
        return
    layouts = "; ".join(f"{source.name} is {pattern_text(source.kinds)}" for source in sources)
    raise InputError(
        f"nope_log_scale {a:g}: no given model has an N layer (full, without positions): {layouts}",
        hint="leave --nope-log-scale out, or evaluate a conversion such as swa128-nope",
    )


def _tasks(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns (metric, task) of the rows, the whole suite first."""
    found = {row["task"]: row["metric"] for row in rows}
    return [(metric, task) for task, metric in sorted(found.items(), key=lambda pair: pair[0] != "")]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "none"
    return f"{row['value']:.3f}{'*' if row['extrapolated'] else ''}"
