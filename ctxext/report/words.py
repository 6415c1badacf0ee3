"""Names of what was measured and the text form of its numbers, shared by tables and pictures of a report."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ctxext.evals.compare import LOWER_IS_BETTER
from ctxext.evals.item_runner import ResultRow
from ctxext.report.markup import bounds, data, join, missing, number, small
from ctxext.report.run_records import Block, Series
from ctxext.units import format_tokens

TITLES = {
    "perplexity": "Perplexity",
    "longppl": "LongPPL",
    "passkey": "Passkey",
    "niah": "Needle in a haystack",
    "ruler": "RULER",
    "longbench": "LongBench",
    "short": "Short tasks",
}
DIGITS = {"perplexity": 2, "longppl": 2, "passkey": 2, "niah": 2, "ruler": 1, "longbench": 1}
COUNTED = {"perplexity": "tokens scored", "longppl": "key tokens"}


def title(suite: str) -> str:
    """Returns the title of a suite."""
    return TITLES.get(suite, suite)


def digits(suite: str) -> int:
    """Returns how many decimals are shown. The attribute `value` of <data> has all digits."""
    return DIGITS.get(suite, 3)


def metric(block: Block) -> str:
    """Returns the name of the metric, with its unit where it has one."""
    names = dict.fromkeys(row.metric for series in block.series for row in series.rows if row.task == "")
    unit = ", percent" if block.suite in ("ruler", "longbench") else ""
    return f"{', '.join(names) or title(block.suite)}{unit}"


def better(block: Block) -> str:
    """Returns whether higher or lower values are better, in words."""
    return "lower is better" if block.suite in LOWER_IS_BETTER else "higher is better"


def protocol(block: Block, length: int | None = None) -> str:
    """Returns the protocol of the rows at `length` (None: at all lengths).

    A part that differs between lengths shows its values with slashes between them.
    """
    rows = [row for s in block.series for row in s.rows if row.task == "" and length in (None, row.length)]
    found = list(dict.fromkeys(row.protocol for row in sorted(rows, key=lambda row: row.length)))
    # Protocols with the same number of parts are merged part by part; others are listed one after the other.
    parts = [text.split(", ") for text in found]
    if len({len(part) for part in parts}) != 1:
        return "; ".join(found) or "none"
    return ", ".join(" / ".join(dict.fromkeys(column)) for column in zip(*parts, strict=True))


def request_text(block: Block) -> str:
    """Returns the requested fields of the suite and the dtype as text."""
    return ", ".join(f"{name} {plain(value)}" for name, value in block.requested.items() if value is not None)


def versions(block: Block) -> str:
    """Returns the versions that the runs of a block were made with."""
    return "; ".join(dict.fromkeys(series.run.versions for series in block.series))


def plain(value: Any) -> str:
    """Returns a value of a spec as text on one line."""
    if isinstance(value, list | tuple):
        return " ".join(plain(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def length(count: int) -> str:
    """Returns a length in tokens as text; a dash where the suite has no length."""
    return format_tokens(count) if count > 0 else "–"


def value(row: ResultRow | None) -> Markup:
    """Returns the cell of a number: the value, * where it is extrapolated, the interval and the count n."""
    if row is None:
        return missing("not measured")
    n, few = digits(row.suite), row.details.get("few_keys")
    star = "*" if row.extrapolated and row.value is not None else ""
    between = [small(interval(row.low, row.high, n))] if row.low is not None and row.high is not None else []
    return join([number(row.value, n), star, *between, small(f"n = {row.n:,}"), *[small("few keys")] * bool(few)])


def interval(low: float | None, high: float | None, n: int) -> Markup:
    """Returns [low, high] with n digits; none where a bound is unknown."""
    if low is None or high is None:
        return number(None, n)
    return bounds(number(low, n), number(high, n))


def detail(value: Any) -> Markup:
    """Returns a single value of a row's details as a cell, whatever its type is."""
    if isinstance(value, float):
        return data(f"{value:,.5g}", value)
    return missing("none") if value is None else join([plain(value)])


def headed(series: Series) -> Markup:
    """Returns the header cell of a model: its label, layout and positions."""
    return join([series.label, small(f"{series.model.layout}; {series.model.positions}")])
