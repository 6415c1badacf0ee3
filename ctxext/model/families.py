"""The families that ctxext converts, and the stock transformers class of each. Tables and plain dicts; no torch.

| source  | hybrid class                | what the class can express for each layer                            |
|---------|-----------------------------|----------------------------------------------------------------------|
| llama   | SmolLM3ForCausalLM          | RoPE or not, window or not, independently for each layer             |
| mistral | SmolLM3ForCausalLM          | the same; the source's own layout has its window on every layer      |
| qwen2   | SmolLM3ForCausalLM          | the same; q, k, v have biases, o_proj gets a zero bias               |
| qwen3   | MellumForCausalLM, all dense| RoPE per layer type: all full layers alike, all sliding layers alike |
| llama, mistral, qwen2 | GraniteSWAForCausalLM, by name | as SmolLM3, and a learned sink for each head          |

The target classes have defaults that would be silently wrong: SmolLM3 puts the window on the NoPE layers, ties the
embeddings and uses theta 2e6. A conversion therefore writes every field. On disk SmolLM3's `no_rope_layers[i] == 1`
means that the layer USES RoPE; only this file and hybrids.py handle that inversion. GraniteSWA's `layer_rope_theta[i]`
is 0 where a layer has no RoPE. A sink of logit NO_SINK has a share of exactly zero, so that GraniteSWA can represent a
Llama exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ctxext.errors import ModelError
from ctxext.model.config_fields import (
    FIELDS,
    HEAD_DIM,
    KEPT,
    LABELS,
    UNREAD,
    check_effects,
    check_fields,
    check_layers,
    check_lengths,
    check_padding,
)
from ctxext.model.layout import LayerKind
from ctxext.model.rope_fields import NO_ROPE, read_rope
from ctxext.ops.cost import ModelShape

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One model_type: how its config.json is read, and what it can become.

    targets  the model_types that its conversions may have; the first is the default
    kinds    a function from a config to the layer layout
    qk_norm  queries and keys are normalised for each head
    sinks    each head has a learned sink
    """

    name: str
    targets: tuple[str, ...]
    kinds: Callable[[Config], tuple[LayerKind, ...]]
    qk_norm: bool = False
    sinks: bool = False


def _plain_kinds(config: Config) -> tuple[LayerKind, ...]:
    return (LayerKind(True, config.get("sliding_window")),) * config["num_hidden_layers"]


def _qwen_kinds(config: Config) -> tuple[LayerKind, ...]:
    # Without layer_types, the layers from max_window_layers on have the window. Every layer has RoPE.
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)  # transformers' default for both Qwen2 and Qwen3
        types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    return tuple(LayerKind(True, window if kind == "sliding_attention" else None) for kind in types)


def _smollm3_kinds(config: Config) -> tuple[LayerKind, ...]:
    # `no_rope_layers` has 1 where a layer uses RoPE. Without that list every `no_rope_layer_interval`th layer is NoPE,
    # and without layer_types the window is on the NoPE layers: SmolLM3's own defaults.
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    layers = config["num_hidden_layers"]
    uses_rope = config.get("no_rope_layers")
    if uses_rope is None:
        interval = config.get("no_rope_layer_interval", 4)
        uses_rope = [(i + 1) % interval != 0 for i in range(layers)]
    types = config.get("layer_types")
    if types is None:
        types = ["full_attention" if rope or window is None else "sliding_attention" for rope in uses_rope]
    return tuple(
        LayerKind(bool(rope), window if kind == "sliding_attention" else None)
        for rope, kind in zip(uses_rope, types, strict=True)
    )


def _mellum_kinds(config: Config) -> tuple[LayerKind, ...]:
    if set(config.get("mlp_layer_types") or ["sparse"]) != {"dense"}:
        raise ModelError("mellum with mixture-of-experts layers is not supported, only dense layers are")
    # A layer type whose RoPE is NO_ROPE, with any theta, does not rotate.
    rope = config["rope_parameters"]
    return tuple(
        LayerKind(
            rope[kind] != NO_ROPE | {"rope_theta": rope[kind].get("rope_theta")},
            config["sliding_window"] if kind == "sliding_attention" else None,
        )
        for kind in config["layer_types"]
    )


def _granite_kinds(config: Config) -> tuple[LayerKind, ...]:
    thetas = {theta for theta in config["layer_rope_theta"] if theta}
    if thetas - {config["rope_parameters"]["rope_theta"]}:
        raise ModelError(
            f"config.json: layer_rope_theta has {sorted(thetas)}, rope_theta is "
            f"{config['rope_parameters']['rope_theta']}: all layers with RoPE need the same theta"
        )
    return tuple(
        LayerKind(theta != 0, config["sliding_window"] if kind == "sliding_attention" else None)
        for theta, kind in zip(config["layer_rope_theta"], config["layer_types"], strict=True)
    )


NO_SINK = -1e4  # the logit of a sink without weight: sigmoid(lse + 1e4) is 1 in every dtype
HYBRIDS = ("smollm3", "granite_swa")
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", HYBRIDS, lambda config: (LayerKind(True, None),) * config["num_hidden_layers"]),
    "mistral": Family("mistral", HYBRIDS, _plain_kinds),
    "qwen2": Family("qwen2", HYBRIDS, _qwen_kinds),
    "qwen3": Family("qwen3", ("mellum",), _qwen_kinds, qk_norm=True),
    "smollm3": Family("smollm3", ("smollm3",), _smollm3_kinds),
    "mellum": Family("mellum", ("mellum",), _mellum_kinds, qk_norm=True),
    "granite_swa": Family("granite_swa", ("granite_swa",), _granite_kinds, sinks=True),
}
# transformers' default for a field that config.json leaves out, where it differs from that of llama
DEFAULTS: dict[str, Config] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "smollm3": {
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "pad_token_id": 128_004,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    "mellum": {"num_key_value_heads": 4, "head_dim": 128, "sliding_window": 1024},
    "granite_swa": {
        "num_key_value_heads": 4,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 100_257,
        "eos_token_id": 100_257,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
}
SOURCES = ("llama", "mistral", "qwen2", "qwen3")
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def family_of(config: Config) -> Family:
    """Returns the table entry for a config.json. Raises ModelError for a model_type that ctxext does not support."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def normalise(config: Config) -> Config:
    """Returns a copy of a raw config.json with every field that this package reads, and no other field.

    `rope_theta` and `rope_scaling` (transformers 4) become `rope_parameters`. Raises ModelError for a missing or
    invalid field (config_fields.py).
    """
    # Check before any computation: unsupported fields first, then types and bounds, then list lengths.
    family_of(config)
    if missing := [field for field in REQUIRED if config.get(field) is None]:
        raise ModelError(f"config.json: {', '.join(missing)} missing")
    check_effects(config)
    check_fields(config, FIELDS | LABELS)
    check_lengths(config)
    # Keep only the fields that the class reads, with the class's defaults for those that are absent.
    read = KEPT - set(UNREAD.get(config["model_type"], ()))
    config = {k: v for k, v in (DEFAULTS.get(config["model_type"], {}) | config).items() if k in read}
    check_padding(config)
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    if not 4 <= config["head_dim"] <= HEAD_DIM or config["head_dim"] % 2:
        allowed = f"even numbers from 4 to {HEAD_DIM:,}"
        raise ModelError(f"config.json: a head of {config['head_dim']:,}; allowed are {allowed}")
    if heads % config["num_key_value_heads"]:
        raise ModelError(
            f"config.json: {heads} query heads are not a multiple of the {config['num_key_value_heads']} kv heads"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act {config['hidden_act']!r} is not supported, only silu is")
    config.setdefault("tie_word_embeddings", False)
    config.setdefault("rms_norm_eps", 1e-6)
    # The defaults of these two classes for layer_types. `check_layers` and `read_rope` need the list.
    if config["model_type"] == "mellum" and not config.get("layer_types"):
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    if family_of(config).sinks and not config.get("layer_types"):
        layers = range(config["num_hidden_layers"])
        config["layer_types"] = ["sliding_attention" if i % 4 else "full_attention" for i in layers]
    check_layers(config)
    config["rope_parameters"] = read_rope(config)
    if family_of(config).sinks:
        _check_multipliers(config)
        theta = config["rope_parameters"]["rope_theta"]
        config["layer_rope_theta"] = config.get("layer_rope_theta") or [theta] * config["num_hidden_layers"]
    if config.get("original_max_position_embeddings") is None:
        config.pop("original_max_position_embeddings", None)
    family_of(config).kinds(config)  # raises where the layers are of a kind that is not supported
    return config


def _check_multipliers(config: Config) -> None:
    """Raises ModelError for scales of a Granite that differ from those of a Llama."""
    meant = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)
    for name, value in (meant | {"attention_multiplier": config["head_dim"] ** -0.5}).items():
        if not math.isclose(config[name], value, rel_tol=1e-12):
            raise ModelError(f"config.json: {name} is {config[name]:g}, only {value:g} is supported, as in a Llama")


def model_shape(config: Config) -> ModelShape:
    """Returns the sizes for the formulas of ops/cost.py, from a normalised config."""
    return ModelShape(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=bool(config["tie_word_embeddings"]),
        attention_bias=qkv_bias(config),
        output_bias=_o_bias(config),
        qk_norm=family_of(config).qk_norm,
        head_sinks=family_of(config).sinks,
    )


def qkv_bias(config: Config) -> bool:
    """Returns whether q, k and v have biases."""
    # Qwen2 always has biases on q, k and v, and none on o. For other families attention_bias decides all four.
    return config["model_type"] == "qwen2" or bool(config.get("attention_bias"))


def _o_bias(config: Config) -> bool:
    return config["model_type"] != "qwen2" and bool(config.get("attention_bias"))


def expected_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every weight of a checkpoint with this (normalised) config. A tied head is none."""
    width, heads, kv_heads, dim = (
        config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    mlp = config["intermediate_size"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        attention, block = f"model.layers.{i}.self_attn.", f"model.layers.{i}."
        rows = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
        for name, size in rows.items():
            tensors[f"{attention}{name}.weight"] = (size, width)
            if qkv_bias(config):
                tensors[f"{attention}{name}.bias"] = (size,)
        tensors[f"{attention}o_proj.weight"] = (width, heads * dim)
        if _o_bias(config):
            tensors[f"{attention}o_proj.bias"] = (width,)
        if family_of(config).qk_norm:
            tensors |= {f"{attention}{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
        if family_of(config).sinks:
            tensors[f"{attention}sinks"] = (heads,)
        for name, size in {"gate_proj": (mlp, width), "up_proj": (mlp, width), "down_proj": (width, mlp)}.items():
            tensors[f"{block}mlp.{name}.weight"] = size
            if config.get("mlp_bias"):
                tensors[f"{block}mlp.{name}.bias"] = size[:1]
        tensors |= {f"{block}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (config["vocab_size"], width)
    return tensors


def new_tensors(source: Config, target: Config) -> dict[str, tuple[int, ...]]:
    """Returns the weights that the target class has and the source lacks: biases and sinks (see `initial_value`)."""
    before, after = expected_tensors(source), expected_tensors(target)
    return {name: shape for name, shape in after.items() if name not in before}


def initial_value(name: str) -> float:
    """Returns the fill value of a weight of `new_tensors`. With it the model computes the same as the source."""
    return NO_SINK if name.endswith("sinks") else 0.0


def rope_of(config: Config) -> Config:
    """Returns the rope_parameters of the layers that use RoPE, or {} when none does. All RoPE layers have the same."""
    rope = config["rope_parameters"]
    if "rope_type" in rope:
        return dict(rope)
    for kind, name in zip(family_of(config).kinds(config), config["layer_types"], strict=True):
        if kind.use_rope:
            return dict(rope[name])
    return {}


def with_rope(config: Config, rope: Config) -> Config:
    """Returns a copy of a normalised config whose RoPE layers use `rope`. NoPE layers stay NoPE."""
    if "rope_type" in config["rope_parameters"]:
        changed = config | {"rope_parameters": dict(rope)}
        # GraniteSWA also has a theta per layer, 0 for NoPE.
        if config.get("layer_rope_theta"):
            changed["layer_rope_theta"] = [rope["rope_theta"] if theta else 0 for theta in config["layer_rope_theta"]]
        return changed
    # Mellum: one set of parameters per layer type.
    kinds = family_of(config).kinds(config)
    uses_rope = {name: kind.use_rope for kind, name in zip(kinds, config["layer_types"], strict=True)}
    nested = {name: dict(rope) if uses_rope.get(name) else old for name, old in config["rope_parameters"].items()}
    return config | {"rope_parameters": nested}


def first_layers(config: Config, layers: int) -> Config:
    """Returns the config of the same model with only its first `layers` layers."""
    by_layer = ("layer_types", "no_rope_layers", "mlp_layer_types", "layer_rope_theta")
    lists = {k: v[:layers] for k, v in config.items() if k in by_layer and v}
    return config | lists | {"num_hidden_layers": layers}
