"""Suites over models and lengths: rows for a table, a dict for JSON. No torch until one runs."""

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
from ctxext.evals.engine import STAR, Job, Ledger, Outcome, Row, run_job
from ctxext.evals.spec import EvalSpec
from ctxext.evals.suites import PREPARED, module_of
from ctxext.machine.memory import is_out_of_memory
from ctxext.model.layout import pattern_text
from ctxext.model.source import ModelSource, require_tokenizer, resolve
from ctxext.progress import Progress, ignore
from ctxext.units import format_tokens

if TYPE_CHECKING:  # torch comes with these: it is imported when every argument has been found good
    from ctxext.evals.compare import Difference
    from ctxext.model.load import LoadedModel


@dataclass(frozen=True)
class SuiteResult:
    """The rows of one suite on one model, what is to be said beside them, and what was read of its data
    (data/files.py, Reading)."""

    suite: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    read: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ModelResult:
    """What one model did. Lengths in tokens: `usable_length` by its own config, `original_length` it was first trained
    at. `layout` and `positions` say what its layers see."""

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
        """A flat row for each number; `extrapolated` where the model does not bear the length."""
        return [
            {"model": model.model, **asdict(row), "extrapolated": row.length > model.usable_length}
            for model in self.models
            for suite in model.suites
            for row in suite.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        data = asdict(self)
        for model in data["models"]:
            for row in (row for suite in model["suites"] for row in suite["rows"]):
                row["extrapolated"] = row["length"] > model["usable_length"]
        return data


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
    """Runs the suites of `spec` on each model, one in memory at a time.

    `models` are names, paths or sources for `ctxext.model.load`, or models already loaded. `against` is the index of
    the one that the others are compared with (compare.py). In `place`, a directory, stand the cases, keys and outcomes;
    what stands there already is not run again (the caller answers for its being of the same request). None: nothing is
    kept.

    `progress(what, done, in all)` and `notice(line)` are told on the way. A length beyond a model's usable length is
    refused unless `spec.extrapolate`, and then its rows say `extrapolated`. Errors: InputError and ModelError for what
    arguments and the models' files can decide, all before torch is imported; those of the data and of loading as they
    come; EnvironmentFault where memory runs out (what was done is in `place`).
    """
    if not models:
        raise InputError("no model was given to evaluate")
    found = [resolve(str(model)) if isinstance(model, str | Path) else model for model in models]
    spec = with_lengths(spec, [_source(model) for model in found])
    began = time.monotonic()
    if place is None:
        with tempfile.TemporaryDirectory() as scratch:
            return evaluate(found, spec, against=against, place=Path(scratch), device=device, progress=progress,
                            notice=notice)  # fmt: skip
    for suite in (suite for suite in spec.suites if suite.suite in PREPARED):
        with _memory_runs_out("what comes before the models", suite.suite):
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
            ledger = Ledger(place / "outcomes" / f"{index}-{suite.suite}-{number}.jsonl")
            with _memory_runs_out(names[number], suite.suite):
                job, read = _job(suite, loaded, place)
                for note in job.notes:
                    notice(f"{names[number]}: {note}")
                told = partial(progress, f"{names[number]} {suite.suite}")
                rows = run_job(job, ledger, spec.tokens_per_batch, told)
            results[-1].suites.append(SuiteResult(suite.suite, job.notes, tuple(rows), read))
            outcomes[-1].append([ledger.outcomes[item.id] for item in job.items])
        del loaded
        gc.collect()
    report = EvalReport(spec, time.monotonic() - began, results)
    if against is None:
        return report
    return replace(report, differences=_compared(report, outcomes, tokenizers, against, notice))


def _job(suite: Any, loaded: LoadedModel, place: Path) -> tuple[Job, tuple[dict[str, Any], ...]]:
    """A suite's job, with what was read among its notes, and what was read as plain data."""
    with recorded() as began_reading:
        job: Job = module_of(suite.suite).job(loaded, suite, place)
    read = distinct(began_reading)
    lines = tuple(f"{suite.suite}: {line}" for one in read for line in one.lines())
    return replace(job, notes=lines + job.notes), tuple(one.as_dict() for one in read)


@contextmanager
def _memory_runs_out(model: str, suite: str) -> Iterator[None]:
    """Where memory runs out, say what helps; the outcomes so far are on disk."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"out of memory in {suite} of {model}: {' '.join(str(error).split())[:200]}",
            hint="--set tokens_per_batch=1 runs row by row, --dtype bfloat16 halves the cache; the same command goes "
            "on where this one ended",
        ) from error


def with_lengths(spec: EvalSpec, sources: Sequence[ModelSource]) -> EvalSpec:
    """The spec with every length filled in, ascending. InputError where one is beyond what a model bears."""
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
    if length <= source.usable_length or extrapolate:
        return
    raise InputError(
        f"{source.name} bears {format_tokens(source.usable_length)} tokens, and length {format_tokens(length)} was "
        "asked for: its layers with RoPE would meet distances they were never trained on, and numbers would show that",
        hint="give --extrapolate to measure just this, or lengths up to what it bears",
    )


def _source(model: Any) -> Any:
    """What is known of a model without its weights: a source, or a loaded model itself."""
    return model if not hasattr(model, "source") else model.source


def _names(sources: Sequence[Any]) -> list[str]:
    """One for each, told apart where two models have the same: by the end of their paths, or by a number."""
    names = [source.name for source in sources]
    for parts in (2, 3):
        tails = ["/".join(Path(source.path or source.name).absolute().parts[-parts:]) for source in sources]
        names = [tail if names.count(name) > 1 else name for name, tail in zip(names, tails, strict=True)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _described(name: str, loaded: LoadedModel, spec: EvalSpec) -> ModelResult:
    source = loaded.source
    rope = source.config["rope_parameters"]
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
    """Of every other model and suite, where there are pairs: nats per token pair with the same tokenizer alone."""
    from ctxext.evals.compare import LOWER_IS_BETTER, differences

    names, found = [model.model for model in report.models], list[Any]()
    for number, of_model in enumerate(outcomes):
        if number == against:
            continue
        for suite, mine, others in zip(report.spec.suites, of_model, outcomes[against], strict=True):
            if suite.suite == "short":
                notice("short is not compared pair by pair: lm-eval gives one figure a task, with its standard error")
                continue
            if suite.suite in LOWER_IS_BETTER and tokenizers[number] != tokenizers[against]:
                notice(
                    f"{names[number]} and {names[against]} have different tokenizers: their {suite.suite} is not "
                    "compared, nats per token are of different tokens; perplexity has bits_per_byte in results.json"
                )
                continue
            found += differences(suite.suite, names[number], mine, names[against], others)
    return found


def _load(model: Any, spec: EvalSpec, device: str | None) -> LoadedModel:
    """A source loaded; a model that is loaded already as it is."""
    from ctxext.model.load import load_model

    if hasattr(model, "tokenizer"):
        if spec.nope_log_scale is not None:
            raise InputError("nope_log_scale: a model that is loaded already is not changed; load it with the scale")
        return model
    require_tokenizer(model.directory)
    a = spec.nope_log_scale if _has_nope(model) else None
    return load_model(model, dtype=spec.dtype, device=device, nope_log_scale=a)


def _has_nope(source: ModelSource) -> bool:
    return any(kind.letter == "N" for kind in source.kinds)


def _check_log_scale(sources: Sequence[ModelSource], a: float | None) -> None:
    """The log scale is for models with N layers; beside them others may stand, measured as they are."""
    if a is None or any(_has_nope(source) for source in sources):
        return
    layouts = "; ".join(f"{source.name} is {pattern_text(source.kinds)}" for source in sources)
    raise InputError(
        f"nope_log_scale {a:g}: no model here has an N layer (full, without positions) to scale: {layouts}",
        hint="leave --nope-log-scale out, or evaluate a conversion such as swa128-nope",
    )


def tables(report: EvalReport) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, header, rows) of each suite, a model a row, a length a column; then of its tasks, if it has any.

    A * stands at a length beyond what the model bears. Where lengths have protocols of their own, all are named.
    """
    made = []
    for index, suite in enumerate(report.spec.suites):
        rows = [
            {"model": model.model, "beyond": row.length > model.usable_length, **asdict(row)}
            for model in report.models
            for row in model.suites[index].rows
        ]
        lengths = sorted({row["length"] for row in rows})
        header = [suite.suite, *[format_tokens(length) if length else "" for length in lengths]]
        protocols = "; ".join(dict.fromkeys(row["protocol"] for row in rows))
        star = f"; {STAR}" if any(row["beyond"] for row in rows) else ""
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


def _tasks(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(metric, task) of rows, the whole suite first."""
    found = {row["task"]: row["metric"] for row in rows}
    return [(metric, task) for task, metric in sorted(found.items(), key=lambda pair: pair[0] != "")]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "none"
    return f"{row['value']:.3f}{'*' if row['beyond'] else ''}"
