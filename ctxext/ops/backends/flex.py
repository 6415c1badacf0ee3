"""Compiled FlexAttention under a BlockMask computed in closed form. For GPUs; FlexAttention has no backward on a CPU.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head dim, n = T / 128 blocks, rounded up.

torch's `create_block_mask` evaluates the mask at all T x T pairs to find which blocks of 128 queries by 128 keys are
empty, full or partial. Here lo is known and does not descend, so each row of blocks is an interval, too. Let a and z be
the lo of its first and last query. Then row i of blocks has

    empty           partial         full                partial
    ...          |  a // 128 ...  |  z / 128 up ... i-1  |  i, the diagonal   |  the future: empty

and the lo of its 128 queries determine the whole row. The kernel evaluates `lo[q] <= k <= q` in the partial blocks
only. S² is one call for each half of the heads, because their blocks differ.

Sink tokens add one or two partial blocks on the left. A query of the block belongs to the document of the block's first
query, or to a document that starts within the block. In the second case the diagonal block holds the sink tokens. So
the document of the first query determines which blocks are added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ctxext.errors import InputError
from ctxext.ops.backends.segments import check_shapes, head_halves
from ctxext.ops.masks import Pattern, lower_bounds

BLOCK = 128  # queries, and keys, of a block
VARIANTS = 64  # most combinations of length, dtype and mode to compile: for training, validation and passkeys


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    document_starts: Tensor | None = None,
    scale: float | None = None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Computes the same as `blocked.attention`, for T = S: q [B,H,T,D], k and v [B,K,T,D] -> [B,H,T,D].

    `kernel` None is torch's flex_attention, compiled on first use. Raises InputError for 128 or more sink tokens.
    """
    check_shapes(q, k, v, document_starts)
    (_, H, T, _), K = q.shape, k.shape[1]
    kernel = kernel or _compiled()
    parts = []
    for half, ((h0, h1), (g0, g1)) in enumerate(head_halves(pattern, H, K)):
        # Without documents the mask depends on the shape alone and is cached; with documents it differs in each batch.
        if document_starts is None:
            mask = _unpacked(pattern, half, T, q.device)
        else:
            lo = lower_bounds(pattern, T, document_starts=document_starts, device=q.device)
            mask = block_mask(lo[:, min(half, lo.shape[1] - 1)], pattern.sink_tokens, document_starts.to(q.device))
        own = q[:, h0:h1], k[:, g0:g1], v[:, g0:g1]
        parts.append(kernel(*own, block_mask=mask, scale=scale, enable_gqa=h1 - h0 != g1 - g0))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def block_mask(lo: Tensor, sink_tokens: int = 0, document_starts: Tensor | None = None) -> BlockMask:
    """Returns the BlockMask of lo [B or 1, T], equal to that of `create_block_mask`; lo must not descend along T.

    As in `create_block_mask`, the last row has no full block when T does not fill it. Only sink tokens need
    `document_starts` [B or 1, T]; None is one document. Raises InputError for 128 or more sink tokens.
    """
    if sink_tokens >= BLOCK:
        raise InputError(
            f"{sink_tokens} sink tokens: the flex backend supports fewer than {BLOCK}", hint="use another backend"
        )
    T, n = lo.shape[1], -(-lo.shape[1] // BLOCK)
    row = torch.arange(n, device=lo.device)
    # Row i of blocks: empty up to `first`, then partial up to `full`, then full up to the diagonal, which is partial.
    first = lo[:, ::BLOCK] // BLOCK  # [B,n] the leftmost block of the intervals that is not empty
    last = lo[:, (row * BLOCK + BLOCK - 1).clamp_max(T - 1)]
    full = torch.minimum((last + BLOCK - 1) // BLOCK, row)  # [B,n] full from here up to the diagonal
    if T % BLOCK:
        full[:, -1] = n - 1
    document = torch.zeros_like(lo) if document_starts is None else document_starts  # [B or 1,T]
    # The blocks of sink tokens that lie left of the intervals: `extra` blocks, starting at block `sink`.
    sink = document[:, ::BLOCK].clamp_min(0) // BLOCK  # [B,n]
    past = (document[:, ::BLOCK] + sink_tokens - 1).clamp_min(-1) // BLOCK + 1  # the block after the last sink token
    extra = (torch.minimum(past, first) - sink).clamp_min(0) if sink_tokens else torch.zeros_like(first)
    # BlockMask takes counts and indices of blocks. In a row, the first `count` of the n indices are used: the blocks of
    # sink tokens, then the partial blocks of the intervals, then the diagonal. The others only have to be in range.
    partial = full - first + 1 + extra  # blocks before the full ones, the diagonal, and those of sink tokens
    at = torch.arange(n, device=lo.device)
    left = (first - extra)[..., None] + at
    left = torch.where(at < extra[..., None], sink[..., None] + at, left)
    left = torch.where(at == (partial - 1)[..., None], row[:, None], left.clamp_max(n - 1))
    inner = (full[..., None] + at).clamp_max(n - 1)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        start = lo[b, q] if lo.shape[0] > 1 else lo[0, q]
        visible = start <= k
        if sink_tokens:
            d = document[b, q] if document.shape[0] > 1 else document[0, q]
            visible = visible | ((d <= k) & (k < d + sink_tokens))
        return visible & (k <= q)

    count, index, full_count, full_index = (x[:, None].to(torch.int32) for x in (partial, left, row - full, inner))
    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(T, T)
    )


@lru_cache(maxsize=16)
def _unpacked(pattern: Pattern, half: int, T: int, device: torch.device) -> BlockMask:
    # The cached mask may be used in training later, where inference tensors are not allowed.
    with torch.inference_mode(False):
        lo = lower_bounds(pattern, T, device=device)
        return block_mask(lo[:, min(half, lo.shape[1] - 1)], pattern.sink_tokens)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # Beyond the recompile limit torch would silently run the eager version, which holds all T x T scores. With
    # fullgraph it raises an error instead.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=VARIANTS)(compiled)
