"""The plot and the verdicts of what train.py measured: seconds and bytes of a step against its tokens, with floors.

    python benchmarks/report_train.py [benchmarks/results/train-cpu.json]

The floor of a step is the FLOPs that it cannot do without (ops/cost.py, `step_flops`: recomputation included) over the
rate of a matrix product measured on the same machine, beside the steps. Memory has no floor drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

from ctxext.ops.cost import Layer, ModelShape, step_flops

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

RESULTS = Path(__file__).parent / "results"
W = 128
# rows by the beginning of their name: (wanted times the baseline's speed, of its memory, tokens)
TARGETS = [
    ("ctxext, swa128-nope + S², tiles", 2.2, 0.3, 16_384),
    ("ctxext, swa128-nope + S², tiles", 3.2, 0.3, 32_768),
    ("ctxext, S²", 1.7, 0.4, 16_384),
]
STYLES = ["o", "s", "^", "D", "v", "P", "X", "*"]


def layouts(shape: ModelShape, T: int) -> dict[str, list[Layer]]:
    """(window, group) of each layer, of the layouts that have a floor."""
    L, group = shape.num_layers, T // 4
    half = [(W, None) if i % 2 == 0 else (None, None) for i in range(L)]
    s2 = [(window, None if window else group) for window, _ in half]
    return {"dense": [(None, None)] * L, "S²": [(None, group)] * L, "swa128-nope, dense": half, "swa128-nope + S²": s2}


def verdicts(raw: dict[str, Any]) -> str:
    """The targets, met or missed, as Markdown."""
    lines = ["| target | measured | |", "|---|---|---|"]
    for name, faster, smaller, T in TARGETS:
        of_length = raw["results"].get(str(T), {})
        row = next((cell for key, cell in of_length.items() if key.startswith(name)), None)
        base = of_length.get(raw["baseline"])
        if not isinstance(row, list) or not isinstance(base, list):
            continue
        speed, memory = base[0] / row[0], row[1] / base[1]
        for what, wanted, got, met in (
            ("times as fast", f">= {faster}", speed, speed >= faster),
            ("of the memory", f"<= {smaller}", memory, memory <= smaller),
        ):
            lines.append(f"| {name}, T = {T:,}: {wanted} {what} | {got:.2f} | {'met' if met else 'missed'} |")
    return "\n".join(lines) + "\n"


def plot(raw: dict[str, Any], target: Path) -> None:
    """Two panels over T: seconds of a step with floors, MiB beyond the weights."""
    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    lengths = [int(T) for T in raw["results"]]
    names = list(dict.fromkeys(name for of_length in raw["results"].values() for name in of_length))
    for name, marker in zip(names, STYLES, strict=False):
        cells = [(T, cell) for T in lengths if isinstance(cell := raw["results"][str(T)].get(name), list)]
        line = "--" if name.startswith("transformers") else "-"
        for axes, index, unit in ((seconds, 0, 1.0), (memory, 1, 2.0**20)):
            axes.plot([T for T, _ in cells], [cell[index] / unit for _, cell in cells], line, marker=marker, label=name)
    shape = ModelShape(**raw["shape"])
    for (name, _), style in zip(layouts(shape, 4).items(), [":", (0, (3, 1, 1, 1)), (0, (1, 1)), "-."], strict=True):
        floor = [step_flops(shape, layouts(shape, T)[name], T) / raw["flops_per_second"] for T in lengths]
        seconds.plot(lengths, floor, color="0.45", linestyle=style, label=f"floor: {name}")
    for axes, title in ((seconds, "seconds of a step"), (memory, "MiB beyond the weights")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="tokens of the sequence", xticks=lengths)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda T, _: f"{T / 1024:.0f}k"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(raw["title"], fontsize=9)
    figure.savefig(target, dpi=110)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "train-cpu.json"
    raw = json.loads(path.read_text("utf-8"))
    plot(raw, path.with_suffix(".png"))
    print(verdicts(raw))


if __name__ == "__main__":
    main()
