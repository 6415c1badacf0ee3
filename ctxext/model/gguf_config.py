"""Turns the header of a GGUF file into a config.json and the names of its tensors.

The resulting config.json computes what llama.cpp computes with the file. If that is not possible, the code raises an
error that names the reason: nothing that changes results is ignored. No torch; of the tensors only RoPE's factors are
read.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from typing import Any

from ctxext.errors import ModelError
from ctxext.model.config_fields import Fields
from ctxext.model.frequencies import inverse_frequencies
from ctxext.model.gguf_header import Header
from ctxext.model.model_config import ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # general.architecture; each is the model_type of its config.json
PERMUTED = ("llama",)  # architectures whose q and k rows are stored in pairs, the order of Meta's own RoPE
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FACTORS = "rope_freqs.weight"  # Llama 3's RoPE divides each frequency by its factor
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
REQUIRED = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
            "attention.layer_norm_rms_epsilon")  # fmt: skip
READ = {
    *REQUIRED,
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "vocab_size"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    *("rope.scaling.finetuned", "tensor_data_layout"),  # notes without effect on results
}
NEUTRAL = {f"rope.scaling.{name}": 1.0 for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")}


def config_of(header: Header) -> Fields:
    """Returns the config.json of a file, in the spelling of transformers 5, without its dtype.

    Raises ModelError for an architecture that is not supported, and for any header field that is not read here.
    """
    path, metadata = header.path, header.metadata
    parts, kind = metadata.get("split.count", 1), metadata.get("general.type", "model")
    if parts not in (0, 1):
        raise ModelError(
            f"{path}: one of {parts} parts of a split GGUF file",
            hint="join them first: llama-gguf-split --merge FIRST-PART OUT.gguf",
        )
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES or kind != "model":
        what = f"general.type {kind!r}" if kind != "model" else f"architecture {architecture!r}"
        raise ModelError(
            f"{path}: a GGUF file of {what}, which is not supported; supported are {', '.join(ARCHITECTURES)}",
            hint="give the model's original directory if ctxext supports its class: ctxext presets, docs/models.md",
        )
    # Fields of the architecture lose their prefix ("llama.context_length" becomes "context_length").
    fields = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    missing = [f"{architecture}.{name}" for name in REQUIRED if fields.get(name) is None]
    if missing or "token_embd.weight" not in header.tensors:
        raise ModelError(f"{path}: {', '.join(missing) or 'token_embd.weight'} missing in its header")
    # Reject each field of the architecture that this code does not read, unless its value is empty or neutral: it may
    # change what the model computes.
    own = {key: value for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    unread = [
        f"{key} {value!r}"[:80]
        for key, value in own.items()
        if (name := key.partition(".")[2]) not in READ and value and NEUTRAL.get(name) != value
    ]
    if unread:
        raise ModelError(
            f"{path}: {', '.join(unread)}: not supported, and it may change what the model computes",
            hint="give the model's original directory",
        )
    return _config(header, architecture, fields)


def _config(header: Header, architecture: str, fields: dict[str, Any]) -> Fields:
    # A list instead of an integer means head counts per layer, which one config.json of these classes cannot express.
    heads, width = fields["attention.head_count"], fields["embedding_length"]
    kv_heads = fields.get("attention.head_count_kv") or heads
    if not all(type(value) is int and value > 0 for value in (heads, kv_heads, width)):
        raise ModelError(f"{header.path}: different head counts in different layers are not supported")
    # Llama and Qwen apply RoPE to whole heads; their keys and values have the same head size.
    head_dim = fields.get("attention.key_length") or width // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(name) not in (None, head_dim):
            raise ModelError(f"{header.path}: {name} {fields[name]} in heads of {head_dim}: RoPE needs whole heads")
    tensors, ids = header.tensors, special_ids(header)
    config: Fields = {
        "model_type": architecture,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[
            architecture]],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields["context_length"],
        "rms_norm_eps": _shortest(fields["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(header, fields, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{name: ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }  # fmt: skip
    # The original length goes into the config only together with a RoPE scaling.
    if (original := fields.get("rope.scaling.original_context_length")) and config["rope_parameters"].get("factor"):
        config["original_max_position_embeddings"] = original
    # The header does not state biases; the presence of the first layer's bias tensors does.
    if architecture == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}
    if architecture == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if architecture != "llama":
        config["use_sliding_window"] = False
    return config


def special_ids(header: Header) -> dict[str, int]:
    """Returns the ids of the special tokens that the file names and that have a row in its embedding."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id",
             "eot_token_id": "eot_token_id", "unk_token_id": "unknown_token_id"}  # fmt: skip
    stated = {name: header.metadata.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
    rows = header.tensors["token_embd.weight"].shape[0]
    return {name: value for name, value in stated.items() if type(value) is int and 0 <= value < rows}


def _rope(header: Header, fields: dict[str, Any], head_dim: int) -> Fields:
    """Returns RoPE's parameters. Raises ModelError for a scaling that no config.json of these classes can express."""
    theta = _shortest(fields.get("rope.freq_base") or 10000.0)
    kind, factor = fields.get("rope.scaling.type") or "none", fields.get("rope.scaling.factor")
    # Older files state a linear scaling under this key.
    if fields.get("rope.scale_linear") not in (None, 0.0, 1.0):
        kind, factor = "linear", fields["rope.scale_linear"]
    rope: Fields = {"rope_type": "default", "rope_theta": theta}
    # Llama 3's scaling is stored as a tensor of factors instead of metadata.
    if FACTORS in header.tensors:
        if kind != "none":
            raise ModelError(f"{header.path}: {FACTORS} and rope.scaling.type {kind!r} together are not supported")
        return rope | _llama3(header, theta, head_dim)
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return rope
    if kind not in ("linear", "yarn") or not factor:
        raise ModelError(f"{header.path}: rope.scaling.type {kind!r}, factor {factor}: not supported in a GGUF file")
    rope |= {"rope_type": kind, "factor": _shortest(factor)}
    if kind == "yarn":
        original = fields.get("rope.scaling.original_context_length")
        if not original:
            raise ModelError(f"{header.path}: yarn without rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
        betas = {name: fields.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        rope |= {name: _shortest(value) for name, value in betas.items() if value}
    return rope


def _llama3(header: Header, theta: float, head_dim: int) -> Fields:
    """Returns the parameters of Llama 3's RoPE that give the factors stored in the file.

    The factors do not determine all parameters. The function tries the published ones (bands 1 and 4, from 8,192
    tokens) with the factor of the slowest frequency. Raises ModelError if they do not give the stored factors.
    """
    stored = header.tensors[FACTORS]
    if stored.type != "F32" or stored.shape != (head_dim // 2,):
        raise ModelError(f"{header.path}: {FACTORS} is {stored.type} {list(stored.shape)}, not F32 [{head_dim // 2}]")
    found = struct.unpack(f"<{head_dim // 2}f", header.read(FACTORS))
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": _shortest(max(found)), **LLAMA3}
    # The ratio of unscaled to scaled frequencies must equal the stored factors, to within 1e-4 relative.
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": theta}, head_dim, 1)[0]
    scaled = inverse_frequencies(rope, head_dim, 1)[0]
    if any(abs(a / b - factor) > 1e-4 * factor for a, b, factor in zip(plain, scaled, found, strict=True)):
        raise ModelError(
            f"{header.path}: {FACTORS} are not those of Llama 3.1 to 3.3 (bands 1 and 4, from 8,192 tokens); no "
            "config.json can express them",
            hint="give the model's original directory",
        )
    return rope


def _shortest(value: float) -> float:
    """Returns the shortest decimal that is this float32: 1e-05, where a double prints 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def tensor_names(header: Header, config: ModelConfig) -> dict[str, str]:
    """Returns the GGUF name of each tensor of a config.

    Raises ModelError if the file has other tensors, or tensors of other shapes.
    """
    named = {_name(name): name for name in header.tensors if name != FACTORS}
    # Collect all faults before raising, so that one message shows up to five of them.
    expected = config.tensors
    faults = [f"{name}: missing" for name in expected if name not in named]
    faults += [f"{named[name]}: does not belong to this class" for name in named if name not in expected]
    faults += [
        f"{named[name]}: {list(header.tensors[named[name]].shape)}, but {list(shape)} by its header"
        for name, shape in expected.items()
        if name in named and header.tensors[named[name]].shape != tuple(shape)
    ]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"{header.path}: its tensors do not match its header: {'; '.join(faults[:5])}{more}")
    return {name: named[name] for name in expected}


def _name(name: str) -> str:
    # "blk.3.attn_q.weight" becomes "model.layers.3.self_attn.q_proj.weight". An unknown name stays as it is, and
    # `tensor_names` then reports it.
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    plain = re.fullmatch(r"(\w+)\.(weight|bias)", name)
    if block and block[2] in NAMES:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.{block[3]}"
    return f"{NAMES[plain[1]]}.{plain[2]}" if plain and plain[1] in NAMES else name


def quantisation(header: Header) -> str:
    """Returns the storage types of the file's tensors with their counts: "Q4_1 x 210, F32 x 61, Q8_0 x 1"."""
    counts = Counter(stored.type for stored in header.tensors.values())
    return ", ".join(f"{kind} x {count}" for kind, count in counts.most_common())
