"""One call of torch's scaled_dot_product_attention: choice of kernel, shared key heads, learned sinks.

Shapes: n blocks, h or H query heads, g or K key/value heads, L queries, S keys, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ctxext.ops.backends.sink_logits import attention_with_sinks

_HALF = (torch.bfloat16, torch.float16)
_ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_HOPPER_ORDER = [SDPBackend.CUDNN_ATTENTION, *_ORDER]  # cuDNN has kernels for Hopper; not yet measured here
_SOUND_CUDNN = 91_500  # newer versions are correct at lengths that 128 does not divide (pytorch issue 169849)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, sink_logits: Tensor | None = None
) -> Tensor:
    """Computes attention with torch's kernel: q [n,h,L,D], k and v [n,g,S,D] -> [n,h,L,D].

    `mask` is a bool mask (True: visible) or is added to the scores. Without a mask attention is causal, and a single
    query sees all keys. `sink_logits` [h] are learned sinks.
    """
    causal, gqa, shape = False, q.shape[1] != k.shape[1], q.shape
    # The branch makes `causal` a plain bool. Assigned from the comparison, it would be a symbol under torch.compile.
    if mask is None and q.shape[2] > 1:
        causal = True
    if sink_logits is not None:
        if mask is not None and mask.dtype == torch.bool:
            mask = additive(mask, q)
        return attention_with_sinks(q, k, v, sink_logits, mask=mask, causal=causal, scale=scale)
    # On a GPU only FlashAttention shares key heads. Causal calls in half precision reach it; others get equal heads.
    if gqa and q.is_cuda and not (causal and q.dtype in _HALF):
        q, k, v, mask = _without_sharing(q, k, v, mask, causal)
        gqa = False
    with _kernels(q, causal):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out.reshape(shape)


def _without_sharing(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Any, ...]:
    """Returns (q, k, v, mask) with equal numbers of heads, for kernels without shared keys.

    q [n,H,L,D], k and v [n,K,S,D]. Of torch's GPU kernels only FlashAttention shares keys between heads, and it takes
    neither masks nor fp32. For other calls torch would use the math kernel, which holds all scores. The query heads
    that share a key head become rows over it, H/K * L rows. Causal attention allows one row for each token, so there
    the keys are repeated instead.
    """
    (n, H, L, D), K = q.shape, k.shape[1]
    if causal:
        return q, *(x.repeat_interleave(H // K, dim=1) for x in (k, v)), mask
    rows = None if mask is None else mask.repeat(*[1] * (mask.ndim - 2), H // K, 1)
    return q.reshape(n, K, H // K * L, D), k, v, rows


def _kernels(q: Tensor, causal: bool) -> AbstractContextManager[object]:
    """Returns a context with the kernel order: on Hopper, cuDNN comes first for causal calls.

    A single query does not use cuDNN, which would make a new plan for every number of keys.
    """
    if not (q.is_cuda and q.dtype in _HALF and _is_hopper(q.device)):
        return nullcontext()
    sound = (torch.backends.cudnn.version() or 0) > _SOUND_CUDNN and torch.backends.cuda.cudnn_sdp_enabled()
    return sdpa_kernel(_HOPPER_ORDER if causal and sound else _ORDER, set_priority=True)


@lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def additive(seen: Tensor, like: Tensor) -> Tensor:
    """Returns a mask with 0 where `seen`, else -inf, in the dtype and on the device of `like`.

    torch would make such a mask from a bool mask in each call, and keep it for the backward pass.
    """
    return like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
