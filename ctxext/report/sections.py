"""The sections of evaluations: summary, models, differences, then one section per suite with text and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ctxext.evals.compare import Difference
from ctxext.evals.suite import ModelResult
from ctxext.report import charts, markup, words
from ctxext.report.markup import (
    beside,
    details,
    heading,
    join,
    long,
    missing,
    number,
    paragraph,
    pictures,
    quiet,
    section,
    sha256,
    small,
    strong,
    table,
)
from ctxext.report.run_records import Block, RecordedRun, Series
from ctxext.units import format_tokens

_EFFECTIVE = "; effective: the greatest length with an average of at least 85.6 (RULER's threshold, arXiv 2404.06654)"


def summary(blocks: Sequence[Block]) -> Markup:
    """Returns the summary: one row per model, one column per block, at the greatest length that its models share."""
    labels = dict.fromkeys(series.label for block in blocks for series in block.series)
    rows = [[label, *[_summary_cell(block, label) for block in blocks]] for label in labels]
    missing = [words.title(name) for name in words.TITLES if name not in {block.suite for block in blocks}]
    note = f"Not measured in these runs: {', '.join(missing)}." if missing else "Every suite was measured."
    caption = (
        "The whole suite, at the greatest length at which every model has a number. [low, high]: 95% interval. "
        "* beyond the usable length that the model's config gives."
    )
    return section("Summary", "summary", [table(caption, ["model", *map(_summary_head, blocks)], rows), quiet(note)])


def _summary_head(block: Block) -> Markup:
    length = block.shared_length
    at = f"{words.metric(block)}, {words.better(block)}{f', at {format_tokens(length)} tokens' if length else ''}"
    return join([words.title(block.suite), small(at), small(words.protocol(block, length))])


def _summary_cell(block: Block, label: str) -> Markup:
    found = [series for series in block.series if series.label == label]
    if not found:
        return words.value(None)
    called = [small(line) for line in _called(block, found[0])]
    return join([words.value(found[0].whole().get(block.shared_length or 0)), *called])


def _called(block: Block, series: Series) -> list[str]:
    """The verdicts of the model's own run about it and another model: lines such as "better than ...".

    Nothing where the run has the suite twice: its differences do not say which of the two they are of.
    """
    results = series.run.results
    if results is None or sum(requested.get("suite") == block.suite for requested in results.spec.suites) != 1:
        return []
    here = [d for d in results.differences if (d.suite, d.task, d.length) == (block.suite, "", block.shared_length)]
    mine = [d for d in here if d.model == series.model.model]
    return [f"{d.called} than {d.against}" if d.called in ("better", "worse") else d.called for d in mine]


def model_table(found: Sequence[tuple[str, ModelResult, dict[str, str]]]) -> Markup:
    """Returns the section of the compared models: layouts, positions, lengths, paths, weights."""
    rows = [
        [
            label,
            model.layout,
            model.positions,
            "unknown" if model.original_length is None else format_tokens(model.original_length),
            format_tokens(model.usable_length),
            model.path,
            join([sha256(file, digest) for file, digest in weights.items()], ", "),
        ]
        for label, model, weights in found
    ]
    caption = (
        "Layout: S is RoPE in a sliding window (the tokens a query sees, itself included), N full attention without "
        "positions, F full attention with RoPE. Lengths in tokens: trained at first, and usable by the config."
    )
    head = ["model", "layout", "positions", "trained at", "usable to", "path", "weights (sha256)"]
    return section("Models", "models", [table(caption, head, rows, "words")])


def differences(runs: Sequence[RecordedRun]) -> Markup:
    """Returns the section of differences, empty where nothing was compared. Those of single tasks are folded."""
    found = [(run, d) for run in runs if run.results for d in run.results.differences]
    if not found:
        return Markup()
    whole, tasks = ([pair for pair in found if bool(pair[1].task) == of_task] for of_task in (False, True))
    folded = [details("Differences by task", _differences(tasks))] if tasks else []
    return section("Differences", "differences", [*_differences(whole), *folded])


def _differences(found: Sequence[tuple[RecordedRun, Difference]]) -> list[Markup]:
    """Tables with one row per suite (or task) and pair of models, one column per length.

    Suites without lengths are in a table of their own.
    """
    caption = (
        "Both models on the same items: the score of the first minus that of the second, the 95% bootstrap interval "
        "over pairs, and p of a sign-flip test. Not corrected for multiple comparisons: of equal models, one "
        "comparison in twenty shows a difference."
    )
    with_length, without = ([pair for pair in found if bool(pair[1].length) == has] for has in (True, False))
    made = [_difference_table(with_length, caption)] if with_length else []
    return made + (
        [_difference_table(without, "As above, for suites without lengths." if made else caption)] if without else []
    )


def _difference_table(found: Sequence[tuple[RecordedRun, Difference]], caption: str) -> Markup:
    # Differences of one suite, task, pair and run are one row; its cells are found by length.
    rows: dict[Markup, dict[int, Difference]] = {}
    order = list(dict.fromkeys(d.suite for _, d in found))
    for run, d in sorted(found, key=lambda pair: order.index(pair[1].suite)):
        pair = [small(f"{d.model} against {d.against}"), small(f"{d.unit or 'unit unknown'}; run {run.number}")]
        name = f"{words.title(d.suite)}{f', {d.task}' if d.task else ''}"
        rows.setdefault(join([name, *pair]), {})[d.length] = d
    lengths = sorted({d.length for _, d in found})
    body = [[name, *[_difference(of.get(length)) for length in lengths]] for name, of in rows.items()]
    return table(caption, ["suite", *[words.length(length) if length else "difference" for length in lengths]], body)


def _difference(d: Difference | None) -> Markup:
    if d is None:
        return missing("–")
    called = strong(d.called) if d.called in ("better", "worse") else d.called
    by = [number(d.value, 3, sign=True), " ", words.interval(d.low, d.high, 3)]
    return join([called, small(*by), small("p ", number(d.p, 4), f", {d.n:,} pairs")])


def suites(place: Path, blocks: Sequence[Block]) -> list[tuple[str, str, Markup]]:
    """Returns (id, title, section) of each measured suite. Pictures are written to `place`."""
    # Numbers of labels are of the whole report, so that a model has the same colour in every suite.
    labels = dict.fromkeys(series.label for block in blocks for series in block.series)
    numbers = {label: n for n, label in enumerate(labels)}
    made = []
    for number_, suite in enumerate(dict.fromkeys(block.suite for block in blocks), start=1):
        mine = [block for block in blocks if block.suite == suite]
        stem = suite if suite in words.TITLES else f"suite-{number_}"  # unknown names of results.json are no file names
        parts = list[Markup]()
        for at, block in enumerate(mine, start=1):
            parts += [heading(f"Request {at}")] if len(mine) > 1 else []
            parts.append(_block(place / (stem if len(mine) == 1 else f"{stem}-{at}"), block, numbers))
        title = words.title(suite)
        made.append((stem, title, section(title, stem, parts)))
    return made


def _block(stem: Path, block: Block, numbers: charts.Numbers) -> Markup:
    """One block: how it was measured, the pictures, a table, and a folded table of all numbers."""
    ran = ", ".join(dict.fromkeys(f"run {series.run.number}" for series in block.series))
    notes = list(dict.fromkeys(note for series in block.series for note in series.notes))
    if len({tuple(sorted({row.length for row in series.rows})) for series in block.series}) > 1:
        notes.append("Not every model was run at the same lengths: n is the number of items behind each number.")
    return markup.block(
        [
            paragraph(f"{words.metric(block)}, {words.better(block)}; {words.protocol(block)}."),
            quiet(f"Request: {words.request_text(block)}. From {ran}; {words.versions(block)}."),
            *map(quiet, notes),
            *_shown(charts.draw(stem, block, numbers), block),
            details("Every number, with its protocol", [_every_number(block), *_nested(block)]),
        ]
    )


def _shown(drawn: list[Markup], block: Block) -> list[Markup]:
    """The pictures and tables of a block.

    Two pictures are shown side by side above the table. Else the first one is beside the table, the others below.
    LongBench and short tasks have no pictures: their table is by task.
    """
    if block.suite in ("longbench", "short"):
        by_length = [_length_table(block)] if len(block.lengths) > 1 else []
        return [*by_length, _task_table(block, block.shared_length or 0)]
    if len(drawn) == 2:
        return [pictures(drawn), _length_table(block)]
    return [beside([*drawn[:1], _length_table(block)]), pictures(drawn[1:])]


def _length_table(block: Block) -> Markup:
    """A table with one row per model and one column per length; for RULER a last column with the effective length."""
    ruler, rows = block.suite == "ruler", []
    for series in block.series:
        whole = series.whole()
        row: list[str] = [words.headed(series), *[words.value(whole.get(length)) for length in block.lengths]]
        effective = [found.details.get("effective_length") for found in whole.values()]
        rows.append(row + [words.detail(max((n for n in effective if n), default=None))] * ruler)
    caption = f"By length in tokens; n counts {words.COUNTED.get(block.suite, 'cases')}{_EFFECTIVE * ruler}."
    return table(caption, ["model", *map(words.length, block.lengths), *["effective"] * ruler], rows)


def _task_table(block: Block, length: int) -> Markup:
    """A table with one row per task and one column per model, at one length. `_every_number` has the other lengths."""
    cells = {(s.label, row.task): row for s in block.series for row in s.rows if row.length == length}
    metrics = {task: row.metric for (_, task), row in cells.items()}
    rows = [
        [
            join([task or "all tasks", small(metrics[task])]),
            *[words.value(cells.get((s.label, task))) for s in block.series],
        ]
        for task in sorted(metrics, key=lambda task: task == "")
    ]
    at = f" at {format_tokens(length)} tokens" if length else ""
    return table(f"By task{at}; n counts cases.", ["task", *map(words.headed, block.series)], rows)


def _every_number(block: Block) -> Markup:
    """A table of all rows of results.json, with those details that are single values."""
    # Details that are lists or mappings, such as by_depth, are in the tables of `_nested`.
    rows = [(series, row) for series in block.series for row in series.rows]
    extra = list(dict.fromkeys(name for _, row in rows for name, x in row.details.items() if _single(x)))
    digits = words.digits(block.suite)
    body = [
        [
            series.label,
            row.task or "all",
            words.length(row.length),
            row.metric,
            join([number(row.value, digits), "*" if row.extrapolated else ""]),
            words.interval(row.low, row.high, digits),
            f"{row.n:,}",
            long(row.protocol),
            *[words.detail(row.details.get(name)) for name in extra],
        ]
        for series, row in rows
    ]
    head = ["model", "task", "length", "metric", "value", "interval", "n", "protocol"]
    caption = "Every row of results.json, and the details that are single values. * beyond the usable length."
    return table(caption, [*head, *[name.replace("_", " ") for name in extra]], body)


def _single(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _nested(block: Block) -> list[Markup]:
    """Tables of shares by depth and of losses by position, where rows have such details."""
    rows = [(series.label, row) for series in block.series for row in series.rows]
    depths = sorted({at for _, row in rows for at in row.details.get("by_depth", {})}, key=float)
    made = []
    if depths:
        shares = [
            [label, words.length(row.length), *[number(row.details["by_depth"].get(at), 2) for at in depths]]
            for label, row in rows
            if "by_depth" in row.details
        ]
        made.append(table("Share by depth, 0 the beginning.", ["model", "length", *depths], shares))
    # The end of a bucket is exclusive; the table shows the last position in it.
    buckets = [
        [
            label,
            words.length(row.length),
            f"{bucket['start']:,} to {bucket['stop'] - 1:,}",
            words.detail(bucket.get("tokens")),
            number(bucket["nats_per_token"], 3),
        ]
        for label, row in rows
        for bucket in row.details.get("buckets", [])
    ]
    if buckets:
        head = ["model", "length", "tokens before it", "tokens scored", "nats a token"]
        made.append(table("Loss by position in the window.", head, buckets))
    return made
