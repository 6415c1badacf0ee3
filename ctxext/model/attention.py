"""ctxext's attention, registered in transformers' AttentionInterface. It never builds a T x T mask.

The stock class passes a layer's window with every call, from its own reading of config.json. Training passes document
bounds and S²-Attn groups (for the layers without a window) as keyword arguments of `model.forward`. A model therefore
holds no hidden state, and switching to another implementation restores it exactly. There is one explicit exception,
`load_model(nope_log_scale=)`: it sets an attribute of that name on the attention modules of N layers. The attribute is
never saved to disk. For experiments, `intervening` limits what a layer sees or masks heads while a `with` block runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ctxext.errors import ModelError
from ctxext.ops.backends import choice
from ctxext.ops.masks import Pattern


@dataclass(frozen=True)
class Intervention:
    """A restriction of one layer's attention, for experiments.

    visible  tokens that a query sees at most, itself included; None changes nothing
    masked   heads whose output is zero
    """

    visible: int | None = None
    masked: tuple[int, ...] = ()


NAME = "ctxext"  # transformers treats names with sdpa, flash or flex_attention specially; this one has none of them


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    document_starts: Tensor | None = None,
    group_size: int | None = None,
    shift: int | None = None,
    sink_tokens: int = 0,
    backend: str = "auto",
    watch: Callable[[nn.Module, Tensor, Tensor, Pattern, float | None], None] | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes one layer's attention. query [B, H, T, D], key and value [B, K, S, D], after RoPE; returns [B, T, H, D].

    attention_mask   [B, S] bool from `left_padding`, or None
    document_starts  [B, T], the index within the row at which each token's document starts
    group_size       S²-Attn's G in tokens, used on layers without a window; training only
    shift            tokens by which the groups of the shifted heads move; None is G // 2
    sink_tokens      first tokens of its document that a query sees beside its S²-Attn group; no effect without groups
    backend          see ops/backends/choice.py
    s_aux            [H], the logit of each head's learned sink (transformers' name), or None
    watch            a callback for measurements: watch(module, query, key, pattern, scaling), before the attention

    Raises ModelError for soft-capping, for dropout, and for a mask that this attention does not support.
    """
    _refuse_unsupported(module, softcap, dropout)
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ModelError(
                f"an attention mask of shape {list(attention_mask.shape)}: ctxext's attention needs intervals of keys "
                "that end at the query, and no T x T mask",
                hint="give a [B, S] padding mask or document_starts=",
            )
        if document_starts is not None:
            raise ModelError("padding and packed documents cannot be combined")
        document_starts = _padding_as_starts(attention_mask, query.shape[2])
    # S²-Attn replaces full attention only: a layer with a window keeps its window.
    grouped = sliding_window is None and group_size is not None
    pattern = Pattern(None, group_size, shift, sink_tokens) if grouped else Pattern(sliding_window)
    change: Intervention | None = getattr(module, "intervention", None)
    if change is not None and change.visible is not None:
        pattern = _narrowed(pattern, change.visible)
    if (a := getattr(module, "nope_log_scale", None)) is not None:
        query = _by_log_position(query, key.shape[2], document_starts, a)
    # The callback gets the query and the pattern that the layer uses: after every change above.
    if watch is not None:
        watch(module, query, key, pattern, scaling)
    out = choice.attention(
        query, key, value, pattern, document_starts=document_starts, scale=scaling, sink_logits=s_aux, backend=backend
    )
    if change is not None and change.masked:
        out = out.index_fill(1, torch.tensor(change.masked, device=out.device), 0.0)  # [B, H, T, D]
    return out.transpose(1, 2).contiguous(), None


def _refuse_unsupported(module: nn.Module, softcap: float | None, dropout: float) -> None:
    if softcap is not None:
        raise ModelError(f"{type(module).__name__} uses soft-capping, which ctxext's attention does not support")
    if dropout:
        raise ModelError(
            f"attention dropout {dropout} is not supported", hint="set attention_dropout to 0 in config.json"
        )


@contextmanager
def intervening(decoder: Any, changes: Mapping[int, Intervention]) -> Iterator[None]:
    """Applies `changes` to the layers of `decoder` (index from 0) while the `with` block runs.

    The changes apply to every forward pass, decoding with a cache included. Nothing is saved. Raises ModelError for a
    layer or a head that does not exist, and for fewer than one visible token.
    """
    # Check all changes before the first one is applied.
    layers = list(decoder.layers)
    heads = decoder.config.num_attention_heads
    for index, change in changes.items():
        wrong = [head for head in change.masked if not 0 <= head < heads]
        if not 0 <= index < len(layers) or wrong or (change.visible is not None and change.visible < 1):
            raise ModelError(f"layer {index}, {change}: the model has {len(layers)} layers with {heads} heads each")
    try:
        for index, change in changes.items():
            layers[index].self_attn.intervention = change
        yield
    finally:
        for index in changes:
            vars(layers[index].self_attn).pop("intervention", None)


def _narrowed(pattern: Pattern, visible: int) -> Pattern:
    # A window of at most `visible` keys.
    if pattern.group_size is not None:
        raise ModelError("interventions need the attention of inference; S²-Attn does not support them")
    return Pattern(min(visible, pattern.sliding_window or visible))


def left_padding(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Returns the padding of the current keys, [B, S] bool, or None. transformers calls this as its mask function.

    transformers sets `allow_is_causal_skip` to False when it needs more than a causal mask: documents detected from
    position_ids, or tokens that see each other in both directions. It passes a `local_size` other than the window when
    it needs chunks. None of these masks is supported; this function raises ModelError. While torch.compile traces, the
    flag is always False and carries no information, so it is not checked.
    """
    # The queries must be the last tokens of the keys. That does not hold for a static cache.
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ModelError("ctxext's attention needs transformers' dynamic cache, not a static one")
    chunked = local_size not in (None, getattr(config, "sliding_window", None))
    if chunked or not (allow_is_causal_skip or torch.compiler.is_compiling()):
        raise ModelError(
            "ctxext's attention is causal, with windows and left padding; this model or call needs another mask",
            hint="for packed documents give document_starts=, and no position_ids that restart",
        )
    if attention_mask is None:
        return None
    # A sliding layer's cache holds only the last keys: cut the mask to them.
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if bool(padding.all()):
        return None
    # A token before a pad means padding on the right or inside the row.
    if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        raise ModelError("padding must be on the left, before a row's first token")
    return padding


def _by_log_position(query: Tensor, keys: int, starts: Tensor | None, a: float) -> Tensor:
    """Multiplies the query at position t of its document by log(t + a) / log(a).

    This is HALO's rule for layers without positions at inference (arXiv 2601.22156, there a = 500). query is
    [B, H, T, D]; its last token is the last of S `keys`. `starts` is as `document_starts` in `attend`.
    """
    t = torch.arange(keys - query.shape[2], keys, device=query.device)[None]  # [1, T]
    t = t if starts is None else t - starts.to(t.device)  # [B, T]
    factor = torch.log(t + a) / math.log(a)
    return query * factor[:, None, :, None].to(query.dtype)


def _padding_as_starts(padding: Tensor, queries: int) -> Tensor:
    """Converts left padding, [B, S] bool, to document starts, [B, T]. A pad token sees only itself."""
    keys = padding.shape[1]
    index = torch.arange(keys - queries, keys, device=padding.device)
    return torch.minimum(index, (~padding).sum(1, keepdim=True))


def register() -> str:
    """Registers `attn_implementation="ctxext"` in transformers and returns that name. A repeated call has no effect."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, left_padding)
    return NAME
