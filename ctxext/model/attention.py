"""ctxext's attention as one entry in transformers' AttentionInterface: what each layer may see, never a T x T mask.

A layer's window comes from the stock class itself, which hands it over with every call. What training adds (document
bounds, S²-Attn groups on the layers without a window) travels as keyword arguments of `model.forward`, so a model
holds no hidden state and switching back to another implementation restores it exactly. The one exception is asked for
by name (`load_model(nope_log_scale=)`): an attribute of that name on the attention modules of N layers, never on disk.
For experiments a layer may be told to see less or to leave heads out (`intervening`), for as long as a block lasts.

    model(input_ids, document_starts=starts, group_size=2048, backend="auto")

Not done: static caches, soft-capping, dropout. Each is refused, none is dropped silently.
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
    """What is taken from one layer: `visible` tokens are all that a query sees, itself included (None: as ever), and
    `masked` heads give zeros."""

    visible: int | None = None
    masked: tuple[int, ...] = ()


NAME = "ctxext"  # transformers treats names containing sdpa, flash or flex_attention specially: this has none


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
    """One layer's attention. query [B, H, T, D], key and value [B, K, S, D], RoPE applied; returns [B, T, H, D].

    attention_mask   [B, S] bool from `left_padding`, or None
    document_starts  [B, T], the index within the row at which each token's document starts
    group_size       S²-Attn's G in tokens, used on layers without a window; training only
    shift            tokens that the shifted heads' groups are moved by; None is G // 2
    sink_tokens      first tokens of its document that a query sees beside its S²-Attn group; nothing without groups
    backend          ops/backends/choice.py
    s_aux            [H], the logit of each head's learned sink (transformers' name), or None
    watch            called as watch(module, query, key, pattern, scaling) before the layer attends: for measurements
    """
    _refuse_unsupported(module, softcap, dropout)
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ModelError(
                f"an attention mask of shape {list(attention_mask.shape)}: ctxext's attention sees intervals of keys "
                "that end at the query, and takes no T x T mask",
                hint="give a [B, S] padding mask, or document_starts=",
            )
        if document_starts is not None:
            raise ModelError("padding and packed documents cannot be combined")
        document_starts = _padding_as_starts(attention_mask, query.shape[2])
    grouped = sliding_window is None and group_size is not None
    pattern = Pattern(None, group_size, shift, sink_tokens) if grouped else Pattern(sliding_window)
    change: Intervention | None = getattr(module, "intervention", None)
    if change is not None and change.visible is not None:
        pattern = _narrowed(pattern, change.visible)
    if (a := getattr(module, "nope_log_scale", None)) is not None:
        query = _by_log_position(query, key.shape[2], document_starts, a)
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
        raise ModelError(f"{type(module).__name__} uses soft-capping, which ctxext's attention has not")
    if dropout:
        raise ModelError(
            f"attention dropout {dropout} is not supported", hint="set attention_dropout to 0 in config.json"
        )


@contextmanager
def intervening(decoder: Any, changes: Mapping[int, Intervention]) -> Iterator[None]:
    """While the block lasts, the layers of `decoder` named in `changes`, from 0, see less or have heads masked.

    Every forward of the model has it, decoding with a cache included; nothing of it is saved. Raises ModelError for a
    layer or a head that is not there, and for fewer than one visible token.
    """
    layers = list(decoder.layers)
    heads = decoder.config.num_attention_heads
    for index, change in changes.items():
        wrong = [head for head in change.masked if not 0 <= head < heads]
        if not 0 <= index < len(layers) or wrong or (change.visible is not None and change.visible < 1):
            raise ModelError(f"layer {index}, {change}: a model of {len(layers)} layers with {heads} heads each")
    try:
        for index, change in changes.items():
            layers[index].self_attn.intervention = change
        yield
    finally:
        for index in changes:
            vars(layers[index].self_attn).pop("intervention", None)


def _narrowed(pattern: Pattern, visible: int) -> Pattern:
    if pattern.group_size is not None:
        raise ModelError("an intervention is for the attention a model runs with, not for S²-Attn")
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
    """The mask function transformers calls once a forward: the padding of the keys at hand, [B, S] bool, or None.

    transformers says with `allow_is_causal_skip` that it wants more of a mask than causality (documents told by
    position_ids, tokens that see each other both ways), and with a `local_size` that is not the window that it wants
    chunks. None of it is had here, so that it is refused. (While tracing it always says so: then it cannot be told.)
    """
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ModelError("ctxext's attention takes transformers' dynamic cache, not a static one")
    chunked = local_size not in (None, getattr(config, "sliding_window", None))
    if chunked or not (allow_is_causal_skip or torch.compiler.is_compiling()):
        raise ModelError(
            "ctxext's attention is causal, with windows and left padding; this model or call asks for another mask",
            hint="for packed documents give document_starts=, and no position_ids that start anew",
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if bool(padding.all()):
        return None
    if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        raise ModelError("padding must be on the left, before a row's first token")
    return padding


def _by_log_position(query: Tensor, keys: int, starts: Tensor | None, a: float) -> Tensor:
    """The query at position t of its document times log(t + a) / log(a): HALO's rule for layers without positions at
    inference (arXiv 2601.22156, there a = 500). query [B, H, T, D], whose last sits at the last of S `keys`; starts as
    `document_starts` above.
    """
    t = torch.arange(keys - query.shape[2], keys, device=query.device)[None]  # [1, T]
    t = t if starts is None else t - starts.to(t.device)  # [B, T]
    factor = torch.log(t + a) / math.log(a)
    return query * factor[:, None, :, None].to(query.dtype)


def _padding_as_starts(padding: Tensor, queries: int) -> Tensor:
    """Left padding is a document that starts late: [B, S] bool -> [B, T] starts. A pad sees itself alone."""
    keys = padding.shape[1]
    index = torch.arange(keys - queries, keys, device=padding.device)
    return torch.minimum(index, (~padding).sum(1, keepdim=True))


def register() -> str:
    """Make `attn_implementation="ctxext"` known to transformers; returns that name. Calling again changes nothing."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, left_padding)
    return NAME
