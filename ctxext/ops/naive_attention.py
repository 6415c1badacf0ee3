"""Attention in its simplest form: the reference that every backend is compared with.

Shapes: B batch, H query heads, K key/value heads (K divides H), T query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

import torch

from ctxext.errors import InputError
from ctxext.ops.masks import check_lower_bounds, first_shifted_head


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    *,
    scale: float | None = None,
    sink_tokens: int = 0,
    document_starts: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes softmax(q kᵀ · scale) v over the keys lo <= k <= position: q [B,H,T,D], k, v [B,K,S,D] -> [B,H,T,D].

    lo [B or 1, 1 or 2, T] as from `masks.lower_bounds`: one row for all heads, or one for each half. Query i is at key
    index S - T + i. scale defaults to D ** -0.5. With `sink_tokens` N a query also sees the first N tokens of its
    document, up to itself; `document_starts` [B,T] has the key index at which the document starts, None is key 0.
    `sink_logits` [H] adds to each head's softmax one more entry with that logit and a value of zero: a learned sink.
    Computed in fp32 (fp64 inputs stay fp64), returned in q's dtype.
    NaN propagates: a NaN key or value reaches every query that sees it. A NaN value also reaches the other queries
    (0 * NaN). Memory is O(B H T S), on purpose. Raises InputError for heads or lengths that do not fit together, and
    for a lo that is not interval-causal.
    """
    (H, T, D), (K, S) = q.shape[1:], k.shape[1:3]
    if H % K or T > S:
        raise InputError(f"q {list(q.shape)} over k {list(k.shape)}: K must divide H, and T must not exceed S")
    check_lower_bounds(lo, S)
    if lo.shape[1] == 2:
        f = first_shifted_head(H, K)
        lo = torch.repeat_interleave(lo, torch.tensor([f, H - f], device=lo.device), dim=1)  # [B,H,T]
    # Compute in at least fp32, with one key/value head for each query head.
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    qx, kx, vx = q.to(exact), k.to(exact), v.to(exact)
    kx, vx = (x.repeat_interleave(H // K, dim=1) for x in (kx, vx))  # [B,H,S,D]
    position = torch.arange(S - T, S, device=q.device)[:, None]  # [T,1]
    key = torch.arange(S, device=q.device)  # [S]
    interval = lo[..., None] <= key  # [B,H or 1,T,S]
    # The causal limit comes after the union with the sink tokens, so that it holds for both.
    if sink_tokens:
        start = torch.zeros_like(position.T) if document_starts is None else document_starts.to(q.device)  # [B or 1,T]
        start = start[:, None, :, None]
        interval = interval | ((start <= key) & (key < start + sink_tokens))
    seen = interval & (key <= position)
    scores = qx @ kx.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, float("-inf"))
    # A learned sink takes part in the softmax, but its value is zero: drop its column.
    if sink_logits is not None:
        logit = sink_logits.to(exact)[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, logit), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ vx).to(q.dtype)


def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    at: torch.Tensor,
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the attention weights of selected queries: q [B,H,R,D], k [B,K,S,D] -> fp32 [B,H,R,S].

    `at` [B,R] has the key index of each query. The weights of a query sum to 1, or with `sink_logits` [H] to 1 minus
    the sink's weight. Computed in fp32. Memory is O(B H R S): for a few rows of a long text, not for all of them.
    Padding and packed documents are not supported: all rows of the batch have one length.
    """
    B, H, R, D = q.shape
    K, S = k.shape[1:3]
    grouped = q.float().view(B, K, H // K, R, D)  # the query heads of one key head are neighbours
    scores = torch.einsum("bkgrd,bksd->bkgrs", grouped, k.float()).reshape(B, H, R, S)
    key = torch.arange(S, device=k.device)
    seen = key <= at[..., None]  # [B,R,S]
    # A window of W keys includes the query itself.
    if sliding_window is not None:
        seen &= key > at[..., None] - sliding_window
    scores *= D**-0.5 if scale is None else scale
    scores = scores.masked_fill_(~seen[:, None], float("-inf"))
    if sink_logits is None:
        return scores.softmax(-1)
    logit = sink_logits.float()[:, None, None].expand(B, H, R, 1)
    return torch.cat((scores, logit), dim=-1).softmax(-1)[..., :-1]
