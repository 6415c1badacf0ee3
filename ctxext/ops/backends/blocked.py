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

Gradients are those of the SDPA calls; `_Cut` and `_Join` only hand out views and collect into one buffer, because
slicing would make a full-size zero for every view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxext.errors import InputError
from ctxext.ops.masks import Pattern, first_shifted_head, lower_bounds

_SMALLEST_BLOCK, _BLOCKS_PER_WINDOW = 64, 4  # smaller blocks compute less outside the band, and hold more key grads
_MERGED_CPU, _MERGED = 128, 1024  # tokens of short documents under one mask: a call costs more than their triangle
_MASK_ELEMENTS = 2**24  # of the largest mask that cached attention makes


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    document_starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v over the pattern's keys: q [B,H,T,D], k and v [B,K,S,D] -> [B,H,T,D], always causal.

    The queries are the last T of the S tokens; T < S is attention over cached keys. `document_starts` [B, T] has the
    key index of each query's first visible document token, as `masks.document_starts` makes it; it must pass
    `masks.check_document_starts`, which is not called here. Kept on the CPU it costs no synchronisation.
    fp64, fp32, bf16 and fp16; views are free for tensors laid out [B,T,H,D] in memory (as q_proj(x) is), others with
    B > 1 are copied once. scale defaults to D ** -0.5. NaN is never hidden, and may spread within its block.
    Raises InputError for shapes that do not fit together and for S² on heads that cannot halve.
    """
    (B, H, T, _), (K, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != q.shape[3] or H % K or not 1 <= T <= S:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [B,H,T,D] and twice [B,K,S,D], "
            "K dividing H and 1 <= T <= S"
        )
    if document_starts is not None and document_starts.shape != (B, T):
        raise InputError(f"document_starts has shape {list(document_starts.shape)}, the queries have [{B}, {T}]")
    halves = _halves(pattern, H, K)
    if T < S:
        return _cached(q, k, v, pattern, halves, document_starts, scale)
    window = pattern.sliding_window
    pattern = Pattern(None if window is None or window >= T else window, pattern.group_size)
    if pattern == Pattern() and document_starts is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != K)
    calls = [list(_calls(pattern, half, B, T, document_starts, q.device)) for half in range(len(halves))]
    q_views = [(*heads, call.queries) for (heads, _), own in zip(halves, calls, strict=True) for call in own]
    k_views = [(*heads, call.keys) for (_, heads), own in zip(halves, calls, strict=True) for call in own]
    masks = [call.mask for own in calls for call in own]
    q, k, v = (x.transpose(1, 2).reshape(B * T, *x.shape[1::2]) for x in (q, k, v))  # [N,H,D], [N,K,D]
    parts = [
        scaled_dot_product_attention(
            *part, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=part[0].shape[1] != part[1].shape[1]
        )
        for *part, mask in zip(
            _Cut.apply(q, q_views), _Cut.apply(k, k_views), _Cut.apply(v, k_views), masks, strict=True
        )
    ]
    return _Join.apply(q.shape, q_views, *parts).view(B, T, H, -1).transpose(1, 2)


class Blocks(NamedTuple):
    """`count` blocks of `length` tokens from token `start` on, each with the `back` tokens before it.

    The view of x [N,K,D] is [count, K, back + length, D]. Blocks overlap when back > 0; then either there is one, or
    back is a multiple of length.
    """

    start: int
    count: int
    length: int
    back: int = 0

    @property
    def tokens(self) -> int:
        return self.count * self.length

    def of(self, x: Tensor) -> Tensor:
        token, head, dim = x.stride()
        size = (self.count, x.shape[1], self.back + self.length, x.shape[2])
        offset = x.storage_offset() + (self.start - self.back) * token
        return x.as_strided(size, (self.length * token, head, token, dim), offset)


class Call(NamedTuple):
    """One SDPA call: which queries, over which keys; mask [L, back + L], True = seen, or None = causal."""

    queries: Blocks
    keys: Blocks
    mask: Tensor | None


def _calls(
    pattern: Pattern, half: int, B: int, T: int, document_starts: Tensor | None, device: torch.device
) -> Iterator[Call]:
    """What one half of the heads computes, in the order of the tokens."""
    window, masked = pattern.sliding_window, set[Blocks]()
    if document_starts is None:
        runs: Sequence[Blocks] = _unpacked_runs(pattern.group_size, half, B, T)
    else:
        lo = lower_bounds(Pattern(None, pattern.group_size), T, document_starts=document_starts.cpu())
        runs, masked = _merge_short(_runs(lo, half, B, T), _MERGED_CPU if device.type == "cpu" else _MERGED)
    if masked:
        lo = _flat(lower_bounds(pattern, T, document_starts=document_starts, device=device), half, B, T)
        token = torch.arange(B * T, device=device)
    for run in runs:
        if run in masked:
            q = token[run.start : run.start + run.length]
            yield Call(run, run, (lo[q, None] <= q) & (q <= q[:, None]))
        elif window is None or run.length <= window:
            yield Call(run, run, None)
        else:
            for start in range(run.start, run.start + run.tokens, run.length):
                yield from _banded(start, run.length, window, device)


def _banded(start: int, length: int, window: int, device: torch.device) -> Iterator[Call]:
    """One segment under a sliding window shorter than it."""
    back_blocks = min(_BLOCKS_PER_WINDOW, max(1, window // _SMALLEST_BLOCK))
    L = max(_SMALLEST_BLOCK, -(-window // back_blocks))
    back = back_blocks * L  # >= W, by at most 3 for windows of 64 and more
    first = Blocks(start, 1, min(back, length))
    yield Call(first, first, None if first.length <= window else _band(first.length, 0, window, device))
    if length <= back:
        return
    full, rest = divmod(length - back, L)
    mask = _band(L, back, window, device)
    if full:
        yield Call(Blocks(start + back, full, L), Blocks(start + back, full, L, back), mask)
    if rest:
        last = start + back + full * L
        yield Call(Blocks(last, 1, rest), Blocks(last, 1, rest, back), mask[:rest, : back + rest])


def _band(length: int, back: int, window: int, device: torch.device) -> Tensor:
    """What a block sees of itself and the `back` keys before it: bool [length, back + length]."""
    keys = torch.arange(back + length, device=device)
    distance = keys[:length, None] + back - keys
    return (distance >= 0) & (distance < window)


@lru_cache(maxsize=64)
def _unpacked_runs(group_size: int | None, half: int, B: int, T: int) -> tuple[Blocks, ...]:
    return tuple(_runs(lower_bounds(Pattern(None, group_size), T), half, B, T))


def _runs(lo: Tensor, half: int, B: int, T: int) -> list[Blocks]:
    """The segments of one half of the heads, neighbours of equal length as one; lo [B or 1, 1 or 2, T], no window."""
    starts = (_flat(lo, half, B, T) == torch.arange(B * T)).nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([B * T]))
    lengths, counts = torch.unique_consecutive(lengths, return_counts=True)
    runs, start = [], 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        runs.append(Blocks(start, count, length))
        start += count * length
    return runs


def _flat(lo: Tensor, half: int, B: int, T: int) -> Tensor:
    """lo of one half as indices into all N tokens, [N]."""
    rows = torch.arange(0, B * T, T, device=lo.device)[:, None]  # [B,1]
    return (lo[:, min(half, lo.shape[1] - 1)] + rows).reshape(-1)


def _merge_short(runs: list[Blocks], limit: int) -> tuple[list[Blocks], set[Blocks]]:
    """Join neighbouring runs while they have at most `limit` tokens together: all runs, and those now joined."""
    merged: list[Blocks] = []
    joined: set[Blocks] = set()
    for run in runs:
        if merged and merged[-1].tokens + run.tokens <= limit:
            before = merged.pop()
            joined.discard(before)
            run = Blocks(before.start, 1, before.tokens + run.tokens)
            joined.add(run)
        merged.append(run)
    return merged, joined


def _halves(pattern: Pattern, H: int, K: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(query heads, key/value heads) of each half as [first, end) pairs; one entry when all heads are alike."""
    if pattern.group_size is None:
        return [((0, H), (0, K))]
    f = first_shifted_head(H, K)
    g = f * K // H
    return [((0, f), (0, g)), ((f, H), (g, K))] if K > 1 else [((0, f), (0, 1)), ((f, H), (0, 1))]


def _cached(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, halves: list[tuple[tuple[int, int], tuple[int, int]]],
    document_starts: Tensor | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """T < S: a few queries at a time over the keys they can reach, so that no mask exceeds a fixed size."""
    (B, _, T, _), S, window = q.shape, k.shape[2], pattern.sliding_window
    lo = lower_bounds(pattern, T, S=S, document_starts=document_starts, device=q.device)  # [B or 1, 1 or 2, T]
    step = max(1, _MASK_ELEMENTS // (lo.shape[0] * S))
    if window is not None:
        step = min(step, max(window, _SMALLEST_BLOCK))
    rows = []
    for t0 in range(0, T, step):
        t1 = min(t0 + step, T)
        end = S - T + t1
        begin = 0 if window is None else max(0, end - (t1 - t0) - window + 1)
        position, key = torch.arange(end - (t1 - t0), end, device=q.device), torch.arange(begin, end, device=q.device)
        parts = []
        for half, ((h0, h1), (k0, k1)) in enumerate(halves):
            mask = (lo[:, half, t0:t1, None] <= key) & (key <= position[:, None])  # [B or 1, t, s]
            everything = t1 - t0 == 1 and document_starts is None and pattern.group_size is None
            parts.append(scaled_dot_product_attention(
                q[:, h0:h1, t0:t1], k[:, k0:k1, begin:end], v[:, k0:k1, begin:end],
                attn_mask=None if everything else mask[:, None], scale=scale, enable_gqa=h1 - h0 != k1 - k0,
            ))  # fmt: skip
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows, dim=2)


class _Cut(torch.autograd.Function):
    """x [N,H,D] -> one view for each (first head, end head, blocks); their gradients meet in one buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, views: list[tuple[int, int, Blocks]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.views = x.shape, views
        return tuple(blocks.of(x[:, h0:h1]) for h0, h1, blocks in views)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dx = grads[0].new_zeros(ctx.shape)
        for (h0, h1, (start, count, length, back)), grad in zip(ctx.views, grads, strict=True):
            width = length if count > 1 else back + length  # of what does not overlap
            for offset in range(0, back + length, width):
                target = Blocks(start - back + offset, count, width)
                target.of(dx[:, h0:h1]).add_(grad[:, :, offset : offset + width])
        return dx, None


class _Join(torch.autograd.Function):
    """The inverse for the outputs: parts [n,h,L,D] written into one [N,H,D] without a concatenation."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], views: list[tuple[int, int, Blocks]], *parts: Tensor) -> Tensor:
        ctx.views = views
        out = parts[0].new_empty(shape)
        for (h0, h1, blocks), part in zip(views, parts, strict=True):
            blocks.of(out[:, h0:h1]).copy_(part)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(blocks.of(grad[:, h0:h1]) for h0, h1, blocks in ctx.views)
