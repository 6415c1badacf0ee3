"""The pictures of a suite: which numbers are drawn, and the alternative text for readers who cannot see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from markupsafe import Markup

from ctxext.evals.compare import LOWER_IS_BETTER
from ctxext.evals.item_runner import ResultRow
from ctxext.report import figures, words
from ctxext.report.figures import FigureLine, Point
from ctxext.report.markup import picture
from ctxext.report.run_records import Block, Series
from ctxext.units import format_tokens

Numbers = dict[str, int]  # label -> number that decides its colour and marker
LENGTH_AXIS = "length, tokens (k = 1,024)"


def draw(stem: Path, block: Block, numbers: Numbers) -> list[Markup]:
    """Draws every picture of a block into files whose names begin with `stem`. Returns them as HTML."""
    return PICTURES[block.suite](stem, block, numbers) if block.suite in PICTURES else []


def _perplexity(stem: Path, block: Block, numbers: Numbers) -> list[Markup]:
    return [*_against_length(stem, block, numbers), *_by_position(stem, block, numbers)]


def _against_length(
    stem: Path, block: Block, numbers: Numbers, limits: tuple[float, float] | None = None
) -> list[Markup]:
    """The number of the whole suite against length, one line per model; nothing where there are no numbers."""
    lines = [
        FigureLine(_usable(s), [_point(row) for row in _measured(s)], numbers[s.label], [s.model.usable_length])
        for s in block.series
    ]
    if not any(line.points for line in lines):
        return []
    # Perplexity and LongPPL, where lower is better, can span orders of magnitude: logarithmic axis.
    metric, log = words.metric(block), block.suite in LOWER_IS_BETTER
    spoken = "; ".join(f"{s.label}: {', '.join(map(_value_text, _measured(s))) or 'none'}" for s in block.series)
    caption = f"{words.title(block.suite)}: {metric}, {words.better(block)}, against length; {words.protocol(block)}."
    sketch = partial(
        figures.curves, lines=lines, x_label=LENGTH_AXIS, y_label=metric, tokens=True, log=log, limits=limits
    )
    path = stem.with_name(f"{stem.name}-length.svg")
    return [picture(path, sketch, f"{metric} against length. {spoken}.", caption)]


def _usable(series: Series) -> str:
    return f"{series.label}, to {figures.tokens_text(series.model.usable_length)}"


def _measured(series: Series) -> list[ResultRow]:
    return sorted((row for row in series.whole().values() if row.value is not None), key=lambda row: row.length)


def _point(row: ResultRow) -> Point:
    assert row.value is not None
    return Point(row.length, row.value, row.low, row.high, row.extrapolated)


def _value_text(row: ResultRow) -> str:
    beyond = " (beyond the usable length)" if row.extrapolated else ""
    return f"{row.value:.{words.digits(row.suite)}f} at {format_tokens(row.length)}{beyond}"


def _by_position(stem: Path, block: Block, numbers: Numbers) -> list[Markup]:
    """Loss by position at the greatest length that all models share. Each point is in the middle of its bucket."""
    length, lines = block.shared_length or 0, list[FigureLine]()
    for series in block.series:
        # A bucket without tokens has no loss.
        row = series.whole().get(length)
        buckets = [b for b in row.details.get("buckets", []) if b["nats_per_token"] is not None] if row else []
        points = [Point(middle(b["start"], b["stop"]), b["nats_per_token"]) for b in buckets]
        if points:
            lines.append(FigureLine(_usable(series), points, numbers[series.label], [series.model.usable_length]))
    if not lines:
        return []
    sketch = partial(
        figures.curves, lines=lines, x_label="tokens before it in the window", y_label="nats a token", tokens=True
    )
    what = f"Loss by position in windows of {format_tokens(length)} tokens"
    caption = f"{what}, a point in the middle of its bucket; {words.protocol(block, length)}."
    return [picture(stem.with_name(f"{stem.name}-position.svg"), sketch, f"{what}. {spoken_lines(lines)}.", caption)]


def middle(start: float, stop: float) -> float:
    """Returns the middle of a bucket of positions on a logarithmic axis: the geometric mean of its ends."""
    return float((max(start, 1) * stop) ** 0.5)


def spoken_lines(lines: Sequence[FigureLine]) -> str:
    """Returns the first and the last point of every line as alternative text."""
    ends = [(line.label, line.points[0], line.points[-1]) for line in lines if line.points]
    return "; ".join(f"{name}: from {a.y:,.4g} at {a.x:,.0f} to {b.y:,.4g} at {b.x:,.0f}" for name, a, b in ends)


def _depths(stem: Path, block: Block, numbers: Numbers) -> list[Markup]:
    """Share of cases against length, then a heatmap of length and depth per model, all on one scale."""
    made = _against_length(stem, block, numbers, (-0.04, 1.04))
    for series in block.series:
        rows = [row for _, row in sorted(series.whole().items()) if row.details.get("by_depth")]
        depths = sorted({at for row in rows for at in row.details["by_depth"]}, key=float)
        cells = [[row.details["by_depth"].get(depth) for row in rows] for depth in depths]
        if cells:
            path = stem.with_name(f"{stem.name}-depth-{numbers[series.label] + 1}.png")
            what = f"{words.metric(block)} by length and depth, 0 the beginning; {_cases(rows)}"
            made.append(_heatmap(path, series, rows, depths, cells, "depth", what, 1.0))
    return made


def _cases(rows: Sequence[ResultRow]) -> str:
    """The number of cases per cell; per length where cells differ."""
    each = {row.n / len(row.details["by_depth"]) for row in rows}
    if len(each) == 1 and min(each).is_integer():
        return f"n = {min(each):,.0f} a cell"
    return f"n over all depths = {', '.join(f'{row.n:,} at {format_tokens(row.length)}' for row in rows)}"


def _ruler(stem: Path, block: Block, numbers: Numbers) -> list[Markup]:
    """The average against length, then a heatmap of percent by task and length per model."""
    made = _against_length(stem, block, numbers, (-4.0, 104.0))
    for series in block.series:
        # Lengths are columns, tasks are rows. The task "" is the average; it comes last.
        whole = [row for _, row in sorted(series.whole().items())]
        tasks = sorted(dict.fromkeys(row.task for row in series.rows), key=lambda task: task == "")
        found = {(row.task, row.length): row.value for row in series.rows}
        cells = [[found.get((task, row.length)) for row in whole] for task in tasks]
        if whole:
            counts = " or ".join(f"{n:,}" for n in sorted({row.n for row in series.rows if row.task}))
            path = stem.with_name(f"{stem.name}-tasks-{numbers[series.label] + 1}.png")
            what = f"{words.metric(block)} by task and length, the average last; n = {counts or 'unknown'} a cell"
            made.append(_heatmap(path, series, whole, [task or "average" for task in tasks], cells, "", what, 100.0))
    return made


def _heatmap(
    path: Path,
    series: Series,
    rows: Sequence[ResultRow],
    names: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    y_label: str,
    what: str,
    highest: float,
) -> Markup:
    # A column with * is a length beyond the usable length. Shares have two decimals, percents none.
    columns = [f"{figures.tokens_text(row.length)}{'*' if row.extrapolated else ''}" for row in rows]
    digits, beyond = (2 if highest == 1 else 0), any(row.extrapolated for row in rows)
    spoken = "; ".join(
        f"{name}: {', '.join('none' if x is None else f'{x:.{digits}f}' for x in line)}"
        for name, line in zip(names, cells, strict=True)
    )
    sketch = partial(
        figures.heatmap,
        title=series.label,
        columns=columns,
        rows=names,
        cells=cells,
        x_label=f"length, tokens{' (* beyond the usable length)' if beyond else ''}",
        y_label=y_label,
        highest=highest,
        digits=digits,
    )
    alt = f"{series.label}: {what}. Lengths {', '.join(columns)}. {spoken}."
    caption = f"{series.label}: {what}; {series.model.layout}; {series.model.positions}."
    return picture(path, sketch, alt, caption)


PICTURES: dict[str, Callable[[Path, Block, Numbers], list[Markup]]] = {
    "perplexity": _perplexity,
    "longppl": _against_length,
    "passkey": _depths,
    "niah": _depths,
    "ruler": _ruler,
}
