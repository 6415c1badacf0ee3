"""Computes any pattern as a few scaled_dot_product_attention calls on views: no tensor is rolled, padded or repeated.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head dim, W window, N = B * T tokens,
n blocks in one call, L tokens in a block.

This module treats a batch as one long row of N tokens, in which each row of the batch is a document. Documents and S²
groups cut it into segments. A segment starts where lo[q] == q, and no query sees keys of another segment. Neighbouring
segments of equal length are one call on a strided view:

    S², T = 10, G = 4     unshifted   |q q q q|q q q q|q q|         2 calls: [n=2, L=4] and [n=1, L=2]
                          shifted     |q q|q q q q|q q q q|         2 calls: [n=1, L=2] and [n=2, L=4]

Each block attends causally to itself, so the kernels skip the upper triangle and no mask is needed. A segment longer
than the sliding window is cut again, into blocks of L queries. Each block sees its own keys and the `back` >= W - 1
keys before it:

    W = 4                 |q q q q|                                 [n=1, 4], causal
    L = 2, back = 4       |k k k k|q q|                             [n=3, L] queries over [n=3, back + L] keys,
                          .   |k k k k|q q|                           overlapping views of the same memory
                          .       |k k k k|q q|
    the remainder         .           |k k k k|q|                   [n=1, 1] over [n=1, back + 1]

All these blocks share one mask [L, back + L], for any T. Time is O(T W) with a window, or O(T G) with groups. Memory is
O(T).

Sink tokens are put before each block that does not begin its document. [sink tokens, block] attends causally, and the
output rows of the sink tokens are dropped. This gives one softmax over both, with the same kernel and without a mask.
It costs a copy of the blocks of q, k and v, and N more tokens for each block, where N is the number of sink tokens.

The gradients are those of the SDPA calls; `views.py` makes the views and sums their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ctxext.ops.backends.key_runs import KeyRun, join_short, runs_of, unpacked_runs
from ctxext.ops.backends.sdpa import additive, sdpa
from ctxext.ops.backends.segments import Heads, check_shapes, flat, head_halves, segment_sinks
from ctxext.ops.backends.views import Blocks, cut, join
from ctxext.ops.masks import Pattern, lower_bounds

_SMALLEST_BLOCK, _BLOCKS_PER_WINDOW = 64, 4  # smaller blocks compute less outside the band and hold more key grads
_JOINED_CPU, _JOINED = 128, 1024  # most tokens joined under one mask: another call costs more than hidden scores
_MASK_ELEMENTS = 2**24  # the largest mask that cached attention makes
_MASK_ROWS = 1024  # queries under one such mask: with more, more masked scores are computed (8k keys: 1.2x)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    document_starts: Tensor | None = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Computes softmax(q kᵀ · scale) v over the keys that the pattern allows; attention is always causal.

    q [B,H,T,D], k and v [B,K,S,D] -> [B,H,T,D], in fp64, fp32, bf16 or fp16. scale defaults to D ** -0.5.
    The queries are the last T of the S tokens; T < S is attention over cached keys. `document_starts` [B, T] has the
    key index of each query's first visible document token, as `masks.document_starts` makes it. It must pass
    `masks.check_document_starts`, which this function does not call. On the CPU it costs no synchronisation.
    `sink_logits` [H] adds to each head's softmax a sink with that logit and no value (sink_logits.py).
    Tensors laid out [B,T,H,D] in memory (as q_proj(x) is) are not copied; others with B > 1 are copied once.
    NaN is never hidden, and may spread to other queries of its block.
    Raises InputError for shapes that do not fit together, and for S² on heads that cannot be split into halves.
    """
    check_shapes(q, k, v, document_starts)
    (H, T), (K, S) = q.shape[1:3], k.shape[1:3]
    halves = head_halves(pattern, H, K)
    if T < S:
        return _cached(q, k, v, pattern, halves, document_starts, scale, sink_logits)
    window = pattern.sliding_window
    # A window of T or more keys hides nothing. Without window, groups and documents, attention is one causal call.
    pattern = replace(pattern, sliding_window=None if window is None or window >= T else window)
    if pattern == Pattern() and document_starts is None:
        return sdpa(q, k, v, None, scale, sink_logits)
    return _in_blocks(q, k, v, pattern, halves, document_starts, scale, sink_logits)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the offsets of the views depend on the data
def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    halves: list[tuple[Heads, Heads]],
    document_starts: Tensor | None,
    scale: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Runs the calls of each half on views of its heads and writes the results into one output; T = S."""
    B, H, T, _ = q.shape
    # The plan of the calls comes first, because cut() and join() need all views at once.
    calls = [
        (*heads, call)
        for half, heads in enumerate(halves)
        for call in _calls(pattern, half, B, T, document_starts, like=q)
    ]
    q_views = [(heads, call.queries) for heads, _, call in calls]
    k_views = [(heads, call.keys) for _, heads, call in calls]
    # One long row of tokens: the blocks are indices into it.
    q, k, v = (x.transpose(1, 2).reshape(B * T, *x.shape[1::2]) for x in (q, k, v))  # [N,H,D], [N,K,D]
    views = zip(cut(q, q_views), cut(k, k_views), cut(v, k_views), calls, strict=True)
    parts = []  # [n,h,L,D] each
    for qi, ki, vi, ((h0, h1), (g0, g1), call) in views:
        logits = None if sink_logits is None else sink_logits[h0:h1]
        if call.sinks is None:
            parts.append(sdpa(qi, ki, vi, call.mask, scale, logits))
        else:
            # Plain indexing copies the sink tokens; autograd adds their gradients to those of the views.
            first_k, first_v = (x[:, g0:g1][call.sinks].transpose(1, 2) for x in (k, v))  # [n,g,N,D] each
            parts.append(_after_sinks(qi, ki, vi, first_k, first_v, scale, logits))
    return join(parts, q_views, q.shape).view(B, T, H, -1).transpose(1, 2)


def _after_sinks(
    q: Tensor, k: Tensor, v: Tensor, first_k: Tensor, first_v: Tensor, scale: float | None, sink_logits: Tensor | None
) -> Tensor:
    """Causal attention of blocks over N sink tokens and themselves: q [n,h,L,D], k and v [n,g,L,D], first [n,g,N,D]."""
    N = first_k.shape[2]
    # The queries of the sink tokens are arbitrary, because their rows are dropped. Zeros give finite scores.
    q = torch.cat((q.new_zeros(*q.shape[:2], N, q.shape[3]), q), dim=2)
    k, v = torch.cat((first_k, k), dim=2), torch.cat((first_v, v), dim=2)
    return sdpa(q, k, v, None, scale, sink_logits)[:, :, N:]


class BlockedCall(NamedTuple):
    """One SDPA call: its queries, its keys, and the mask [L, back + L] added to the scores (None: causal).

    `sinks` [n, N] are the sink tokens put before each of the n blocks, as indices into all tokens; None without sink
    tokens. A call with sink tokens is causal.
    """

    queries: Blocks
    keys: Blocks
    mask: Tensor | None
    sinks: Tensor | None = None


def _calls(
    pattern: Pattern, half: int, B: int, T: int, document_starts: Tensor | None, like: Tensor
) -> Iterator[BlockedCall]:
    """Yields the calls of one half of the heads, in token order; masks have the dtype and device of `like`."""
    window, device, joined = pattern.sliding_window, like.device, set[KeyRun]()
    # Only documents and groups cut segments; the window shortens what a query sees within a segment.
    groups = replace(pattern, sliding_window=None)
    if document_starts is None:
        runs: Sequence[KeyRun] = unpacked_runs(groups, half, B, T)
    else:
        document_starts = document_starts.cpu()
        runs = runs_of(groups, half, B, T, document_starts)
        runs, joined = join_short(runs, _JOINED_CPU if device.type == "cpu" else _JOINED)
    # Joined runs mix segments under one mask, which needs the exact lo of each token.
    if joined:
        lo = flat(lower_bounds(pattern, T, document_starts=document_starts, device=device), half, B, T)
        token = torch.arange(B * T, device=device)
    band = None if window is None else _band(window, like)
    for run in runs:
        blocks = run.blocks
        if run in joined:
            q = token[blocks.start : blocks.start + blocks.length]
            yield BlockedCall(blocks, blocks, additive((lo[q, None] <= q) & (q <= q[:, None]), like))
        elif run.sinks:
            # All segments of the run have the same number of sink tokens, each those of its own document.
            starts = torch.arange(blocks.start, blocks.start + blocks.tokens, blocks.length)
            first, _ = segment_sinks(pattern, starts, T, document_starts)
            yield BlockedCall(blocks, blocks, None, (first[:, None] + torch.arange(run.sinks)).to(device))
        elif band is None or blocks.length <= band.window:
            yield BlockedCall(blocks, blocks, None)
        else:
            # Blocks of different segments overlap differently, so each long segment has its own calls.
            for start in range(blocks.start, blocks.start + blocks.tokens, blocks.length):
                yield from _banded(start, blocks.length, band)


class Band(NamedTuple):
    """How a window cuts long segments: a head of `back` tokens, then blocks of L over themselves and `back` keys.

    `head` [back, back] is the mask of the head, None where causal attention is enough. `mask` [L, back + L] is the mask
    of the blocks. All calls of a layer share both.
    """

    window: int
    L: int
    back: int
    head: Tensor | None
    mask: Tensor


def _band(window: int, like: Tensor) -> Band:
    # At most _BLOCKS_PER_WINDOW blocks cover the window, and none has fewer than _SMALLEST_BLOCK queries.
    blocks = min(_BLOCKS_PER_WINDOW, max(1, window // _SMALLEST_BLOCK))
    L = max(_SMALLEST_BLOCK, -(-window // blocks))
    back = blocks * L  # >= W; for windows of 64 and more it exceeds W by at most 3
    keys = torch.arange(back + L, device=like.device)
    own, distance = keys[:back, None] - keys[:back], keys[:L, None] + back - keys  # [back,back], [L,back+L]
    # Within `back` <= W tokens the window hides no key, so causal attention gives the same result.
    head = None if back <= window else additive((own >= 0) & (own < window), like)
    return Band(window, L, back, head, additive((distance >= 0) & (distance < window), like))


def _banded(start: int, length: int, band: Band) -> Iterator[BlockedCall]:
    """Yields the calls of one segment that is longer than the window."""
    L, back = band.L, band.back
    head = Blocks(start, 1, min(back, length))
    yield BlockedCall(head, head, None if band.head is None else band.head[: head.length, : head.length])
    full, rest = divmod(max(0, length - back), L)
    if full:
        yield BlockedCall(Blocks(start + back, full, L), Blocks(start + back, full, L, back), band.mask)
    if rest:
        last = start + back + full * L
        yield BlockedCall(Blocks(last, 1, rest), Blocks(last, 1, rest, back), band.mask[:rest, : back + rest])


def _cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    halves: list[tuple[Heads, Heads]],
    document_starts: Tensor | None,
    scale: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention for T < S: a few queries at a time over the keys they can see, so that each mask has a bounded size."""
    T, S, window = q.shape[2], k.shape[2], pattern.sliding_window
    lo = lower_bounds(pattern, T, S=S, document_starts=document_starts, device=q.device)  # [B or 1, 1 or 2, T]
    document = torch.zeros(1, T, dtype=torch.int64) if document_starts is None else document_starts
    document = document.to(q.device)
    # Bound the mask [B or 1, step, S]. With a window, bound the keys of a step as well: at most step + W - 1.
    step = min(_MASK_ROWS, max(1, _MASK_ELEMENTS // (lo.shape[0] * S)))
    if window is not None:
        step = min(step, max(window, _SMALLEST_BLOCK))
    rows = []
    for t0 in range(0, T, step):
        t1 = min(t0 + step, T)
        first, end = S - T + t0, S - T + t1  # the key indices of these queries
        begin = 0 if window is None else max(0, first - window + 1)
        position, key = torch.arange(first, end, device=q.device), torch.arange(begin, end, device=q.device)
        # A single query over exactly its visible keys needs no mask: one query per decoding step is the common case.
        sees_all = end - first == 1 and document_starts is None and pattern.group_size is None
        parts = []
        for half, ((h0, h1), (g0, g1)) in enumerate(halves):
            mask = None if sees_all else lo[:, half, t0:t1, None] <= key  # [B or 1,t,s]
            # Sink tokens lie left of lo; the causal limit comes last, so that it also holds for them.
            if mask is not None and pattern.sink_tokens:
                d = document[:, t0:t1, None]
                mask = mask | ((d <= key) & (key < d + pattern.sink_tokens))
            if mask is not None:
                mask = mask & (key <= position[:, None])
            own, seen = (slice(None), slice(h0, h1), slice(t0, t1)), (slice(None), slice(g0, g1), slice(begin, end))
            mask = None if mask is None else mask[:, None]
            logits = None if sink_logits is None else sink_logits[h0:h1]
            parts.append(sdpa(q[own], k[seen], v[seen], mask, scale, logits))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows, dim=2)
