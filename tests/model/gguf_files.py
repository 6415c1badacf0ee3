"""GGUF files that tests write with the gguf package, as llama.cpp's converter does, from a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """q or k as a llama's file stores it: the two halves of each rotated pair in rows side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    directory: Path,
    out: Path,
    *,
    matrices: str = "F32",
    tokenizer: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> Path:
    """Write a model directory as a GGUF file. `matrices` is the type of its 2-D tensors; `tokenizer` has keys of
    tokenizer.ggml (byte-level by default); `more` are further keys, and `extra` further tensors."""
    config = json.loads((directory / "config.json").read_text())
    kind = architecture or config["model_type"]
    writer = gguf.GGUFWriter(out, kind)
    writer.add_type("model")
    writer.add_name("made for a test")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    fields: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
    }
    for name, value in fields.items():
        writer.add_uint32(f"{kind}.{name}", value)
    writer.add_float32(f"{kind}.rope.freq_base", config["rope_parameters"]["rope_theta"])
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    for name, value in (tokenizer if tokenizer is not None else tokenizer_fields(directory)).items():
        add(writer, f"tokenizer.ggml.{name}", value)
    for name, value in (more or {}).items():
        add(writer, name, value)
    for file in sorted(directory.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
                weight = in_pairs(weight, heads if ".q_proj." in name else kv_heads)
            values = weight.float().numpy()
            form = gguf.GGMLQuantizationType[matrices if weight.dim() == 2 else "F32"]
            data = gguf.quantize(values, form)
            if matrices == "F16" and weight.dim() == 2:
                data = values.astype(np.float16)
            writer.add_tensor(gguf_name(name), data, raw_dtype=form)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def tokenizer_fields(directory: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """What llama.cpp's converter writes of a tokenizer.json of byte-level BPE."""
    stored = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    kinds = dict.fromkeys(vocabulary.values(), 1)
    for token in stored["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        kinds[token["id"]] = 3 if token["special"] else 4
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stored["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [kinds[number] for number in range(len(tokens))],
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
