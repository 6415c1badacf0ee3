"""Attention with a learned sink: one more entry in the softmax of each head, with its own logit and no value.

Shapes: n blocks, h query heads, g key/value heads (g divides h), L queries, S keys, D head dim.

Let s be the sink logit of a head, and lse the logsumexp of a query's visible scores. Then

    out = softmax over the keys and the sink = sigmoid(lse - s) * (softmax over the keys alone) v

(gpt-oss and GraniteSWA in transformers; the logit is not scaled). On a CPU torch's kernel returns lse, and its backward
pass takes any pair of output and logsumexp. Given the output and logsumexp of the softmax with the sink, it computes
the gradients of that softmax. The sink's own gradient is -(its weight) * (output . gradient of the output).

On other devices the sink is one more key of any SDPA kernel. It uses an extra head dim, in which every query has 1 and
every other key has 0. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_MORE_DIMS = 8  # extra head dims: kernels need head dims that 8 divides


def attention_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Computes attention with a learned sink in each head: q [n,h,L,D], k and v [n,g,S,D], sinks [h] -> [n,h,L,D].

    `mask` is added to the scores, or None. `causal` needs L = S and no mask. scale defaults to D ** -0.5.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cpu":
        out: Tensor = _OnCpu.apply(q, k, v, sinks, mask, causal, scale)
        return out
    return with_one_more_key(q, k, v, sinks, mask=mask, causal=causal, scale=scale)


class _OnCpu(torch.autograd.Function):
    """torch's CPU kernel and its backward pass, with the sink included in the logsumexp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)  # lse [n,h,L], fp32 or fp64
        logit = sinks.to(lse.dtype)[:, None]  # [h,1]
        # Scale the output by the keys' share of the softmax, then save the logsumexp over keys and sink.
        out = (out * torch.sigmoid(lse - logit)[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, mask, out, torch.logaddexp(lse, logit.expand_as(lse)))
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, mask, out, lse = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        # With this output and logsumexp the kernel's gradients for q, k and v are already exact.
        grads = kernel(grad, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        of_sinks = None
        if ctx.needs_input_grad[3]:
            weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # the sink's weight, [n,h,L]
            of_sinks = -(weight * (grad * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return *grads, of_sinks, None, None, None


def with_one_more_key(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Computes the same as `attention_with_sinks` with any SDPA kernel, at the cost of a copy of q, k and v.

    The sink is the first key, with a value of zero. `scale` is required.
    """
    (n, h, L, D), g = q.shape, k.shape[1]
    if g != h:  # each query head has its own sink logit, so a shared key head must be repeated
        k, v = (x.repeat_interleave(h // g, dim=1) for x in (k, v))
    # One more dim: queries have 1 in it, the sink has its logit, and all other keys have 0. Zeros fill the other dims.
    # The clamp keeps the logit finite (fp16 ends at 65,504). An infinite logit would give NaN in the dropped row, and
    # then in the gradients.
    logit = (sinks / scale).clamp(min=torch.finfo(q.dtype).min / 2).to(q.dtype)[None, :, None].expand(n, h, 1)
    q = torch.cat((q, q.new_ones(n, h, L, 1), q.new_zeros(n, h, L, _MORE_DIMS - 1)), dim=-1)
    first = torch.cat((k.new_zeros(n, h, 1, D), logit[..., None], k.new_zeros(n, h, 1, _MORE_DIMS - 1)), dim=-1)
    k = torch.cat((first, pad(k, (0, _MORE_DIMS))), dim=2)
    v = pad(v, (0, _MORE_DIMS, 1, 0))
    if causal:
        # Add a query at the sink's position, so that the causal triangle shows the sink to all other queries. Its row
        # is dropped below.
        q = pad(q, (0, 0, 1, 0))
    else:
        mask = None if mask is None else pad(mask, (1, 0))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out[:, :, int(causal) :, :D]
