"""The planner's choices as a picture: the KV cache of each layout against its damage."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure

from ctxext.retrofit.planner import LayerPlan, Measured
from ctxext.units import format_tokens


def pareto_png(plan: LayerPlan) -> bytes:
    """Returns a PNG: all choices as points, the best per number of full layers as a line, fixed patterns by name."""
    figure = Figure(figsize=(5.6, 3.9), dpi=160)
    figure.set_layout_engine("constrained")
    ax = figure.add_subplot()
    # Sorted by falling score, so that the best choice of each size is the last and is kept.
    best = {len(c.full): c for c in sorted(plan.measured, key=lambda c: (-c.score, c.full))}
    line = [best[k] for k in sorted(best)]
    named = [choice for choice in plan.measured if choice.names]

    def at(choices: list[Measured]) -> tuple[list[float], list[float]]:
        return [100 * c.kv_share for c in choices], [c.score for c in choices]

    ax.plot(*at(list(plan.measured)), ".", color="0.75", label="measured", zorder=1)
    ax.plot(*at(line), "-o", color="#0072B2", label="best of each number of full layers", zorder=2)
    ax.plot(*at(named), "s", color="#D55E00", markersize=5, label="fixed patterns", zorder=3)
    ax.plot(*at([plan.chosen]), "o", mfc="none", mec="black", markersize=12, label="chosen", zorder=4)
    for choice in named:
        ax.annotate(
            ", ".join(choice.names),
            (100 * choice.kv_share, choice.score),
            textcoords="offset points",
            xytext=(7, 4),
            fontsize=8,
        )
    ax.set_xlabel(f"KV cache at {format_tokens(plan.request.length)} tokens, % of the source's")
    ax.set_ylabel("damage, nats a token" + (f" (text + {plan.share:g} x answers)" if plan.share else ""))
    ax.set_ylim(bottom=0)
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=8)
    data = BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
