"""Tables of the allowed values of config.json's fields, and the checks that run before any computation. No torch.

The bounds are far beyond every existing model. They limit the size of lists, tensors and powers that are computed from
a number in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctxext.errors import ModelError

Fields = dict[str, Any]  # the object of a config.json, as read or as written
Check = tuple[Callable[[Any], bool], str]

LAYERS, HEAD_DIM = 10_000, 65_536
LAYER_TYPES = ("full_attention", "sliding_attention")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def whole(low: int, high: int = 2**31) -> Check:
    """Returns the check for a whole number from `low` to `high`. true and false are not numbers."""
    return (lambda value: type(value) is int and low <= value <= high), f"a whole number from {low} to {high:,}"


def real(low: float, high: float) -> Check:
    """Returns the check for a number from `low` to `high`. NaN fails."""
    return (lambda value: type(value) in (int, float) and low <= value <= high), f"a number from {low:g} to {high:g}"


def one_of(*allowed: str) -> Check:
    """Returns the check for one of the texts in `allowed`."""
    return (lambda value: isinstance(value, str) and value in allowed), " or ".join(allowed)


def each(check: Check) -> Check:
    """Returns the check for a list whose entries all pass `check`."""
    return (lambda value: isinstance(value, list) and all(map(check[0], value))), f"a list, each {check[1]}"


def or_null(check: Check) -> Check:
    """Returns the check for null or a value that passes `check`."""
    return (lambda value: value is None or check[0](value)), f"{check[1]}, or null"


TRUTH: Check = (lambda value: isinstance(value, bool)), "true or false"
SIZE, TOKEN = whole(1), whole(-1)
TEXT: Check = (lambda value: isinstance(value, str)), "text"
TABLE: Check = (lambda value: isinstance(value, dict)), "an object"
FIELDS: dict[str, Check] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": whole(1, LAYERS),
    "num_attention_heads": SIZE,
    "max_position_embeddings": SIZE,
    "num_key_value_heads": or_null(SIZE),
    "head_dim": or_null(SIZE),
    "sliding_window": or_null(SIZE),
    "original_max_position_embeddings": or_null(SIZE),
    "original_rope_theta": or_null(real(1.001, 1e30)),
    "max_window_layers": whole(0),
    "no_rope_layer_interval": whole(0),
    "rms_norm_eps": real(1e-30, 1),
    "initializer_range": real(0, 1e6),
    "attention_dropout": real(0, 1),
    "tie_word_embeddings": TRUTH,
    "attention_bias": TRUTH,
    "mlp_bias": TRUTH,
    "use_sliding_window": TRUTH,
    "use_cache": TRUTH,
    "layer_types": or_null(each(one_of(*LAYER_TYPES))),
    "mlp_layer_types": or_null(each(one_of("dense", "sparse"))),
    "no_rope_layers": or_null(each(whole(0, 1))),
    "dtype": or_null(one_of(*DTYPES)),
    "torch_dtype": or_null(one_of(*DTYPES)),
    "architectures": or_null(each(TEXT)),
    "pad_token_id": or_null(TOKEN),
    "bos_token_id": or_null(TOKEN),
    "eos_token_id": (
        lambda value: or_null(TOKEN)[0](value) or each(TOKEN)[0](value),
        "a token, a list of them, or null",
    ),
    "hidden_act": TEXT,
    "moe_intermediate_size": SIZE,
    "num_experts_per_tok": SIZE,
    "num_experts": SIZE,
    "norm_topk_prob": TRUTH,
    "output_router_logits": TRUTH,
    "router_aux_loss_coef": real(0, 1e6),
    "layer_rope_theta": or_null(each(real(0, 1e30))),
    "embedding_multiplier": real(0, 1e6),
    "logits_scaling": real(0, 1e6),
    "residual_multiplier": real(0, 1e6),
    "attention_multiplier": real(0, 1e6),
}
LABELS: dict[str, Check] = {  # of classifiers; transformers creates as many labels as a config.json requests
    "num_labels": or_null(whole(0, 10_000)),
    "id2label": or_null(TABLE),
    "label2id": or_null(TABLE),
}
FACTS: dict[str, Check] = {  # of the ctxext.json in a model's directory
    "original_length": or_null(SIZE),
    "usable_length": or_null(SIZE),
    "name": or_null(TEXT),
    "source_layout": or_null(TABLE),
    "source_rope_parameters": or_null(TABLE),
}
PARENT: dict[str, Check] = {"path": TEXT, "weights": TABLE}
KEPT = {
    *FIELDS,
    "model_type",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
}  # no other field reaches a class of transformers
GRANITE = (
    "layer_rope_theta",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
)  # only granite_swa has these
UNREAD: dict[str, tuple[str, ...]] = {  # model_type: the fields of KEPT that its class does not read
    # Llama's attention ignores a window, but the caches of transformers would obey it, so the field is dropped.
    "llama": ("sliding_window", "use_sliding_window", "max_window_layers", *GRANITE),
    "mistral": ("attention_bias", "mlp_bias", *GRANITE),
    "qwen2": ("attention_bias", "mlp_bias", *GRANITE),
    "qwen3": ("mlp_bias", *GRANITE),
    "smollm3": GRANITE,
    "mellum": ("mlp_bias", *GRANITE),
    "granite_swa": ("use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"),
}
EFFECTS: dict[str, tuple[tuple[Any, ...], str]] = {  # field: the values without effect, and a hint for other values
    "quantization_config": ((None, {}), "give the model that the quantised weights were made from"),
    "compression_config": ((None, {}), "give the model that the quantised weights were made from"),
    "partial_rotary_factor": ((None, 1), "only models whose whole heads are rotated are supported"),
    "transformers_weights": ((None,), "rename the file to model.safetensors, and remove the field"),
    "configuration_files": ((), "copy the one that transformers reads to config.json, without this field"),
    "per_layer_config": ((None,), "only models whose layers have one size are supported"),
    "fusion_config": ((None,), "remove the field"),
    "distributed_config": ((None,), "remove the field"),
    "attention_chunk_size": ((None,), "only full attention and sliding windows are supported"),
    "kv_sharing_modes": ((None,), "only models whose layers have their own keys and values are supported"),
    "is_causal": ((True,), "only causal models are supported"),
    "is_encoder_decoder": ((False, None), "only decoders are supported"),
    "return_dict": ((True, None), "remove the field: the classes of transformers fail with it"),
}
ROPE: dict[str, Check] = {
    "rope_theta": real(1.001, 1e30),
    "factor": or_null(real(1, 1e6)),
    "low_freq_factor": or_null(real(1e-6, 1e6)),
    "high_freq_factor": or_null(real(1e-6, 1e6)),
    "beta_fast": or_null(real(1e-6, 1e6)),
    "beta_slow": or_null(real(1e-6, 1e6)),
    "attention_factor": or_null(real(1e-6, 1e6)),
    "original_max_position_embeddings": or_null(whole(2)),
    "short_factor": or_null(each(real(1e-6, 1e9))),
    "long_factor": or_null(each(real(1e-6, 1e9))),
    "partial_rotary_factor": real(0, 1),
}


def check_fields(values: dict[str, Any], table: dict[str, Check], file: object = "config.json") -> None:
    """Raises ModelError that lists every field of `values` with a value that `table` does not allow."""
    wrong = [
        f"{name} is {_shown(values[name])}; allowed: {allowed}"
        for name, (sound, allowed) in table.items()
        if name in values and not sound(values[name])
    ]
    if wrong:
        raise ModelError(f"{file}: {'; '.join(wrong)}")


def check_effects(config: Fields) -> None:
    """Raises ModelError for fields that transformers reads and this package leaves out, unless they have no effect."""
    for name, (idle, hint) in EFFECTS.items():
        if name in config and config[name] not in idle:
            raise ModelError(f"config.json: {name} {_shown(config[name])} is not supported", hint=hint)


def check_padding(config: Fields) -> None:
    """Raises ModelError for a pad_token_id without a row in the embedding: no transformers class accepts it."""
    pad, rows = config.get("pad_token_id"), config["vocab_size"]
    if pad is not None and pad >= rows:
        raise ModelError(
            f"config.json: pad_token_id {pad} is outside the {rows:,} rows of the embedding",
            hint="set it to null in config.json (ctxext needs no padding), or to a token that the model has",
        )


def check_lengths(config: Fields) -> None:
    """Raises ModelError for a per-layer list whose length is not the number of layers."""
    layers = config["num_hidden_layers"]
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta"):
        if config.get(name) is not None and len(config[name]) != layers:
            raise ModelError(f"config.json: {name} has {len(config[name])} entries, the model has {layers} layers")


def check_layers(config: Fields) -> None:
    """Raises ModelError for layer lists that transformers' masks, kernels, caches and classes read differently."""
    family, types = config["model_type"], set(config.get("layer_types") or ())
    if family == "smollm3" and config.get("no_rope_layers") is None and config.get("no_rope_layer_interval") == 0:
        raise ModelError(
            "config.json: no no_rope_layers, and a no_rope_layer_interval of 0",
            hint="list in no_rope_layers which layers use RoPE (1) and which do not (0)",
        )
    if family == "mistral" and "layer_types" in config and types != {"sliding_attention"}:
        raise ModelError("config.json: mistral with layer_types (a Ministral, whose layers differ) is not supported")
    if "sliding_attention" not in types:
        return
    if family == "llama":
        raise ModelError("config.json: layer_types has sliding_attention, which llama does not support")
    if config.get("sliding_window") is None:
        raise ModelError("config.json: layer_types has sliding_attention, but sliding_window is missing")
    if family in ("qwen2", "qwen3", "smollm3") and not config.get("use_sliding_window"):
        raise ModelError(
            "config.json: layer_types has sliding_attention, but use_sliding_window is not true",
            hint="set use_sliding_window to true, or these layers to full_attention, as the model was trained",
        )


def check_rope(rope: dict[str, Any], head_dim: int) -> None:
    """Checks one set of RoPE parameters that has a supported `rope_type`. Raises ModelError."""
    check_fields(rope, ROPE, "config.json, rope_parameters")
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ModelError("config.json: rope_parameters: high_freq_factor must be above low_freq_factor")
    # Of these three yarn fields only the default values are supported. transformers reads a truncate of null as false.
    for name, default in {"mscale": None, "mscale_all_dim": None, "truncate": True}.items():
        if rope["rope_type"] == "yarn" and rope.get(name, default) != default:
            raise ModelError(f"config.json, rope_parameters: yarn with {name} {_shown(rope[name])} is not supported")
    for name in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        if len(rope.get(name, ())) != head_dim // 2:
            raise ModelError(f"config.json: longrope needs {name}, {head_dim // 2} numbers for head_dim {head_dim}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
