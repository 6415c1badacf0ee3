"""Compares decoding with a cache to a forward without one, for ctxext's decoding and for stock `generate`.

Shapes: T tokens of the row, E model width. Functions import torch themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ctxext.evals.certificate import Check
from ctxext.units import format_tokens

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = {"float32": 5e-4, "bfloat16": 1e-1}  # of the largest |final hidden state|


def as_decoded(model: Any, ids: Tensor, whole: Tensor, windows: set[int], dtype: str) -> list[Check]:
    """Reads a row ids [1, T] in pieces, as model/decode.py does, and compares it with `whole`, its forward [1, T, E].

    Each piece is compared with a forward of the text up to the end of the piece. Where RoPE does not follow the length
    of the text, `whole` contains all these forwards, because no token sees a later one.
    """
    from ctxext.model.decode import Reader
    from ctxext.model.frequencies import same_frequencies_from, switch_length
    from ctxext.model.load import hidden_states

    config, T = model.get_decoder().config, ids.shape[1]
    # 1 means that the frequencies are the same at every length up to T.
    follows = same_frequencies_from(config, T) > 1
    checks = list[Check]()
    for name, pieces in _pieces(T, windows, switch_length(config)):
        reader, worst = Reader(model), 0.0
        for begin, end in pieces:
            # When the reader reads the text again from its start, it returns more states than the piece has. Keep the
            # piece's.
            read = reader.read(ids[:, begin:end])[:, begin - end :]
            fresh = hidden_states(model, ids[:, :end]) if follows else whole[:, :end]
            worst = max(worst, relative(read - fresh[:, -read.shape[1] :], whole))
        allowed = TOLERANCE[dtype]
        # All pieces count: one relative difference of the final hidden states, the worst, for each way of reading.
        checks.append(Check("cached decoding", None, worst <= allowed, f"{name}, of the largest", worst, allowed))
    return checks


def _pieces(T: int, windows: set[int], switch: int | None) -> list[tuple[str, list[tuple[int, int]]]]:
    """Returns the two ways in which the row is read: a name, and the (begin, end) of each piece.

    One way reads token by token at the row's ends, across each window's edge, and across the length at which RoPE's
    frequencies change.
    """
    near, edges = 12, {0, T} | windows
    if switch is not None:
        near, edges = 3, edges | {switch}  # fewer steps: here each piece costs its own forward
    steps = {edge + i for edge in edges for i in range(-near, near + 1)}
    ways = (("token by token", steps), ("in chunks", {T // 4 + 1, T // 4 + 3, T // 2, T - T // 5}))
    return [(name, list(pairwise(sorted({0, T} | {cut for cut in cuts if 0 < cut < T})))) for name, cuts in ways]


def of_stock_generate(model: Any, ids: Tensor) -> list[str]:
    """Returns notes on transformers' own decoding, whose cached keys keep the frequencies of a shorter text.

    Returns no note where stock decoding is right.
    """
    from ctxext.model.frequencies import switch_length
    from ctxext.model.load import hidden_states

    decoder, T = model.get_decoder(), ids.shape[1]
    switch = switch_length(decoder.config)
    if switch is None:
        return []
    about = f"RoPE follows the length of the text beyond {format_tokens(switch)} tokens"
    if switch >= T:
        return [f"{about}: only {format_tokens(T)} were measured, so decoding beyond is not checked"]
    # Cache the first `switch` tokens with the old frequencies, then read the rest after them, as stock `generate` does.
    cache, whole = None, hidden_states(model, ids)
    for begin, end in ((0, switch), (switch, T)):
        out = decoder(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    off = relative(out.last_hidden_state[:, -1] - whole[:, -1], whole)
    return [
        f"warning: {about}. There ctxext reads the text again. `generate` of transformers with a cache does not, and "
        f"its last state is off by {off:.1e} of the largest value: call it with use_cache=False"
    ]


def relative(difference: Tensor, of: Tensor) -> float:
    """Returns the largest |difference| over the largest |of|; 1e9 for NaN."""
    return float((difference.float().abs().max() / of.float().abs().max()).nan_to_num(nan=1e9))
