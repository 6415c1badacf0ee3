"""The adjustments that `ctxext merge` makes to a live bundle: restored modules, alpha dial, NoPE scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ctxext.data.files import distinct, recorded
from ctxext.extras import can_draw
from ctxext.model.load import LoadedModel
from ctxext.model.merge import Adjustment
from ctxext.retrofit import dial, scale
from ctxext.retrofit.halves import Half, Notice, halves

PICTURE = "alpha-multiplier.png"
# What --restore takes back to the base. Training on short answers can spoil the queries and keys by which a model finds
# a far token; the projections of before bring that back (arXiv 2606.11052, second-hand). The norms of Qwen3's queries
# and keys belong to them.
RESTORED = {"qk": ("q_proj", "k_proj", "q_norm", "k_norm")}
Chosen = float | Literal["auto"] | None  # a given number, chosen by measuring, or as trained


def adjust(
    live: LoadedModel,
    *,
    alpha: Chosen,
    nope_scale: Chosen,
    length: int | None,
    data: str,
    notice: Notice,
    restore: str | None = None,
) -> Adjustment:
    """Changes the live model: its weights by the dial, its queries by hooks with the scale c.

    `fold` later removes the hooks and multiplies c into the merged weights. `length`: tokens to calibrate c for; None
    is the usable length. `data`: held-out text for `auto` (halves.py). The scale is calibrated on the model that the
    dial leaves. `restore`, a key of RESTORED: the modules that go back to the base first.
    """
    usable, facts = live.usable_length, dict[str, Any]()
    # The original length is the short length of both measurements.
    original = min(live.source.original_length or usable, usable)

    def both_halves(lengths: list[int], **options: int) -> tuple[Half, Half]:
        """The text to choose by and the text to report on. What was read is reported and recorded in `facts`."""
        with recorded() as began:
            found = halves(data, live.tokenizer, lengths, **options)
        for one in distinct(began):
            facts["read"] = one.as_dict()
            for line in one.lines():
                notice(f"{data}: {line}")
        return found

    rows: list[tuple[str, str]] = []
    turned = None
    if restore is not None:
        names = dial.restore(live.model, RESTORED[restore])
        kinds = [kind for kind in RESTORED[restore] if any(name.endswith(f".{kind}") for name in names)]
        facts["restored"] = names
        rows.append(("restored", f"{', '.join(kinds)} of the base, {len(names)} modules, not measured"))
    # The dial comes before the scale, since the scale has to fit the weights that it leaves.
    if alpha == "auto":
        lengths = sorted({original, usable})
        turned = dial.choose(live, data, lengths, both_halves(lengths), notice)
        facts["alpha_multiplier"], rows = turned.as_dict(), [*rows, *turned.rows()]
    elif alpha is not None:
        dial.turn(dial.trained(live.model), dial.everywhere(alpha))
        facts["alpha_multiplier"] = {"chosen": dial.everywhere(alpha)}
        rows.append(("alpha multiplier", f"{alpha:g}, as given, not measured"))
    # Then the scale of the layers without positions.
    c, layers = nope_scale, scale.nope_layers(live.source)
    if c == "auto":
        lengths = scale.reported_lengths(original, length or usable)
        found = scale.choose(live, data, lengths, both_halves(lengths, fewest=scale.WINDOWS), notice)
        c, facts["nope_scale"], rows = found.chosen, found.as_dict(), [*rows, *found.rows()]
    elif c is not None:
        facts["nope_scale"] = {"chosen": c, "layers": layers}
        rows.append(("NoPE scale", f"{c:g} on the queries of layers {layers}, as given, not measured"))
    # Hooks scale the queries of the live model; weights change only in the merged model.
    handles = [] if c is None else scale.hold(live.model, layers, c)

    def fold(merged: Any) -> None:
        for handle in handles:
            handle.remove()
        if c is not None:
            scale.fold(merged, layers, c)

    def draw(directory: Path) -> None:
        if turned is not None and can_draw(notice, PICTURE):
            dial.draw(turned, directory / PICTURE)

    return Adjustment(facts, tuple(rows), fold, draw)
