"""A hand-written forward pass, layer by layer: the reference that the gate compares conversions with.

It uses plain torch and naive_attention, and nothing from transformers. It takes the window and RoPE of every layer from
the layout, and biases and qk-norm from the weights. A stock class with a wrong configuration therefore gives different
logits. The code is slow and short: attention takes O(T^2) memory, and weights are read one tensor at a time.

In fp64 the walk is exact for this purpose: its rounding is 2^-29 of that of fp32. The angles of RoPE stay in fp32,
because every class of transformers computes them in fp32.

Shapes: B batch, T tokens, E model width, H query heads, K kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxext.model.frequencies import inverse_frequencies
from ctxext.model.layout import LayerKind
from ctxext.model.model_config import ModelConfig
from ctxext.ops.masks import Pattern, lower_bounds
from ctxext.ops.naive_attention import naive_attention

Weights = Callable[[str], Tensor | None]  # name -> tensor, None where the checkpoint has no such tensor


HEAD_ROWS = 8192  # rows of the head multiplied at once: the whole head in fp64 would take twice its size in memory


def walk(
    weights: Weights,
    config: ModelConfig,
    kinds: Sequence[LayerKind],
    input_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns logits [B, T, V] of a config's model under `kinds`, computed in `dtype`, returned in fp32.

    The pass covers `len(kinds)` layers. Raises KeyError for a weight that `weights` does not have.
    """
    T = input_ids.shape[1]
    embedding = _need(weights, "model.embed_tokens.weight", torch.float32)
    x = F.embedding(input_ids, embedding).to(dtype)  # (B, T, E)
    cos, sin = (angles.to(dtype) for angles in _rotation(config, T))
    for i, kind in enumerate(kinds):
        layer = f"model.layers.{i}."
        h = _rms_norm(x, _need(weights, f"{layer}input_layernorm.weight", dtype), config.rms_norm_eps)
        x = x + _attention(weights, f"{layer}self_attn.", config, kind, h, cos, sin)
        h = _rms_norm(x, _need(weights, f"{layer}post_attention_layernorm.weight", dtype), config.rms_norm_eps)
        gate, up = (_linear(weights, f"{layer}mlp.{name}", h) for name in ("gate_proj", "up_proj"))
        x = x + _linear(weights, f"{layer}mlp.down_proj", F.silu(gate) * up)
    x = _rms_norm(x, _need(weights, "model.norm.weight", dtype), config.rms_norm_eps)
    head = embedding if config.shape.tied else _need(weights, "lm_head.weight", torch.float32)
    return torch.cat([(x @ rows.to(dtype).T).float() for rows in head.split(HEAD_ROWS)], dim=-1)


def _attention(
    weights: Weights, name: str, config: ModelConfig, kind: LayerKind, h: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    # Self-attention of one layer: normed states h [B, T, E] -> [B, T, E], output projection included.
    B, T, _ = h.shape
    D = config.shape.head_dim
    q, k, v = (
        _linear(weights, f"{name}{p}_proj", h).view(B, T, -1, D).transpose(1, 2) for p in "qkv"
    )  # (B, H|K, T, D)
    # Qwen3 and Mellum normalise each head of q and k before RoPE. Other families have no such weights.
    norms = weights(f"{name}q_norm.weight"), weights(f"{name}k_norm.weight")
    if norms[0] is not None and norms[1] is not None:
        q, k = (_rms_norm(x, w.to(h.dtype), config.rms_norm_eps) for x, w in zip((q, k), norms, strict=True))
    if kind.use_rope:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    # `ratio` query heads share one kv head. A learned sink has one logit per query head.
    lo = lower_bounds(Pattern(sliding_window=kind.sliding_window, group_size=None), T)
    ratio = q.shape[1] // k.shape[1]
    sinks = weights(f"{name}sinks")
    logits = [None] * k.shape[1] if sinks is None else list(sinks.to(h.dtype).split(ratio))
    groups = [
        naive_attention(q[:, g * ratio : (g + 1) * ratio], k[:, g : g + 1], v[:, g : g + 1], lo, sink_logits=logits[g])
        for g in range(k.shape[1])
    ]  # one kv head at a time, so that the scores take at most T x T x ratio
    out = torch.cat(groups, dim=1)
    return _linear(weights, f"{name}o_proj", out.transpose(1, 2).reshape(B, T, -1))


def _rotation(config: ModelConfig, T: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [T, D / 2] of the RoPE layers, both empty when no layer uses RoPE."""
    rope = config.rope
    if not rope:
        return torch.empty(0), torch.empty(0)
    frequencies, scale = inverse_frequencies(rope, config.shape.head_dim, config.max_position_embeddings, T)
    angles = torch.arange(T, dtype=torch.float32)[:, None] * torch.tensor(frequencies, dtype=torch.float32)
    return angles.cos() * scale, angles.sin() * scale


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + D/2}) by their angles. This is the pairing of the Llama family."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    bias = weights(f"{name}.bias")
    return F.linear(x, _need(weights, f"{name}.weight", x.dtype), None if bias is None else bias.to(x.dtype))


def _need(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    # One weight in `dtype`. Raises KeyError where the checkpoint does not have it.
    tensor = weights(name)
    if tensor is None:
        raise KeyError(name)
    return tensor.to(dtype)
