"""Figures drawn with matplotlib's object interface: narrow enough for a phone, same numbers give the same bytes.

Colour is never the only sign: every line has its own marker, every cell has its number. Text is drawn as paths, so that
a picture needs no font. The background is white whatever the background of the page is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH = 4.4  # inches: 422 CSS pixels, about a phone's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # Okabe and Ito (2008)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": "0.4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.markersize": 5.5,
    "lines.linewidth": 1.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "ctxext",
    "figure.facecolor": "white",
    "text.parse_math": False,  # a $ in a name is not math
}
_DEFAULTS = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
_LONGEST_LABEL = 46  # characters per line of a legend


@dataclass(frozen=True)
class Point:
    """One point of a line. `low`, `high`: the interval of `y`, where known. `hollow`: beyond the usable length."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class FigureLine:
    """One line of a figure.

    number  decides colour and marker, so that a model looks the same in every picture
    marks   x values that get a vertical line, such as the usable length
    style   "--" is a second kind of line
    behind  points drawn thin behind the line, such as the steps that `points` are means of
    """

    label: str
    points: Sequence[Point]
    number: int
    marks: Sequence[float] = ()
    style: str = "-"
    behind: Sequence[Point] = ()


def curves(
    path: Path,
    lines: Sequence[FigureLine],
    x_label: str,
    y_label: str,
    *,
    tokens: bool = False,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws `lines` into `path` (SVG). `tokens`: x counts tokens, on a log2 axis. `log`: y is logarithmic.

    Beyond the usable length of a model a line is dashed and its markers are hollow. Points that are not finite, or not
    above 0 on a logarithmic axis, are left out.
    """
    with drawing():
        # The legend is below the axes: each of its lines adds 0.19 inches, long labels take two.
        lines = [_drawable(line, log) for line in lines]
        figure = Figure(figsize=(WIDTH, 2.7 + 0.19 * sum(1 + ("\n" in short(line.label)) for line in lines)))
        figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
        ax = figure.add_subplot()
        for line in lines:
            _draw(ax, line, _dodge(lines, line) if tokens else 1.0)
        if log:
            log_axis(ax, [point.y for line in lines for point in (*line.points, *line.behind)])
        if tokens:
            token_axis(ax, {point.x for line in lines for point in line.points})
        else:
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if limits is not None:
            ax.set_ylim(*limits)
        # After all lines and limits: only marks inside the x range are drawn.
        marks = sorted({mark for line in lines for mark in line.marks})
        _mark(ax, marks)
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        _legend(figure, lines, marked=bool(marks))
        save(figure, path)


def heatmap(
    path: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    x_label: str,
    y_label: str,
    *,
    highest: float,
    digits: int,
) -> None:
    """Draws `cells[row][column]`, values from 0 to `highest`, as colours and numbers into `path` (PNG).

    `digits`: decimals of the numbers. None is a grey cell with the text "none".
    """
    with drawing():
        # Inches: room for the longest row name and 0.44 per column, so that numbers do not overlap.
        widest = max(len(row) for row in rows) * 0.075
        width = max(WIDTH, 1.5 + widest + 0.44 * len(columns))
        figure = Figure(figsize=(width, 1.35 + 0.33 * len(rows)), dpi=220)
        figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
        ax = figure.add_subplot()
        # NaN cells are transparent and show the grey background.
        scale, colours = Normalize(0, highest), colormaps["cividis"]
        values = [[math.nan if cell is None else cell for cell in row] for row in cells]
        ax.set_facecolor("0.94")
        mesh = ax.pcolormesh(values, norm=scale, cmap=colours, edgecolors="white", linewidth=1.5)
        for r, row in enumerate(cells):
            for c, cell in enumerate(row):
                # White text on the dark half of cividis, black text on the light half.
                dark = cell is not None and scale(cell) < 0.55
                shown = "none" if cell is None else f"{cell:.{digits}f}"
                ax.text(
                    c + 0.5, r + 0.5, shown, ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
        # RULER's last row is the average of the tasks above it: separate it by a line.
        if rows[-1] == "average":
            ax.axhline(len(rows) - 1, color="black", linewidth=1.5)
        ax.set_xticks([c + 0.5 for c in range(len(columns))], columns)
        ax.set_yticks([r + 0.5 for r in range(len(rows))], rows)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.invert_yaxis()
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        ax.set_title(short(title), loc="left")
        bar = figure.colorbar(mesh, ax=ax, fraction=0.045, pad=0.02, ticks=[0, highest / 2, highest])
        bar.outline.set_visible(False)
        save(figure, path)


def short(label: str) -> str:
    """Returns a label that fits in a picture: at most two lines of printable characters."""
    plain = "".join(c if c.isprintable() else " " for c in label)
    if len(plain) > 2 * _LONGEST_LABEL:
        plain = f"{plain[: _LONGEST_LABEL - 2]} … {plain[-_LONGEST_LABEL + 4 :]}"
    if len(plain) > _LONGEST_LABEL:
        plain = f"{plain[:_LONGEST_LABEL]}\n{plain[_LONGEST_LABEL:]}"
    return f" {plain}" if plain.startswith("_") else plain  # matplotlib hides labels that start with _


def tokens_text(count: float) -> str:
    """Returns a token count as an axis label: 512, 1k, 1.5k, 100k, 1M (k = 1,024)."""
    for size, unit in ((1024**2, "M"), (1024, "k")):
        if count >= size and count % (size // 4) == 0:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


@contextmanager
def drawing() -> Iterator[None]:
    """Draws with matplotlib's defaults and ours, and ignores the user's settings.

    A character that the font lacks is drawn as a box, without a warning.
    """
    with warnings.catch_warnings(), matplotlib.rc_context(_DEFAULTS | _RC):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def save(figure: Figure, path: Path) -> None:
    """Writes a figure to `path`. Equal figures give equal bytes."""
    # Remove metadata such as the date, so that the same numbers give the same bytes.
    names = ("Date", "Creator", "Format", "Type") if path.suffix == ".svg" else ("Software",)
    figure.savefig(path, metadata=dict.fromkeys(names))


def _drawable(line: FigureLine, log: bool) -> FigureLine:
    points, behind = (
        [p for p in part if math.isfinite(p.y) and (p.y > 0 or not log)] for part in (line.points, line.behind)
    )
    return replace(line, points=points, behind=behind)


def _look(line: FigureLine) -> dict[str, Any]:
    return {"color": COLOURS[line.number % len(COLOURS)], "marker": MARKERS[line.number % len(MARKERS)]}


def _legend(figure: Figure, lines: Sequence[FigureLine], *, marked: bool) -> None:
    """Adds a legend below the axes: one row per line, and the meaning of dotted and dashed lines where they occur."""
    keys = [(line.label, Line2D([], [], linestyle=line.style, **_look(line))) for line in lines]
    if marked:
        keys.append(("usable length (to …)", Line2D([], [], color="0.45", linestyle=":")))
    if any(point.hollow for line in lines for point in line.points):
        keys.append(("beyond the usable length", Line2D([], [], color="0.45", ls="--", marker="o", mfc="white")))
    labels, handles = [short(label) for label, _ in keys], [handle for _, handle in keys]
    figure.legend(handles, labels, loc="outside lower left", handlelength=2.6, borderaxespad=0.2, labelspacing=0.35)


def _dodge(lines: Sequence[FigureLine], line: FigureLine) -> float:
    """The factor for x that keeps the intervals of several lines at one length from covering each other."""
    if not any(point.low is not None for each in lines for point in each.points):
        return 1.0
    return float(2 ** (0.07 * (lines.index(line) - (len(lines) - 1) / 2)))


def _draw(ax: Axes, line: FigureLine, dodge: float) -> None:
    # The raw steps first, so that the line lies on top of them.
    look, points = _look(line), list(line.points)
    thin = [(point.x, point.y) for point in line.behind]
    ax.plot([x for x, _ in thin], [y for _, y in thin], color=look["color"], linewidth=0.6, alpha=0.45)
    # The dashed part starts at the last point of the solid part, so that the two are joined. That point has its marker
    # already: skip it. A solid line has at most about 12 markers.
    sure = [point for point in points if not point.hollow]
    beyond = [*sure[-1:], *(point for point in points if point.hollow)]
    every = max(1, len(points) // 12)
    for part, style, skip in ((sure, line.style, 0), (beyond, (0, (3, 2)), len(sure[-1:]))):
        if len(part) <= skip:
            continue
        marked = range(skip, len(part), every) if part is sure else range(skip, len(part))
        ax.plot(
            [point.x * dodge for point in part],
            [point.y for point in part],
            linestyle=style,
            markevery=list(marked),
            markerfacecolor=look["color"] if part is sure else "white",
            **look,
        )
    for point in points:
        if point.low is not None and point.high is not None:
            ax.vlines(point.x * dodge, point.low, point.high, color=look["color"], linewidth=1.0, alpha=0.6)


def log_axis(ax: Axes, values: Sequence[float]) -> None:
    """Makes y logarithmic where the values span a factor of 5 or more: else ticks at 1, 2, 5 are too few."""
    if max(values, default=1) < 5 * min(values, default=1):
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def token_axis(ax: Axes, counts: set[float]) -> None:
    """Makes x a log2 axis of tokens with at most nine ticks.

    The ticks are at every count, or at powers of two where some counts are not whole numbers (middles of buckets).
    """
    ticks = sorted(counts)
    if not all(float(count).is_integer() for count in ticks):
        ticks = [2.0**n for n in range(math.ceil(math.log2(ticks[0])), math.floor(math.log2(ticks[-1])) + 1)]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 9) or 1]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    # A single length: show a factor of 2 on both sides.
    if len(counts) == 1:
        ax.set_xlim(min(counts) / 2, min(counts) * 2)


def _mark(ax: Axes, marks: Sequence[float]) -> None:
    low, high = ax.get_xlim()
    for mark in marks:
        if low <= mark <= high:
            ax.axvline(mark, color="0.45", linestyle=":", linewidth=1.2, zorder=0)
