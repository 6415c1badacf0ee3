"""Shared code of the fast backends: a batch as one long row of tokens, cut into segments that never see each other.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head dim, N = B * T tokens.

The rows of a batch, its documents and the S² groups are all segments of the same row of N tokens. A segment starts
where lo[q] == q, for each of these three reasons. A window makes no segments; it only shortens what a query sees within
its segment.

Sink tokens are put before a segment: in the causal attention of [sink tokens, segment] the segment's queries see these
tokens too. The output rows of the sink tokens are computed and dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxext.errors import InputError
from ctxext.ops.masks import Pattern, first_shifted_head, sinks_before

Heads = tuple[int, int]  # first, end


def check_shapes(q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None) -> None:
    """Raises InputError for tensors that do not fit together: q [B,H,T,D], k and v [B,K,S,D], document_starts [B,T]."""
    (B, H, T, _), (K, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != q.shape[3] or H % K or not 1 <= T <= S:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [B,H,T,D] and twice [B,K,S,D], "
            "K dividing H and 1 <= T <= S"
        )
    if document_starts is not None and document_starts.shape != (B, T):
        raise InputError(f"document_starts has shape {list(document_starts.shape)}, but the queries have [{B}, {T}]")


def head_halves(pattern: Pattern, H: int, K: int) -> list[tuple[Heads, Heads]]:
    """Returns (query heads, key/value heads) of each half, unshifted first; one entry without S² groups.

    With one key/value head, both halves use it. Raises InputError for heads that cannot be split into halves.
    """
    if pattern.group_size is None:
        return [((0, H), (0, K))]
    f = first_shifted_head(H, K)
    g = f * K // H
    return [((0, f), (0, g)), ((f, H), (g, K))] if K > 1 else [((0, f), (0, 1)), ((f, H), (0, 1))]


def flat(lo: Tensor, half: int, B: int, T: int) -> Tensor:
    """Returns lo [B or 1, 1 or 2, T] of one half as indices into all N tokens, [N]."""
    rows = torch.arange(0, B * T, T, device=lo.device)[:, None]  # [B,1]
    return (lo[:, min(half, lo.shape[1] - 1)] + rows).reshape(-1)


def segment_bounds(lo: Tensor, half: int, B: int, T: int) -> Tensor:
    """Returns where the segments of one half start, then N: [segments + 1], on the CPU. `lo` is without a window."""
    starts = (flat(lo.cpu(), half, B, T) == torch.arange(B * T)).nonzero()[:, 0]
    return torch.cat([starts, torch.tensor([B * T])])


def segment_sinks(pattern: Pattern, starts: Tensor, T: int, document_starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the sink tokens put before each segment: (first token, count), both int64 [segments], on the CPU.

    `starts` has the first token of each segment. The first sink token is the first token of the segment's document.
    Both are indices into all N tokens. `document_starts` [B,T] are key indices within a row, on the CPU.
    """
    row = starts // T * T  # the first token of the segment's row
    document = torch.zeros_like(starts) if document_starts is None else document_starts.reshape(-1)[starts]
    return row + document.clamp_min(0), sinks_before(pattern.sink_tokens, starts - row, document)
