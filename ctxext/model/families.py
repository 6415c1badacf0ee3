"""The families that ctxext supports, and the stock transformers class of each. Tables and plain dicts; no torch.

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

A new family needs entries in FAMILIES, DEFAULTS and SOURCES here, in UNREAD of config_fields.py, and in FACTS of
export/matrix.py; a new target class also a function in hybrids.py. tests/model/test_config_classes.py compares them
with the fields of transformers' class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ctxext.errors import ModelError
from ctxext.model.config_fields import Fields
from ctxext.model.layout import LayerKind
from ctxext.model.rope_fields import NO_ROPE


@dataclass(frozen=True)
class Family:
    """One model_type: how its config.json is read, and what it can become.

    targets  the model_types that its conversions may have; the first is the default
    kinds    a function from the fields of a config.json to the kind of each layer
    qk_norm  queries and keys are normalised for each head
    sinks    each head has a learned sink
    """

    name: str
    targets: tuple[str, ...]
    kinds: Callable[[Fields], tuple[LayerKind, ...]] = field(repr=False)
    qk_norm: bool = False
    sinks: bool = False


def _one_window_kinds(fields: Fields) -> tuple[LayerKind, ...]:
    return (LayerKind(True, fields.get("sliding_window")),) * fields["num_hidden_layers"]


def _qwen_kinds(fields: Fields) -> tuple[LayerKind, ...]:
    # Without layer_types, the layers from max_window_layers on have the window. Every layer has RoPE.
    layers = fields["num_hidden_layers"]
    window = fields.get("sliding_window") if fields.get("use_sliding_window") else None
    types = fields.get("layer_types")
    if types is None:
        first = fields.get("max_window_layers", 28)  # transformers' default for both Qwen2 and Qwen3
        types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    return tuple(LayerKind(True, window if kind == "sliding_attention" else None) for kind in types)


def _smollm3_kinds(fields: Fields) -> tuple[LayerKind, ...]:
    # `no_rope_layers` has 1 where a layer uses RoPE. Without that list every `no_rope_layer_interval`th layer is NoPE,
    # and without layer_types the window is on the NoPE layers: SmolLM3's own defaults.
    window = fields.get("sliding_window") if fields.get("use_sliding_window") else None
    layers = fields["num_hidden_layers"]
    uses_rope = fields.get("no_rope_layers")
    if uses_rope is None:
        interval = fields.get("no_rope_layer_interval", 4)
        uses_rope = [(i + 1) % interval != 0 for i in range(layers)]
    types = fields.get("layer_types")
    if types is None:
        types = ["full_attention" if rope or window is None else "sliding_attention" for rope in uses_rope]
    return tuple(
        LayerKind(bool(rope), window if kind == "sliding_attention" else None)
        for rope, kind in zip(uses_rope, types, strict=True)
    )


def _mellum_kinds(fields: Fields) -> tuple[LayerKind, ...]:
    if set(fields.get("mlp_layer_types") or ["sparse"]) != {"dense"}:
        raise ModelError("mellum with mixture-of-experts layers is not supported, only dense layers are")
    # A layer type has no RoPE where its parameters are NO_ROPE, whatever theta is.
    rope = fields["rope_parameters"]
    return tuple(
        LayerKind(
            rope[kind] != NO_ROPE | {"rope_theta": rope[kind].get("rope_theta")},
            fields["sliding_window"] if kind == "sliding_attention" else None,
        )
        for kind in fields["layer_types"]
    )


def _granite_kinds(fields: Fields) -> tuple[LayerKind, ...]:
    thetas = {theta for theta in fields["layer_rope_theta"] if theta}
    if thetas - {fields["rope_parameters"]["rope_theta"]}:
        raise ModelError(
            f"config.json: layer_rope_theta has {sorted(thetas)}, rope_theta is "
            f"{fields['rope_parameters']['rope_theta']}: all layers with RoPE need the same theta"
        )
    return tuple(
        LayerKind(theta != 0, fields["sliding_window"] if kind == "sliding_attention" else None)
        for theta, kind in zip(fields["layer_rope_theta"], fields["layer_types"], strict=True)
    )


NO_SINK = -1e4  # the logit of a sink without weight: sigmoid(lse + 1e4) is 1 in every dtype
HYBRIDS = ("smollm3", "granite_swa")
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", HYBRIDS, lambda fields: (LayerKind(True, None),) * fields["num_hidden_layers"]),
    "mistral": Family("mistral", HYBRIDS, _one_window_kinds),
    "qwen2": Family("qwen2", HYBRIDS, _qwen_kinds),
    "qwen3": Family("qwen3", ("mellum",), _qwen_kinds, qk_norm=True),
    "smollm3": Family("smollm3", ("smollm3",), _smollm3_kinds),
    "mellum": Family("mellum", ("mellum",), _mellum_kinds, qk_norm=True),
    "granite_swa": Family("granite_swa", ("granite_swa",), _granite_kinds, sinks=True),
}
# transformers' default for a field that config.json leaves out, where it differs from that of llama
DEFAULTS: dict[str, Fields] = {
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
# The families that a conversion can start from.
SOURCES = ("llama", "mistral", "qwen2", "qwen3")


def family_of(fields: Fields) -> Family:
    """Returns the table entry for a config.json. Raises ModelError for a model_type that ctxext does not support."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
