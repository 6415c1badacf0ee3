"""What attention.py measured as Markdown and as a plot. Every number and every verdict is computed from the runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from measure_attention import Cell, D, H, Run, Way

from ctxext.ops.cost import attention_pairs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Results = dict[tuple[str, bool], dict[int, dict[str, Cell]]]  # (dtype, with backward) -> T -> row -> numbers
Roofs = tuple[float, float]  # bytes/s of a copy, FLOP/s of a matmul

S2, S2_FIXED, SLIDING, DENSE = "S², ctxext", "S², G = 2,048 (fixed), ctxext", "sliding 128, ctxext", "dense causal SDPA"
BASE = {"S²": S2, "sliding": SLIDING, "dense": S2, "documents": "documents, ctxext blocked"}  # whom ratios are to
TARGET_LENGTH = 16 * 1024
RATIO_TARGETS = [  # faster row, slower row, wanted ratio of their times
    (S2, "S², roll + masked SDPA", 2.3),
    (S2, "S², roll + eager (leaks)", 6.0),
    (S2, DENSE, 3.5),
    (SLIDING, "sliding 128, transformers", 25.0),
    (SLIDING, DENSE, 12.0),
]
LINEAR = 2.2  # at most, from T to 2 T; 2.0 is linear
BOUND = 2.0  # sliding on a GPU, against the time that its bytes need
COLOURS = {"S²": "#0072B2", "S² fixed": "#56B4E9", "sliding": "#D55E00", "dense": "#000000", "documents": "#009E73"}
STYLES = [("--", "o"), (":", "s"), ("-.", "^"), ((0, (5, 1)), "D"), ((0, (1, 1)), "v")]  # by turns within a family


def report(header: str, rows: dict[str, Way], results: Results, roofs: Roofs | None) -> str:
    lines = ["# Attention: time and memory", "", header, ""]
    lines += ["A cell has the median time (of so many repetitions) and the peak memory beyond the inputs; then both as"]
    lines += ["multiples of ctxext's first row for the same pattern; dense causal SDPA as multiples of S², ctxext.", ""]
    for (dtype, backward), by_length in results.items():
        if by_length:
            lines += [f"## {direction(backward).capitalize()}, {dtype}", "", *table(rows, by_length), ""]
    lines += ["## Growth", "", *growth_table(results), ""]
    lines += ["## Targets", "", *(gpu_targets(results, roofs) if roofs else cpu_targets(results)), ""]
    if roofs:
        lines += ["## Against the machine", "", *roof_table(rows, results, roofs), ""]
    return "\n".join(lines).rstrip() + "\n"


def direction(backward: bool) -> str:
    return "forward and backward" if backward else "forward, no gradients"


def table(rows: dict[str, Way], by_length: dict[int, dict[str, Cell]]) -> list[str]:
    lines = head(by_length)
    for name, way in rows.items():
        cells = [cell_text(name, BASE.get(way.family, name), by_length[T]) for T in by_length]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def head(by_length: dict[int, dict[str, Cell]]) -> list[str]:
    return ["| | " + " | ".join(f"T = {T:,}" for T in by_length) + " |", "|---|" + "---|" * len(by_length)]


def cell_text(name: str, against: str, cells: dict[str, Cell]) -> str:
    cell, base = cells[name], cells[against]
    if isinstance(cell, str):
        return cell.replace("|", "/")
    text = f"{duration(cell.seconds)} ({cell.repetitions}), {cell.memory / 2**20:,.0f} MiB"
    if name == against or isinstance(base, str):
        return text
    return f"{text}; {cell.seconds / base.seconds:.1f}x time, {cell.memory / max(base.memory, 1):.1f}x memory"


def duration(seconds: float) -> str:
    """Three digits: 5.64 s, 114 ms, 0.0480 ms."""
    number, unit = (seconds, "s") if seconds >= 1 else (seconds * 1000, "ms")
    digits = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 4
    return f"{number:.{digits}f} {unit}"


def pair(by_length: dict[int, dict[str, Cell]], T: int, first: str, second: str) -> tuple[Run, Run] | None:
    """Two rows at one length, if both were measured."""
    a, b = (by_length.get(T, {}).get(name) for name in (first, second))
    return (a, b) if isinstance(a, Run) and isinstance(b, Run) else None


def doublings(by_length: dict[int, dict[str, Cell]], name: str) -> Iterator[tuple[int, float, float]]:
    """(T, time, memory): what 2 T takes over what T takes."""
    for T in by_length:
        before, after = by_length[T].get(name), by_length.get(2 * T, {}).get(name)
        if isinstance(before, Run) and isinstance(after, Run):
            yield T, after.seconds / before.seconds, after.memory / max(before.memory, 1)


def growth_table(results: Results) -> list[str]:
    lines = [
        "From T to 2 T, forward and backward: 2.0 is linear, 4.0 quadratic. Pairs are the (query, key) pairs of the"
    ]
    lines += ["pattern; with G fixed they grow a little faster than T while a row has few groups.", ""]
    lines += ["| | dtype | from T to 2 T | time | memory | pairs |", "|---|---|---|---|---|---|"]
    for name in (SLIDING, S2_FIXED):
        for (dtype, backward), by_length in results.items():
            for T, seconds, memory in doublings(by_length, name) if backward else ():
                pairs = pairs_of(name, 2 * T) / pairs_of(name, T)
                lines.append(
                    f"| {name} | {dtype} | {T:,} to {2 * T:,} | {seconds:.2f}x | {memory:.2f}x | {pairs:.2f}x |"
                )
    return lines


def pairs_of(name: str, T: int) -> int:
    """(query, key) pairs of all heads."""
    if name.startswith("sliding"):
        return H * attention_pairs(T, 128)
    if name.startswith("S²"):
        G = 2048 if name == S2_FIXED else T // 4
        return H // 2 * sum(attention_pairs(T, None, G, shifted=shifted) for shifted in (False, True))
    return H * attention_pairs(T)


def cpu_targets(results: Results) -> list[str]:
    by_length = results.get(("float32", True), {})
    lines = [f"fp32, forward and backward; ratios at T = {TARGET_LENGTH:,}, growth as the largest of all doublings."]
    lines += ["", "| target | measured | verdict |", "|---|---|---|"]
    for fast, slow, wanted in RATIO_TARGETS:
        runs = pair(by_length, TARGET_LENGTH, fast, slow)
        measured = runs[1].seconds / runs[0].seconds if runs else None
        text = "not measured" if measured is None else f"{measured:.1f}x"
        lines.append(f"| {fast} >= {wanted:g}x faster than {slow} | {text} | {verdict(measured, least=wanted)} |")
    for name, what, index in [(SLIDING, "memory", 2), (SLIDING, "time", 1), (S2_FIXED, "time", 1)]:
        worst = max((growth[index] for growth in doublings(by_length, name)), default=None)
        text = "not measured" if worst is None else f"{worst:.2f}x"
        lines.append(
            f"| {name}: {what} linear in T, <= {LINEAR}x per doubling | {text} | {verdict(worst, most=LINEAR)} |"
        )
    return lines


def verdict(measured: float | None, least: float = 0.0, most: float = float("inf")) -> str:
    if measured is None:
        return ""
    return "met" if least <= measured <= most else "**missed**"


def gpu_targets(results: Results, roofs: Roofs) -> list[str]:
    """The best of ctxext's sliding rows at the largest length, in bf16."""
    lines = [
        f"| target (bf16, largest T): sliding within {BOUND:g}x of its bytes at copy bandwidth | measured | verdict |"
    ]
    lines.append("|---|---|---|")
    for backward in (False, True):
        by_length = results.get(("bfloat16", backward), {})
        T = max(by_length, default=0)
        rows = {name: cell for name, cell in by_length.get(T, {}).items() if name.startswith(SLIDING)}
        times = {
            cell.seconds / sliding_bound(T, backward, 2, roofs): n for n, cell in rows.items() if isinstance(cell, Run)
        }
        best = min(times, default=None)
        text = "not measured" if best is None else f"{best:.1f}x ({times[best]}, T = {T:,})"
        lines.append(f"| {direction(backward)} | {text} | {verdict(best, most=BOUND)} |")
    return lines


def sliding_bound(T: int, backward: bool, item: int, roofs: Roofs) -> float:
    """Seconds to move q, k, v, o once; and q, k, v, o, do, dq, dk, dv in the backward."""
    return (12 if backward else 4) * T * H * D * item / roofs[0]


def roof_table(rows: dict[str, Way], results: Results, roofs: Roofs) -> list[str]:
    """bf16: sliding as a multiple of its bandwidth bound, S² and dense as TFLOP/s of the pairs they need."""
    lines = [f"bf16. A copy moves {roofs[0] / 1e12:.2f} TB/s; a matmul of 8,192³ does {roofs[1] / 1e12:.0f} TFLOP/s."]
    lines += ["A pair and head costs 4 D FLOPs forward, 14 D forward and backward; nothing else is counted.", ""]
    for backward in (False, True):
        by_length = results.get(("bfloat16", backward), {})
        lines += [f"{direction(backward).capitalize()}:", "", *head(by_length)]
        for name, way in rows.items():
            if way.family != "documents":
                cells = [roof_text(name, way, by_length[T][name], T, backward, roofs) for T in by_length]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def roof_text(name: str, way: Way, cell: Cell, T: int, backward: bool, roofs: Roofs) -> str:
    if isinstance(cell, str):
        return ""
    if way.family == "sliding":
        return f"{cell.seconds / sliding_bound(T, backward, 2, roofs):.1f}x its bound"
    flops = pairs_of(name, T) * D * (14 if backward else 4) / cell.seconds
    return f"{flops / 1e12:.0f} TFLOP/s, {flops / roofs[1]:.0%}"


def plot(path: Path, header: str, rows: dict[str, Way], results: Results) -> None:
    """Time of forward and backward against T, a panel for each dtype; ctxext's rows solid and thick."""
    panels = [(dtype, by_length) for (dtype, backward), by_length in results.items() if backward and by_length]
    cells = [by_name for _, by_length in panels for by_name in by_length.values()]
    rows = {name: way for name, way in rows.items() if any(isinstance(by_name[name], Run) for by_name in cells)}
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 6.0), sharey=True, squeeze=False)
    for ax, (dtype, by_length) in zip(axes[0], panels, strict=True):
        draw(ax, rows, by_length)
        ax.set_title(f"{dtype}, forward and backward", fontsize=10)
        ax.set_xlabel("T, tokens")
    axes[0][0].set_ylabel("seconds")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(header, fontsize=8, y=0.985)
    lines = -(-len(labels) // 3)
    figure.tight_layout(rect=(0, 0.035 * lines + 0.02, 1, 0.99))
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False, handlelength=3.6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(ax: Axes, rows: dict[str, Way], by_length: dict[int, dict[str, Cell]]) -> None:
    turn = dict.fromkeys([(family, ours) for family in COLOURS for ours in (False, True)], 0)
    for name, way in rows.items():
        ours = "ctxext" in name
        style, marker = STYLES[turn[way.family, ours] % len(STYLES)]
        turn[way.family, ours] += 1
        runs = [(T, cells[name].seconds) for T, cells in by_length.items() if isinstance(cells[name], Run)]
        ax.plot(
            [T for T, _ in runs],
            [seconds for _, seconds in runs],
            color=COLOURS[way.family],
            linestyle="-" if ours else style,
            linewidth=2.6 if ours else 1.2,
            marker=marker,
            markersize=5.5 if ours else 4.5,
            label=name,
        )
    ax.set(xscale="log", yscale="log")
    lengths = sorted(by_length)
    ax.set_xticks(lengths, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths])
    ax.minorticks_off()
    ax.grid(color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    guides(ax, by_length)


def guides(ax: Axes, by_length: dict[int, dict[str, Cell]]) -> None:
    """Slopes of T, below everything, and of T², above."""
    lengths = sorted(by_length)
    first = [cell.seconds for cell in by_length[lengths[0]].values() if isinstance(cell, Run)]
    for power, start, label in [(1, min(first) / 2, "∝ T"), (2, max(first) * 2, "∝ T²")]:
        values = [start * (T / lengths[0]) ** power for T in lengths]
        ax.plot(lengths, values, color="0.6", linewidth=0.9, linestyle=(0, (2, 3)), zorder=0)
        ax.annotate(
            label, (lengths[-1], values[-1]), (4, 0), textcoords="offset points", color="0.4", fontsize=9, va="center"
        )
