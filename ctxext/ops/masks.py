"""Attention patterns, each described by one vector: query q sees exactly the keys lo[q] <= k <= q.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, W window, G group.
d is the key index at which q's document starts, 0 when a row is one document.

    full causal        lo = d
    sliding window     lo = max(d, q - W + 1)                              W keys, q itself included
    S² attention       lo = d + max(0, ((q - d + s) // G) * G - s)         s = 0, or G // 2 on the shifted heads

An intersection of patterns is the maximum of their vectors. The limit k <= q is part of the description, not of a
kernel, so no pattern can see the future. lo is never below d, so no pattern can see another document.

S² attention may add N sink tokens: q also sees the keys d <= k < d + N with k <= q, the first N tokens of its own
document. Pretrained models put much of their attention on the first token (StreamingLLM, arXiv 2309.17453), so groups
that hide it damage these models. `sinks_before` counts the sink tokens that an interval [lo, q] does not hold.

S² (shifted sparse attention; LongLoRA, arXiv 2309.12307, section 3.2) cuts the tokens into groups of G and attends
causally inside each. Half of the heads use groups moved by G // 2. Tokens that one half separates share a group in the
other half, so information crosses the whole row layer by layer. T = 10, G = 4, hence s = 2:

        unshifted heads, s = 0              shifted heads, s = 2
        k 0 1 2 3 4 5 6 7 8 9   lo          k 0 1 2 3 4 5 6 7 8 9   lo
    q 0   x . . . . . . . . .    0      q 0   x . . . . . . . . .    0    half a group: G - s tokens
    q 1   x x . . . . . . . .    0      q 1   x x . . . . . . . .    0
    q 2   x x x . . . . . . .    0      q 2   . . x . . . . . . .    2    a full group starts at G - s
    q 3   x x x x . . . . . .    0      q 3   . . x x . . . . . .    2
    q 4   . . . . x . . . . .    4      q 4   . . x x x . . . . .    2
    q 5   . . . . x x . . . .    4      q 5   . . x x x x . . . .    2
    q 6   . . . . x x x . . .    4      q 6   . . . . . . x . . .    6
    q 7   . . . . x x x x . .    4      q 7   . . . . . . x x . .    6
    q 8   . . . . . . . . x .    8      q 8   . . . . . . x x x .    6
    q 9   . . . . . . . . x x    8      q 9   . . . . . . x x x x    6

Two tokens share a group iff (q + s) // G == (k + s) // G. The first member of q's group is therefore the smallest
k >= 0 with k + s >= ((q + s) // G) * G, which is the formula above. The released code of LongLoRA rolls half of the
heads by G // 2 instead. Its roll moves the last G // 2 tokens of the row to the front. Under a plain triangular mask
the first tokens then see these tokens, which are their future. This module rolls nothing, so nothing wraps around, and
T need not be a multiple of G. The last group is shorter then. The first group of the shifted heads is always shorter:
it has G - G // 2 tokens. Groups restart at every document.

torch is imported inside the functions that make tensors, so that plans can use `Pattern` without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ctxext.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pattern:
    """What a query may see, in tokens.

    sliding_window  keys that a query sees, itself included; None: no window
    group_size      tokens of an S² group; None: no groups
    shift           tokens by which the groups of the shifted heads begin earlier, from 1 to G - 1; None is G // 2, as
                    published
    sink_tokens     first tokens of its document that a query sees besides its group; 0 is S² as published

    Without window and groups, attention is full and causal; with both, a query sees the intersection. Raises InputError
    for a window under 1, a group under 2 (a group of one token has no half to shift by), a shift without groups or not
    below group_size, and sink tokens without groups or with a window.
    """

    sliding_window: int | None = None
    group_size: int | None = None
    shift: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        _check_whole("sliding_window", self.sliding_window, smallest=1)
        _check_whole("group_size", self.group_size, smallest=2)
        _check_whole("shift", self.shift, smallest=1)
        if self.shift is not None and (self.group_size is None or self.shift >= self.group_size):
            raise InputError(f"shift = {self.shift}: allowed are 1 to group_size - 1, here {self.group_size} - 1")
        _check_whole("sink_tokens", self.sink_tokens, smallest=0)
        if self.sink_tokens and (self.group_size is None or self.sliding_window is not None):
            raise InputError(
                f"sink_tokens = {self.sink_tokens}: only S² attention without a window supports sink tokens",
                hint="set group_size and no sliding_window, or leave sink_tokens at 0",
            )

    @property
    def shifts(self) -> tuple[int, int]:
        """Returns s of the unshifted and of the shifted heads, in tokens."""
        return 0, (self.group_size or 0) // 2 if self.shift is None else self.shift


def lower_bounds(
    pattern: Pattern,
    T: int,
    *,
    S: int | None = None,
    document_starts: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Returns the first key that each query sees: lo, int64 [B or 1, 2 with S² groups else 1, T].

    Query i is the token at key index S - T + i (S = T unless earlier keys are cached). It sees the keys from lo[..., i]
    up to itself. The middle axis is the half of the heads: unshifted, then shifted (`first_shifted_head`).
    `document_starts` [B, T] has the key index of each query's first visible document token. It is not checked here; see
    `check_document_starts`. A negative start belongs to a document that began that many tokens before the row; the row
    is then a piece of a longer text. Groups are counted from that start, and lo is at least 0, the row's first token.
    The result is on `device`, by default that of `document_starts`. Raises InputError unless 1 <= T <= S.
    """
    import torch

    S = T if S is None else S
    if not 1 <= T <= S:
        raise InputError(f"T = {T} queries over S = {S} keys: 1 <= T <= S is needed, the queries are the last tokens")
    if device is None:
        device = "cpu" if document_starts is None else document_starts.device
    q = torch.arange(S - T, S, device=device).view(1, 1, T)
    d = torch.zeros_like(q) if document_starts is None else document_starts.to(device, torch.int64)[:, None]  # [B,1,T]
    lo = d
    # Each pattern can only raise lo: the maximum is their intersection.
    if pattern.group_size is not None:
        G = pattern.group_size
        s = torch.tensor(pattern.shifts, device=device).view(1, 2, 1)
        lo = d + ((q - d + s) // G * G - s).clamp_min(0)  # [B,2,T]
    if pattern.sliding_window is not None:
        lo = torch.maximum(lo, q - pattern.sliding_window + 1)
    return lo if document_starts is None else lo.clamp_min(0)


def sinks_before(sink_tokens: int, start: torch.Tensor, document_start: torch.Tensor) -> torch.Tensor:
    """Returns how many sink tokens lie before an interval: int64, of the shape of `start`.

    `start` is the first key of the interval, `document_start` that of its document. The counted sink tokens are the
    keys from max(document_start, 0) on. They are never keys of the interval itself, so no key counts twice. Of a
    document that began before the row (a negative start), the row holds none of the sink tokens or only the last ones.
    """
    import torch

    stop = torch.minimum(document_start + sink_tokens, start)
    return (stop - document_start.clamp_min(0)).clamp_min(0)


def check_lower_bounds(lo: torch.Tensor, S: int) -> None:
    """Raises InputError unless lo [.., T] is interval-causal; the error names the first value that does not fit.

    Interval-causal: 0 <= lo <= the query's key index, and lo never descends along T. Queries are the last T of S
    tokens. A query whose lo lies after itself would see no key, and its softmax would be NaN.
    """
    import torch

    lo = lo.to("cpu", torch.int64).flatten(0, -2)
    position = torch.arange(S - lo.shape[-1], S)
    descends = torch.nn.functional.pad(lo[:, 1:] < lo[:, :-1], (1, 0))
    for wrong, why in ((lo < 0, "is negative"), (lo > position, "lies after the query"), (descends, "descends")):
        if wrong.any():
            row, i = wrong.nonzero()[0].tolist()
            raise InputError(
                f"lo[{row}, {i}] = {lo[row, i]} (query at {position[i]}) {why}: the mask is not interval-causal",
                hint="a query sees lo up to itself, and lo must not decrease; masks.lower_bounds makes such vectors",
            )


def first_shifted_head(H: int, K: int) -> int:
    """Returns the first of the S²-shifted query heads; all later heads are shifted too.

    The shifted heads are the query heads of the last K // 2 key/value heads, so that a key/value head never serves both
    halves (9 heads over 3: heads 6, 7, 8). For even K this is LongLoRA's half. With one key/value head, they are the
    last H // 2 heads. Raises InputError for a single head, and for heads that K does not divide.
    """
    if K < 1 or H < 1 or H % K:
        raise InputError(f"{H} query heads, {K} key/value heads: the first must be a multiple of the second")
    if H == 1:
        raise InputError(
            "S² attention shifts half of the heads, but this layer has one head",
            hint="train it with full attention: do not set group_size",
        )
    return H - H // 2 if K == 1 else H - (K // 2) * (H // K)


def document_starts(bounds: Sequence[int], T: int, *, device: torch.device | str | None = None) -> torch.Tensor:
    """Returns where each token's document starts, int64 [1, T], from the bounds of the documents packed into one row.

    `bounds` is 0 = b[0] < b[1] < ...: where each document starts; a final T (as in `cu_seqlens`) may follow. Join the
    rows of a batch with torch.cat. Raises InputError for bounds that do not start at 0, do not ascend, or exceed T.
    """
    import torch

    bounds = list(bounds)
    if not bounds or bounds[0] != 0:
        raise InputError(f"document bounds {_head(bounds)}: the first document must start at 0")
    for before, after in pairwise(bounds):
        if after <= before:
            raise InputError(f"document bounds must ascend, got {before} and then {after}")
    if T < 1 or bounds[-1] > T:
        raise InputError(f"document bounds end at {bounds[-1]} in a row of {T} tokens: they must not exceed it")
    # Drop a final T, which is the end of the last document and not a start.
    starts = torch.tensor([b for b in bounds if b < T])
    lengths = torch.diff(starts, append=torch.tensor([T]))
    return torch.repeat_interleave(starts, lengths).to(device or "cpu")[None]


def check_document_starts(document_starts: torch.Tensor, *, B: int, T: int, S: int | None = None) -> None:
    """Raises InputError for document starts that describe no packing; the error names the first wrong value.

    Allowed are integers [B, T] with 0 <= start <= position. Each start either repeats the one before it or is the
    position itself, where a new document begins. Call this once a batch, not once a layer: it reads every value.
    """
    import torch

    S = T if S is None else S
    if tuple(document_starts.shape) != (B, T):
        raise InputError(f"document_starts has shape {list(document_starts.shape)}, but the batch has [{B}, {T}]")
    if document_starts.is_floating_point() or document_starts.is_complex() or document_starts.dtype == torch.bool:
        raise InputError(f"document_starts must be integers (key indices), got {document_starts.dtype}")
    starts = document_starts.to("cpu", torch.int64)
    position = torch.arange(S - T, S)  # [T]
    _refuse_first(starts < 0, starts, position, "is negative")
    _refuse_first(starts > position, starts, position, "lies after the token itself")
    # A start may only differ from the previous one at the first token of a new document.
    moved = starts[:, 1:] != starts[:, :-1]
    descends = torch.nn.functional.pad(starts[:, 1:] < starts[:, :-1], (1, 0))
    _refuse_first(descends, starts, position, "is before the previous token's: document starts must not decrease")
    late = torch.nn.functional.pad(moved & (starts[:, 1:] != position[1:]), (1, 0))
    _refuse_first(late, starts, position, "is new, but a document can only start at its own first token")


def _refuse_first(wrong: torch.Tensor, starts: torch.Tensor, position: torch.Tensor, why: str) -> None:
    if wrong.any():
        row, i = wrong.nonzero()[0].tolist()
        raise InputError(f"document_starts[{row}, {i}] = {starts[row, i]} (token at {position[i]}) {why}")


def _check_whole(name: str, value: int | None, *, smallest: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise InputError(f"{name} = {value!r}: allowed is a whole number of tokens, {smallest} or more, or None")


def _head(values: Sequence[int]) -> str:
    return f"[{', '.join(map(str, values[:4]))}{', ...' if len(values) > 4 else ''}]"
