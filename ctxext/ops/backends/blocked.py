"""Any pattern as a short list of scaled_dot_product_attention calls on views: nothing rolled, padded or repeated.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head dim, W window, N = B * T tokens,
n blocks in one call, L tokens in a block.

A batch is one long row of N tokens whose rows are documents. Documents and S² groups cut it into segments, which start
where lo[q] == q; nothing looks over a cut. Neighbours of equal length are one call on a strided view:

    S², T = 10, G = 4     unshifted   |q q q q|q q q q|q q|         2 calls: [n=2, L=4] and [n=1, L=2]
                          shifted     |q q|q q q q|q q q q|         2 calls: [n=1, L=2] and [n=2, L=4]

Each block attends causally to itself, so kernels skip the upper triangle and no mask exists. A segment longer than a
sliding window is cut once more, into blocks of L queries that see their own keys and the `back` >= W - 1 before:

    W = 4                 |q q q q|                                 [n=1, 4], causal
    L = 2, back = 4       |k k k k|q q|                             [n=3, L] queries over [n=3, back + L] keys,
                          .   |k k k k|q q|                           overlapping views of the same memory
                          .       |k k k k|q q|
    what is left          .           |k k k k|q|                   [n=1, 1] over [n=1, back + 1]

All of them share one mask [L, back + L], whatever T is. Time and memory are O(T W), or O(T G) and O(T).

Sink tokens stand before each block that does not begin its document: [sink tokens, block] attends causally, and the
rows of the sink tokens are dropped. That is one softmax over both, by the same kernel without a mask; it costs a copy
of the blocks of q, k and v, and N more tokens a block.

Gradients are those of the SDPA calls; `views.py` hands out the views and collects what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ctxext.ops.backends.runs import Run, join_short, runs_of, unpacked_runs
from ctxext.ops.backends.sdpa import additive, sdpa
from ctxext.ops.backends.segments import Heads, check_shapes, flat, head_halves, segment_sinks
from ctxext.ops.backends.views import Blocks, cut, join
from ctxext.ops.masks import Pattern, lower_bounds

_SMALLEST_BLOCK, _BLOCKS_PER_WINDOW = 64, 4  # smaller blocks compute less outside the band, and hold more key grads
_JOINED_CPU, _JOINED = 128, 1024  # tokens of short documents under one mask: a call costs more than their triangle
_MASK_ELEMENTS = 2**24  # of the largest mask that cached attention makes
_MASK_ROWS = 1024  # queries under one such mask: more compute more of the triangle that it hides (8k keys: 1.2x)


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
    """softmax(q kᵀ · scale) v over the pattern's keys: q [B,H,T,D], k and v [B,K,S,D] -> [B,H,T,D], always causal.

    The queries are the last T of the S tokens; T < S is attention over cached keys. `document_starts` [B, T] has the
    key index of each query's first visible document token, as `masks.document_starts` makes it; it must pass
    `masks.check_document_starts`, which is not called here. Kept on the CPU it costs no synchronisation.
    fp64, fp32, bf16 and fp16; views are free for tensors laid out [B,T,H,D] in memory (as q_proj(x) is), others with
    B > 1 are copied once. scale defaults to D ** -0.5. `sink_logits` [H] adds to each head's softmax a sink of that
    logit and no value (sink_logits.py). NaN is never hidden, and may spread within its block.
    Raises InputError for shapes that do not fit together and for S² on heads that cannot halve.
    """
    check_shapes(q, k, v, document_starts)
    (H, T), (K, S) = q.shape[1:3], k.shape[1:3]
    halves = head_halves(pattern, H, K)
    if T < S:
        return _cached(q, k, v, pattern, halves, document_starts, scale, sink_logits)
    window = pattern.sliding_window
    pattern = replace(pattern, sliding_window=None if window is None or window >= T else window)
    if pattern == Pattern() and document_starts is None:
        return sdpa(q, k, v, None, scale, sink_logits)
    return _in_blocks(q, k, v, pattern, halves, document_starts, scale, sink_logits)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # views at offsets that depend on the data
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
    """T = S: the calls of each half on views of its heads, gathered in one output."""
    B, H, T, _ = q.shape
    calls = [
        (*heads, call)
        for half, heads in enumerate(halves)
        for call in _calls(pattern, half, B, T, document_starts, like=q)
    ]
    q_views = [(heads, call.queries) for heads, _, call in calls]
    k_views = [(heads, call.keys) for _, heads, call in calls]
    q, k, v = (x.transpose(1, 2).reshape(B * T, *x.shape[1::2]) for x in (q, k, v))  # [N,H,D], [N,K,D]
    views = zip(cut(q, q_views), cut(k, k_views), cut(v, k_views), calls, strict=True)
    parts = []  # [n,h,L,D] each
    for qi, ki, vi, ((h0, h1), (g0, g1), call) in views:
        logits = None if sink_logits is None else sink_logits[h0:h1]
        if call.sinks is None:
            parts.append(sdpa(qi, ki, vi, call.mask, scale, logits))
        else:
            first_k, first_v = (x[:, g0:g1][call.sinks].transpose(1, 2) for x in (k, v))  # [n,g,N,D] each
            parts.append(_after_sinks(qi, ki, vi, first_k, first_v, scale, logits))
    return join(parts, q_views, q.shape).view(B, T, H, -1).transpose(1, 2)


def _after_sinks(
    q: Tensor, k: Tensor, v: Tensor, first_k: Tensor, first_v: Tensor, scale: float | None, sink_logits: Tensor | None
) -> Tensor:
    """Causal attention of blocks over N sink tokens and themselves: q [n,h,L,D], k and v [n,g,L,D], first [n,g,N,D]."""
    N = first_k.shape[2]
    # Any queries do for the sink tokens: their rows are dropped. Zeros give finite scores.
    q = torch.cat((q.new_zeros(*q.shape[:2], N, q.shape[3]), q), dim=2)
    k, v = torch.cat((first_k, k), dim=2), torch.cat((first_v, v), dim=2)
    return sdpa(q, k, v, None, scale, sink_logits)[:, :, N:]


class Call(NamedTuple):
    """One SDPA call: which queries, over which keys; mask [L, back + L] is added to the scores, None = causal.

    `sinks` [n, N] are the sink tokens put before each of the n blocks, as indices into all tokens; None where there are
    none. Such a call is causal.
    """

    queries: Blocks
    keys: Blocks
    mask: Tensor | None
    sinks: Tensor | None = None


def _calls(pattern: Pattern, half: int, B: int, T: int, document_starts: Tensor | None, like: Tensor) -> Iterator[Call]:
    """What one half of the heads computes, in the order of the tokens; masks in the dtype and on the device of q."""
    window, device, joined = pattern.sliding_window, like.device, set[Run]()
    groups = replace(pattern, sliding_window=None)
    if document_starts is None:
        runs: Sequence[Run] = unpacked_runs(groups, half, B, T)
    else:
        document_starts = document_starts.cpu()
        runs = runs_of(groups, half, B, T, document_starts)
        runs, joined = join_short(runs, _JOINED_CPU if device.type == "cpu" else _JOINED)
    if joined:
        lo = flat(lower_bounds(pattern, T, document_starts=document_starts, device=device), half, B, T)
        token = torch.arange(B * T, device=device)
    band = None if window is None else _band(window, like)
    for run in runs:
        blocks = run.blocks
        if run in joined:
            q = token[blocks.start : blocks.start + blocks.length]
            yield Call(blocks, blocks, additive((lo[q, None] <= q) & (q <= q[:, None]), like))
        elif run.sinks:
            starts = torch.arange(blocks.start, blocks.start + blocks.tokens, blocks.length)
            first, _ = segment_sinks(pattern, starts, T, document_starts)
            yield Call(blocks, blocks, None, (first[:, None] + torch.arange(run.sinks)).to(device))
        elif band is None or blocks.length <= band.window:
            yield Call(blocks, blocks, None)
        else:
            for start in range(blocks.start, blocks.start + blocks.tokens, blocks.length):
                yield from _banded(start, blocks.length, band)


class Band(NamedTuple):
    """How a window cuts long segments: a head of `back` tokens, then blocks of L over themselves and `back` keys.

    head [back, back] or None where causal is enough, mask [L, back + L]: both shared by all calls of a layer.
    """

    window: int
    L: int
    back: int
    head: Tensor | None
    mask: Tensor


def _band(window: int, like: Tensor) -> Band:
    blocks = min(_BLOCKS_PER_WINDOW, max(1, window // _SMALLEST_BLOCK))
    L = max(_SMALLEST_BLOCK, -(-window // blocks))
    back = blocks * L  # >= W; windows of 64 and more: by at most 3
    keys = torch.arange(back + L, device=like.device)
    own, distance = keys[:back, None] - keys[:back], keys[:L, None] + back - keys  # [back,back], [L,back+L]
    head = None if back <= window else additive((own >= 0) & (own < window), like)
    return Band(window, L, back, head, additive((distance >= 0) & (distance < window), like))


def _banded(start: int, length: int, band: Band) -> Iterator[Call]:
    """One segment longer than the window."""
    L, back = band.L, band.back
    head = Blocks(start, 1, min(back, length))
    yield Call(head, head, None if band.head is None else band.head[: head.length, : head.length])
    full, rest = divmod(max(0, length - back), L)
    if full:
        yield Call(Blocks(start + back, full, L), Blocks(start + back, full, L, back), band.mask)
    if rest:
        last = start + back + full * L
        yield Call(Blocks(last, 1, rest), Blocks(last, 1, rest, back), band.mask[:rest, : back + rest])


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
    """T < S: a few queries at a time over the keys they can reach, so that no mask exceeds a fixed size."""
    T, S, window = q.shape[2], k.shape[2], pattern.sliding_window
    lo = lower_bounds(pattern, T, S=S, document_starts=document_starts, device=q.device)  # [B or 1, 1 or 2, T]
    document = torch.zeros(1, T, dtype=torch.int64) if document_starts is None else document_starts
    document = document.to(q.device)
    step = min(_MASK_ROWS, max(1, _MASK_ELEMENTS // (lo.shape[0] * S)))
    if window is not None:
        step = min(step, max(window, _SMALLEST_BLOCK))
    rows = []
    for t0 in range(0, T, step):
        t1 = min(t0 + step, T)
        first, end = S - T + t0, S - T + t1  # the key indices of these queries
        begin = 0 if window is None else max(0, first - window + 1)
        position, key = torch.arange(first, end, device=q.device), torch.arange(begin, end, device=q.device)
        sees_all = end - first == 1 and document_starts is None and pattern.group_size is None
        parts = []
        for half, ((h0, h1), (g0, g1)) in enumerate(halves):
            mask = None if sees_all else lo[:, half, t0:t1, None] <= key  # [B or 1,t,s]
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
