"""What `ctxext merge` does to a live bundle first: the alpha dial, then the scale of NoPE layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ctxext.data.files import distinct, recorded
from ctxext.model.load import LoadedModel
from ctxext.model.merge import Adjustment
from ctxext.retrofit import dial, scale
from ctxext.retrofit.halves import Half, Notice, halves

PICTURE = "alpha-multiplier.png"
Chosen = float | Literal["auto"] | None  # a number to bake in, to be measured for, or left as trained


def adjust(
    live: LoadedModel, *, alpha: Chosen, nope_scale: Chosen, length: int | None, data: str, notice: Notice
) -> Adjustment:
    """Change the live model: its weights by the dial, its queries by hooks until `fold` puts c into merged weights.

    `length`: tokens to calibrate c for, None is the usable length; `data`: held-out text for `auto` (halves.py). The
    scale is found for what the dial leaves.
    """
    usable, facts = live.usable_length, dict[str, Any]()
    original = min(live.source.original_length or usable, usable)

    def both_halves(lengths: list[int], **options: int) -> tuple[Half, Half]:
        """The text to choose by and to report on; what was read is said and kept."""
        with recorded() as began:
            found = halves(data, live.tokenizer, lengths, **options)
        for one in distinct(began):
            facts["read"] = one.as_dict()
            for line in one.lines():
                notice(f"{data}: {line}")
        return found

    rows: list[tuple[str, str]] = []
    turned = None
    if alpha == "auto":
        lengths = sorted({original, usable})
        turned = dial.choose(live, data, lengths, both_halves(lengths), notice)
        facts["alpha_multiplier"], rows = turned.as_dict(), turned.rows()
    elif alpha is not None:
        dial.turn(dial.trained(live.model), dial.everywhere(alpha))
        facts["alpha_multiplier"] = {"chosen": dial.everywhere(alpha)}
        rows = [("alpha multiplier", f"{alpha:g}, as given; nothing was measured to choose it")]
    c, layers = nope_scale, scale.nope_layers(live.source)
    if c == "auto":
        lengths = scale.reported_lengths(original, length or usable)
        found = scale.choose(live, data, lengths, both_halves(lengths, fewest=scale.WINDOWS), notice)
        c, facts["nope_scale"], rows = found.chosen, found.as_dict(), [*rows, *found.rows()]
    elif c is not None:
        facts["nope_scale"] = {"chosen": c, "layers": layers}
        rows.append(("NoPE scale", f"{c:g} on the queries of layers {layers}, as given; nothing was measured"))
    handles = [] if c is None else scale.hold(live.model, layers, c)

    def fold(merged: Any) -> None:
        for handle in handles:
            handle.remove()
        if c is not None:
            scale.fold(merged, layers, c)

    def draw(directory: Path) -> None:
        if turned is not None:
            dial.draw(turned, directory / PICTURE)

    return Adjustment(facts, tuple(rows), fold, draw)
