"""Draws the findings of probes: curves, bars and grids of one model, or of two models and their difference.

Where two models are compared, the second one in the report is the reference, the model "before". It is drawn first.
The difference is the number of the first model minus that of the reference. Colours and text are as in figures.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ctxext.probes.probe_finding import Bars, Curves, Grid, Number, Picture, ProbeReport
from ctxext.report.figures import COLOURS, MARKERS, WIDTH, drawing, log_axis, save, short, token_axis

KINDS = {"S": "#0072B2", "N": "#D55E00", "F": "#009E73", "s": "#56B4E9"}  # of a layer's letter (model/layout.py)
MEANINGS = {"S": "RoPE, sliding window", "N": "full, no positions", "F": "full, RoPE", "s": "sliding, no positions"}
_NUMBERS = 100  # a grid with at most this many cells shows its numbers too


@dataclass(frozen=True)
class Drawn:
    """A picture in a file: its probe, its caption, and its alternative text."""

    probe: str
    path: Path
    caption: str
    alt: str


def draw(report: ProbeReport, place: Path, prefix: str = "") -> list[Drawn]:
    """Draws each picture of a report into `place`, as <prefix><probe>-<picture>.png. Two models share one file."""
    made = []
    for result in report.results:
        # Group by the picture's name, the reference model first.
        shown: dict[str, list[tuple[str, Picture]]] = {}
        for model, finding in reversed(list(zip(report.models, result.findings, strict=True))):
            for picture in finding.pictures:
                shown.setdefault(picture.name, []).append((model, picture))
        for name, models in shown.items():
            path = place / f"{prefix}{result.probe}-{name}.png"
            first = models[-1][1]
            # The other model has no such picture: name the model in the title.
            if len(models) < len(report.models):
                models = [(models[0][0], replace(first, title=f"{first.title}: {models[0][0]} alone"))]
            with drawing():
                save(_DRAW[first.kind](models), path)
            models_text = " and ".join(model for model, _ in models)
            made.append(Drawn(result.probe, path, f"{first.title} ({models_text}).", _spoken(models)))
    return made


def _brief(name: str, most: int = 22) -> str:
    """The end of a model's name, short enough for a narrow picture. Paths differ at their ends."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _title(text: str, width: float) -> str:
    """A title broken into lines that fit in `width` inches."""
    return fill(short(text).replace("\n", ""), int(11.5 * width))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=160)
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
    return figure


def _curves(models: Sequence[tuple[str, Curves]]) -> Figure:
    """All lines in one panel, those of the reference model dashed; below it the differences of lines with one label."""
    # The panel of differences exists only where there is a difference. Each row of the legend adds 0.19 inches.
    picture, differences = models[-1][1], _differences(models)
    labels = list(dict.fromkeys(line.label for _, each in models for line in each.lines))
    count = len(labels) * len(models) + sum(each.level is not None for _, each in models)
    figure = _figure(1.3 * WIDTH, 3.0 + 0.19 * count + (1.7 if differences else 0))
    count_axes = 1 + bool(differences)
    axes = figure.subplots(count_axes, 1, squeeze=False, height_ratios=[1.7, 1][:count_axes])[:, 0]
    keys: list[Any] = []
    for number, (model, each) in enumerate(models):
        before = len(models) > 1 and number == 0
        for line in each.lines:
            # The label decides the colour, so that the same line of both models has one colour.
            look = _look(labels.index(line.label)) | ({"linestyle": "--", "mfc": "white"} if before else {})
            points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and (y > 0 or not each.log)]
            axes[0].plot([x for x, _ in points], [y for _, y in points], **look)
            name = f"{line.label}, {_brief(model)}" if len(models) > 1 else line.label
            keys.append((short(name), Line2D([], [], **look)))
    keys += _levels(axes[0], models)
    for label, x, y in differences:
        axes[1].plot(x, y, **_look(labels.index(label)))
    if differences:
        axes[1].axhline(0, color="0.4", linewidth=0.8)
        axes[1].set_ylabel(f"{_brief(models[-1][0])}\nless {_brief(models[0][0])}", fontsize=8)
    if picture.log:
        log_axis(axes[0], [y for _, each in models for line in each.lines for y in line.y if y is not None and y > 0])
    for ax in axes:
        if picture.x_tokens:
            token_axis(ax, {x for _, each in models for line in each.lines for x in line.x if x > 0})
        else:
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[-1].set_xlabel(picture.x_label)
    axes[0].set_ylabel(picture.y_label)
    axes[0].set_title(_title(picture.title, figure.get_figwidth() - 0.7), loc="left")
    if keys:
        figure.legend([handle for _, handle in keys], [name for name, _ in keys], loc="outside lower left")
    return figure


def _differences(models: Sequence[tuple[str, Curves]]) -> list[tuple[str, list[float], list[float]]]:
    """(label, x, y) of the lines that both models have, at the points where both have a number."""
    if len(models) < 2:
        return []
    before = {line.label: dict(zip(line.x, line.y, strict=True)) for line in models[0][1].lines}
    found = []
    for line in models[1][1].lines:
        other = before.get(line.label, {})
        points = [(x, y - other[x]) for x, y in zip(line.x, line.y, strict=True) if _both(y, other.get(x))]  # type: ignore[operator]
        if points:
            found.append((line.label, [x for x, _ in points], [y for _, y in points]))
    return found


def _both(a: Number, b: Number) -> bool:
    return a is not None and b is not None


def _bars(models: Sequence[tuple[str, Bars]]) -> Figure:
    """One bar per label, coloured by the kind of the layer; the reference model beside it, pale; differences below."""
    # Differences need bars with the same labels in both models.
    picture = models[-1][1]
    pairs = len(models) > 1 and models[0][1].labels == picture.labels
    figure = _figure(max(1.3 * WIDTH, 1.0 + 0.26 * len(picture.labels)), 3.0 + (1.5 if pairs else 0))
    axes = figure.subplots(1 + pairs, 1, squeeze=False, height_ratios=[1.7, 1][: 1 + pairs])[:, 0]
    places, width = range(len(picture.labels)), 0.8 / len(models)
    letters: dict[str, None] = {}
    for number, (_, each) in enumerate(models):
        # Bars of two models are side by side, and both are centred on the tick.
        look = {"hatch": "///", "alpha": 0.55} if len(models) > 1 and number == 0 else {}
        colours = [KINDS[letter] for letter in each.letters] or [COLOURS[number]] * len(each.labels)
        letters |= dict.fromkeys(each.letters)
        shift = (number - (len(models) - 1) / 2) * width
        for place, value, colour in zip(places, each.values, colours, strict=False):
            axes[0].bar(place + shift, math.nan if value is None else value, width, color=colour, **look)
    keys = [Patch(facecolor=KINDS[letter], label=f"{letter}: {MEANINGS[letter]}") for letter in letters]
    if len(models) > 1:
        keys += [
            Patch(facecolor="0.75", hatch="///", label=_brief(models[0][0])),
            Patch(facecolor="0.45", label=_brief(models[1][0])),
        ]
    keys += [handle for _, handle in _levels(axes[0], models)]
    if pairs:
        values = zip(models[0][1].values, picture.values, strict=True)
        differences = [b - a if a is not None and b is not None else math.nan for a, b in values]
        axes[1].bar(places, differences, 0.8, color=[KINDS[letter] for letter in picture.letters] or COLOURS[0])
        axes[1].axhline(0, color="0.4", linewidth=0.8)
        axes[1].set_ylabel(f"{_brief(models[-1][0])}\nless {_brief(models[0][0])}", fontsize=8)
    # At most about 40 tick labels, so that they do not overlap.
    every = max(1, math.ceil(len(picture.labels) / 40))
    for ax in axes:
        ax.set_xticks(list(places)[::every], picture.labels[::every])
        ax.grid(False, axis="x")
        ax.set_axisbelow(True)
    axes[-1].set_xlabel(picture.x_label)
    axes[0].set_ylabel(picture.y_label)
    axes[0].set_title(_title(picture.title, figure.get_figwidth() - 0.7), loc="left")
    if keys:
        figure.legend(handles=keys, loc="outside lower left", ncols=2)
    return figure


def _grid(models: Sequence[tuple[str, Grid]]) -> Figure:
    """Cells as colours, small grids with numbers; two models side by side, and their difference as a third panel."""
    # A difference needs grids with the same rows and columns.
    picture = models[-1][1]
    same = len(models) > 1 and (models[0][1].rows, models[0][1].columns) == (picture.rows, picture.columns)
    panels = [(model, each, _cells(each)) for model, each in models]
    shape = max(len(each.columns) for _, each in models), max(len(each.rows) for _, each in models)
    count = len(models) + same
    figure = _figure(0.7 + count * max(2.4, 0.9 + 0.2 * shape[0]), 1.5 + max(1.6, 0.2 * shape[1]))
    axes = figure.subplots(1, count, squeeze=False)[0]
    # One scale for both models: it includes 0 and ends at `highest`, or at the largest cell where that is None.
    largest = max((x for _, _, cells in panels for row in cells for x in row if math.isfinite(x)), default=1.0)
    smallest = min((x for _, _, cells in panels for row in cells for x in row if math.isfinite(x)), default=0.0)
    scale = Normalize(min(0.0, smallest), picture.highest if picture.highest is not None else largest or 1.0)
    for ax, (model, each, cells) in zip(axes, panels, strict=False):
        mesh = _cells_drawn(ax, each, cells, scale, "cividis", _brief(model) if len(models) > 1 else "")
    figure.colorbar(mesh, ax=list(axes[: len(models)]), fraction=0.04, pad=0.02).outline.set_visible(False)
    if same:
        # The scale of the difference is symmetric, so that white means no difference.
        differences = [
            [b - a for a, b in zip(*rows, strict=True)] for rows in zip(panels[0][2], panels[1][2], strict=True)
        ]
        most = max((abs(x) for row in differences for x in row if math.isfinite(x)), default=0.0) or 1.0
        mesh = _cells_drawn(axes[-1], picture, differences, Normalize(-most, most), "RdBu_r", "difference")
        figure.colorbar(mesh, ax=axes[-1], fraction=0.08, pad=0.02).outline.set_visible(False)
    figure.suptitle(_title(picture.title, figure.get_figwidth()), x=0.01, ha="left", fontsize=9.5)
    return figure


def _cells(grid: Grid) -> list[list[float]]:
    return [[math.nan if cell is None else cell for cell in row] for row in grid.cells]


def _cells_drawn(ax: Axes, grid: Grid, cells: list[list[float]], scale: Normalize, colours: str, title: str) -> Any:
    palette = colormaps[colours]
    ax.set_facecolor("0.9")
    mesh = ax.pcolormesh(cells, norm=scale, cmap=palette, edgecolors="white", linewidth=0.4)
    if sum(map(len, cells)) <= _NUMBERS:
        for r, row in enumerate(cells):
            for c, cell in enumerate(row):
                # Black or white text by the luminance of the cell (Rec. 601 weights).
                red, green, blue, _ = palette(scale(cell)) if math.isfinite(cell) else (1, 1, 1, 1)
                ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
                shown = _cell_text(cell)
                ax.text(c + 0.5, r + 0.5, shown, ha="center", va="center", fontsize=6.5, color=ink)
    # At most 32 tick labels on an axis. A row's label is coloured by the kind of the layer.
    rows, columns = (math.ceil(len(names) / 32) for names in (grid.rows, grid.columns))
    letters = grid.letters or " " * len(grid.rows)
    names = [f"{name} {letter}".rstrip() for name, letter in zip(grid.rows, letters, strict=True)]
    ax.set_xticks([c + 0.5 for c in range(0, len(grid.columns), columns)], grid.columns[::columns], fontsize=7)
    ax.set_yticks([r + 0.5 for r in range(0, len(grid.rows), rows)], names[::rows], fontsize=7)
    for label, letter in zip(ax.get_yticklabels(), letters[::rows], strict=True):
        label.set_color(KINDS.get(letter, "black"))
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.invert_yaxis()
    ax.set_xlabel(grid.x_label)
    ax.set_ylabel(grid.y_label)
    ax.set_title(title, loc="left", fontsize=9)
    return mesh


def _cell_text(cell: float) -> str:
    if not math.isfinite(cell):
        return "none"
    return "0" if abs(cell) < 5e-4 else f"{cell:.0f}" if abs(cell) >= 10 else f"{cell:.2g}"


def _levels(ax: Axes, models: Sequence[tuple[str, Curves]] | Sequence[tuple[str, Bars]]) -> list[tuple[str, Line2D]]:
    """Draws the level of each model, or one line where all agree. The reference model's line has longer dashes.

    Returns the entries for the legend.
    """
    given = [(model, each.level, each.level_name) for model, each in models if each.level is not None]
    alike = len({level for _, level, _ in given}) == 1
    keys = []
    for number, (model, level, name) in enumerate(given[:1] if alike else given):
        style = (0, (5, 3)) if not alike and number == 0 else ":"
        ax.axhline(level, color="0.35", linestyle=style, linewidth=1.3)
        label = name if alike else f"{name}, {_brief(model)}"
        keys.append((label, Line2D([], [], color="0.35", linestyle=style, label=label)))
    return keys


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}


def _spoken(models: Sequence[tuple[str, Picture]]) -> str:
    """Alternative text: the least and the greatest number of each model. All numbers are in probes.json."""
    parts = []
    for model, picture in models:
        if isinstance(picture, Curves):
            values = [y for line in picture.lines for y in line.y]
        elif isinstance(picture, Bars):
            values = list(picture.values)
        else:
            values = [cell for row in picture.cells for cell in row]
        known = [value for value in values if value is not None]
        span = f"{min(known):.3g} to {max(known):.3g}" if known else "no number"
        parts.append(f"{model}: {picture.y_label}, {span}" if picture.kind != "grid" else f"{model}: {span}")
    return f"{models[-1][1].title}. {'; '.join(parts)}."


_DRAW: dict[str, Any] = {"curves": _curves, "bars": _bars, "grid": _grid}
