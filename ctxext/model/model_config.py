"""A config.json that was parsed and validated once: layers, sizes, RoPE and tensors of a supported model. No torch.

`parse_config` is the only way from the object in a file to a `ModelConfig`. Code after it reads attributes; `fields` is
for what goes back to transformers or to a file. Layer kinds and defaults of each family are in families.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ctxext.errors import ModelError
from ctxext.model.config_fields import (
    FIELDS,
    HEAD_DIM,
    KEPT,
    LABELS,
    UNREAD,
    Fields,
    check_effects,
    check_fields,
    check_layers,
    check_lengths,
    check_padding,
)
from ctxext.model.families import DEFAULTS, NO_SINK, Family, family_of
from ctxext.model.layout import LayerKind
from ctxext.model.rope_fields import read_rope
from ctxext.ops.cost import ModelShape

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "layer_rope_theta")  # lists with one entry per layer


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model.

    fields                   the content of config.json: each field that the class reads, RoPE in the form of
                             transformers 5. Do not change this dict; use `with_fields`
    family                   the entry for its model_type
    kinds                    RoPE and attention of each layer
    shape                    the sizes, for the formulas of ops/cost.py
    rope                     the RoPE parameters of the layers that use RoPE, {} where none does; they all have the same
    max_position_embeddings  the claimed length in tokens
    rms_norm_eps             the epsilon of every RMSNorm
    """

    fields: Fields
    family: Family
    kinds: tuple[LayerKind, ...]
    shape: ModelShape
    rope: Fields
    max_position_embeddings: int
    rms_norm_eps: float

    @classmethod
    def of(cls, fields: Fields) -> ModelConfig:
        """Builds the object from fields that are complete: the result of `parse_config`, or what this package wrote."""
        family = family_of(fields)
        kinds = family.kinds(fields)
        return cls(
            fields=fields,
            family=family,
            kinds=kinds,
            shape=_shape(fields, family),
            rope=_rope_of(fields, kinds),
            max_position_embeddings=fields["max_position_embeddings"],
            rms_norm_eps=fields["rms_norm_eps"],
        )

    @property
    def dtype(self) -> str | None:
        """The dtype of the weights as the file states it, in the field of transformers 5 or of transformers 4."""
        return self.fields.get("dtype") or self.fields.get("torch_dtype")

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of a checkpoint with this config. A tied head is none."""
        return _tensors(self)

    def with_fields(self, **changes: Any) -> ModelConfig:
        """Returns the config with other values for some fields. The values are not validated."""
        return ModelConfig.of(self.fields | changes)

    def with_rope(self, rope: Fields) -> ModelConfig:
        """Returns the config with `rope` for the layers that use RoPE. NoPE layers stay NoPE."""
        old = self.fields["rope_parameters"]
        if "rope_type" in old:
            # GraniteSWA also has a theta per layer, 0 for NoPE.
            thetas = self.fields.get("layer_rope_theta")
            per_layer = {"layer_rope_theta": [rope["rope_theta"] if theta else 0 for theta in thetas]} if thetas else {}
            return self.with_fields(rope_parameters=dict(rope), **per_layer)
        # Mellum: one set of parameters per layer type.
        uses_rope = {name: kind.use_rope for kind, name in zip(self.kinds, self.fields["layer_types"], strict=True)}
        nested = {name: dict(rope) if uses_rope.get(name) else kept for name, kept in old.items()}
        return self.with_fields(rope_parameters=nested)

    def first_layers(self, layers: int) -> ModelConfig:
        """Returns the config of the same model with only its first `layers` layers."""
        lists = {name: self.fields[name][:layers] for name in BY_LAYER if self.fields.get(name)}
        return self.with_fields(num_hidden_layers=layers, **lists)


def parse_config(raw: Fields) -> ModelConfig:
    """Parses the object of a config.json. Raises ModelError for a missing, invalid or unsupported field.

    `rope_theta` and `rope_scaling` (transformers 4) become `rope_parameters`. Fields that the class does not read are
    left out; absent fields get the defaults of the class.
    """
    # Check before any computation: unsupported fields first, then types and bounds, then list lengths.
    family = family_of(raw)
    if missing := [field for field in REQUIRED if raw.get(field) is None]:
        raise ModelError(f"config.json: {', '.join(missing)} missing")
    check_effects(raw)
    check_fields(raw, FIELDS | LABELS)
    check_lengths(raw)
    # Keep only the fields that the class reads, with the class's defaults for those that are absent.
    read = KEPT - set(UNREAD[family.name])
    fields = {k: v for k, v in (DEFAULTS.get(family.name, {}) | raw).items() if k in read}
    check_padding(fields)
    _complete_heads(fields)
    if fields.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act {fields['hidden_act']!r} is not supported, only silu is")
    fields.setdefault("tie_word_embeddings", False)
    fields.setdefault("rms_norm_eps", 1e-6)
    # The defaults of these two classes for layer_types. `check_layers` and `read_rope` need the list.
    if family.name == "mellum" and not fields.get("layer_types"):
        fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    if family.sinks and not fields.get("layer_types"):
        layers = range(fields["num_hidden_layers"])
        fields["layer_types"] = ["sliding_attention" if i % 4 else "full_attention" for i in layers]
    check_layers(fields)
    fields["rope_parameters"] = read_rope(fields)
    if family.sinks:
        _check_multipliers(fields)
        theta = fields["rope_parameters"]["rope_theta"]
        fields["layer_rope_theta"] = fields.get("layer_rope_theta") or [theta] * fields["num_hidden_layers"]
    if fields.get("original_max_position_embeddings") is None:
        fields.pop("original_max_position_embeddings", None)
    return ModelConfig.of(fields)  # raises where the layers are of a kind that is not supported


def _complete_heads(fields: Fields) -> None:
    """Adds the number of kv heads and the head's width where they are absent, and checks both."""
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or heads
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // heads
    if not 4 <= fields["head_dim"] <= HEAD_DIM or fields["head_dim"] % 2:
        allowed = f"even numbers from 4 to {HEAD_DIM:,}"
        raise ModelError(f"config.json: a head of {fields['head_dim']:,}; allowed are {allowed}")
    if heads % fields["num_key_value_heads"]:
        raise ModelError(
            f"config.json: {heads} query heads are not a multiple of the {fields['num_key_value_heads']} kv heads"
        )


def _check_multipliers(fields: Fields) -> None:
    """Raises ModelError for scales of a Granite that differ from those of a Llama."""
    meant = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)
    for name, value in (meant | {"attention_multiplier": fields["head_dim"] ** -0.5}).items():
        if not math.isclose(fields[name], value, rel_tol=1e-12):
            raise ModelError(f"config.json: {name} is {fields[name]:g}, only {value:g} is supported, as in a Llama")


def _shape(fields: Fields, family: Family) -> ModelShape:
    biases = bool(fields.get("attention_bias"))
    return ModelShape(
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        intermediate_size=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        tied=bool(fields["tie_word_embeddings"]),
        # Qwen2 always has biases on q, k and v, and none on o. For other families attention_bias decides all four.
        attention_bias=biases or family.name == "qwen2",
        output_bias=biases and family.name != "qwen2",
        qk_norm=family.qk_norm,
        head_sinks=family.sinks,
    )


def _rope_of(fields: Fields, kinds: tuple[LayerKind, ...]) -> Fields:
    rope = fields["rope_parameters"]
    if "rope_type" in rope:
        return dict(rope)
    # Mellum has RoPE parameters per layer type.
    for kind, name in zip(kinds, fields["layer_types"], strict=True):
        if kind.use_rope:
            return dict(rope[name])
    return {}


def _tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shape = config.shape
    width, mlp, dim, heads, kv_heads = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.head_dim,
        shape.num_heads,
        shape.num_kv_heads,
    )
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, width)}
    for i in range(shape.num_layers):
        attention, block = f"model.layers.{i}.self_attn.", f"model.layers.{i}."
        for name, rows in {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}.items():
            tensors[f"{attention}{name}.weight"] = (rows, width)
            if shape.attention_bias:
                tensors[f"{attention}{name}.bias"] = (rows,)
        tensors[f"{attention}o_proj.weight"] = (width, heads * dim)
        if shape.output_bias:
            tensors[f"{attention}o_proj.bias"] = (width,)
        if shape.qk_norm:
            tensors |= {f"{attention}{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
        if shape.head_sinks:
            tensors[f"{attention}sinks"] = (heads,)
        for name, size in {"gate_proj": (mlp, width), "up_proj": (mlp, width), "down_proj": (width, mlp)}.items():
            tensors[f"{block}mlp.{name}.weight"] = size
            if config.fields.get("mlp_bias"):
                tensors[f"{block}mlp.{name}.bias"] = size[:1]
        tensors |= {f"{block}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors["model.norm.weight"] = (width,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab_size, width)
    return tensors


def new_tensors(source: ModelConfig, target: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the weights that the target class has and the source lacks: biases and sinks (see `initial_value`)."""
    return {name: shape for name, shape in target.tensors.items() if name not in source.tensors}


def initial_value(name: str) -> float:
    """Returns the fill value of a weight of `new_tensors`. With it the model computes the same as the source."""
    return NO_SINK if name.endswith("sinks") else 0.0
