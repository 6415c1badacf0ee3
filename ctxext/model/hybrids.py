"""Builds the config.json of a conversion: the target class, with every field written. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from ctxext.errors import InputError, ModelError
from ctxext.model.config_fields import Fields
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.model_config import ModelConfig
from ctxext.model.rope_fields import NO_ROPE

ANY_WINDOW = 128  # GraniteSWA builds a window's mask even where no layer uses one, so it needs some number


def target_of(source: ModelConfig, target: str | None = None) -> str:
    """Returns the model_type of a source's conversions. Raises InputError for a `target` its family does not have."""
    family = source.family
    if target is None:
        return family.targets[0]
    if target in family.targets:
        return target
    why = "it normalises queries and keys, which the class does not" if family.qk_norm else "it is not a class for it"
    raise InputError(
        f"--class {target}: {family.name} cannot be converted to it: {why}",
        hint=f"allowed for {family.name}: auto, {', '.join(family.targets)}",
    )


def hybrid_config(
    source: ModelConfig,
    kinds: Sequence[LayerKind],
    target: str | None = None,
    *,
    biases: bool = False,
    rope: Fields | None = None,
) -> ModelConfig:
    """Returns the config of a source in the target class with another layout; its `fields` state every field.

    `target` is a target model_type of the source's family, by default the first. With `biases`, q, k, v and o all have
    a bias, also where the source has none. `rope`: RoPE parameters that replace the source's. Raises ModelError when
    the target class cannot express the layout, and InputError for a target that the family does not have.
    """
    # The fields that all target classes share.
    target = target_of(source, target)
    shape, stated = source.shape, source.fields
    fields = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": source.max_position_embeddings,
        "initializer_range": stated.get("initializer_range", 0.02),
        "rms_norm_eps": source.rms_norm_eps,
        "use_cache": True,
        "pad_token_id": stated.get("pad_token_id"),
        "bos_token_id": stated.get("bos_token_id"),
        "eos_token_id": stated.get("eos_token_id"),
        "tie_word_embeddings": shape.tied,
        "attention_bias": shape.attention_bias or biases,
        "attention_dropout": stated.get("attention_dropout", 0.0),
    }
    # Fields that are written only where the source states them.
    for field in ("original_max_position_embeddings", "original_rope_theta"):
        if field in stated:
            fields[field] = stated[field]
    if source.dtype:
        fields["dtype"] = source.dtype
    # All target classes have one window number for the whole model.
    windows = {kind.sliding_window for kind in kinds} - {None}
    if len(windows) > 1:
        raise ModelError(f"{pattern_text(kinds)}: all sliding layers need one window, not {sorted(windows)}")
    window = windows.pop() if windows else None
    types = ["full_attention" if kind.sliding_window is None else "sliding_attention" for kind in kinds]
    write = {"smollm3": _write_smollm3, "mellum": _write_mellum, "granite_swa": _write_granite_swa}[target]
    rope = dict(source.rope if rope is None else rope)
    return ModelConfig.of(fields | write(source, kinds, rope, window, types))


def _write_smollm3(
    source: ModelConfig, kinds: Sequence[LayerKind], rope: Fields, window: int | None, types: list[str]
) -> Fields:
    # `no_rope_layers` has 1 where the layer USES RoPE.
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "mlp_bias": bool(source.fields.get("mlp_bias", False)),
        "rope_parameters": rope,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "no_rope_layers": [int(kind.use_rope) for kind in kinds],
        "no_rope_layer_interval": 0,
        "layer_types": types,
    }


def _write_mellum(
    source: ModelConfig, kinds: Sequence[LayerKind], rope: Fields, window: int | None, types: list[str]
) -> Fields:
    # Mellum has RoPE parameters per layer type: collect them, and raise where two layers of one type disagree.
    per_type: dict[str, Fields] = {}
    for kind, name in zip(kinds, types, strict=True):
        parameters = dict(rope) if kind.use_rope else NO_ROPE | {"rope_theta": rope["rope_theta"]}
        if per_type.setdefault(name, parameters) != parameters:
            raise ModelError(
                f"{pattern_text(kinds)}: qwen3 becomes a Mellum model, whose {name} layers need RoPE in all or in none"
            )
    # Mellum is a mixture-of-experts class. "dense" on every layer uses a plain MLP; the expert fields have no effect.
    return {
        "architectures": ["MellumForCausalLM"],
        "model_type": "mellum",
        "rope_parameters": per_type,
        "sliding_window": window,
        "layer_types": types,
        "mlp_layer_types": ["dense"] * len(kinds),
        "moe_intermediate_size": source.shape.intermediate_size,
        "num_experts_per_tok": 1,
        "num_experts": 1,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }


def _write_granite_swa(
    source: ModelConfig, kinds: Sequence[LayerKind], rope: Fields, window: int | None, types: list[str]
) -> Fields:
    # The multipliers of a Granite get the values at which it computes the same as a Llama.
    return {
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        "mlp_bias": bool(source.fields.get("mlp_bias", False)),
        "rope_parameters": rope,
        "layer_rope_theta": [rope["rope_theta"] if kind.use_rope else 0 for kind in kinds],
        "sliding_window": window or ANY_WINDOW,
        "layer_types": types,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": source.shape.head_dim**-0.5,
    }
