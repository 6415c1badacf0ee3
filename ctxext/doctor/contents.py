"""Checks the contents of a model's files: weight values, RoPE fields, the chat template, the stop tokens.

torch and transformers are imported inside functions. Not checked: the values of large weight matrices (of checkpoints
above `READ` bytes only norms and biases are read); tensors of a dtype outside `WIDTHS`; whether the chat template is
the one used in training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ctxext.doctor.finding import Finding
from ctxext.errors import ModelError
from ctxext.model.companions import read_object
from ctxext.model.config_fields import Fields
from ctxext.model.model_config import ModelConfig
from ctxext.model.source import original_length, read_config
from ctxext.model.weights import model_name, read_tensors
from ctxext.units import counted, format_bytes, format_tokens

READ = 2 * 1024**3  # bytes; weights up to this size are read completely, which takes some seconds
FLOAT16_MAX = 65504.0
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # bytes of the dtypes of model/weights.py; no other one is read


def finite_values(path: Path, config: ModelConfig) -> str:
    """Returns text that says which weights were read.

    Raises ModelError for NaN and infinity and, where config.json's dtype is float16, for a value above FLOAT16_MAX.
    """
    import torch

    from ctxext.model.shards import tensor_reader

    # Choose what to read: everything, or only norms and biases (tensors with less than two dimensions).
    stored = read_tensors(path)
    tensors = {name: info for name, info in stored.items() if info.dtype in WIDTHS}
    size = sum(WIDTHS[info.dtype] * math.prod(info.shape) for info in tensors.values())
    everything = size <= READ
    chosen = [name for name, info in tensors.items() if everything or len(info.shape) < 2]
    # The largest absolute value of each tensor. NaN and infinity survive abs and max, so one number shows both.
    read, largest, where = tensor_reader(path), 0.0, ""
    for name in chosen:
        tensor = read(model_name(name))
        if tensor is None or not tensor.numel():
            continue
        value = float(tensor.abs().max().float() if tensor.dtype != torch.float64 else tensor.abs().max())
        if value != value or value == float("inf"):
            raise ModelError(f"{name} has values that are not finite (NaN or infinity)")
        if value > largest:
            largest, where = value, name
    # The stored values are finite. Loading in the dtype of config.json may still overflow.
    dtype = config.dtype
    if dtype == "float16" and largest > FLOAT16_MAX:
        raise ModelError(
            f"{where} has {largest:.3g}, which is infinity in float16, the dtype in config.json",
            hint="set dtype in config.json to bfloat16 or float32",
        )
    rest = "" if everything else f"; norms and biases only, of {format_bytes(size)}"
    if others := sorted({info.dtype for info in stored.values()} - WIDTHS.keys()):
        rest += f"; {counted(len(stored) - len(tensors), 'tensor')} not read: stored as {', '.join(others)}"
    return f"{counted(len(chosen), 'tensor')} read, all finite, largest {largest:.3g}{rest}"


def opens_as_config(path: Path, config: ModelConfig) -> str:
    """Returns the class that transformers builds from config.json. Raises ModelError where it cannot build one."""
    from transformers import CONFIG_MAPPING

    try:
        made = CONFIG_MAPPING[config.family.name].from_dict(read_config(path))
    except Exception as error:  # transformers raises errors of any kind for foreign configs
        text = str(error).strip().splitlines()[-1][:200].strip() if str(error).strip() else ""
        raise ModelError(f"transformers cannot read config.json: {type(error).__name__}: {text}") from error
    return f"reads config.json as {type(made).__name__}"


def two_thetas(raw: Fields) -> list[Finding]:
    """Returns a warning where rope_theta is given twice with different values, or not at all.

    Only `rope_parameters`, the format of transformers 5, with one RoPE for all layers is checked.
    """
    rope, beside = raw.get("rope_parameters"), raw.get("rope_theta")
    # A mapping of mappings has one RoPE for each type of layer: there is no single base to compare.
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return []
    inside = rope.get("rope_theta")
    if inside is not None and beside is not None and inside != beside:
        text = f"rope_theta is {beside} in config.json and {inside} in its rope_parameters"
        text += ": transformers 5 reads the second, transformers 4 the first"
        return [Finding("stored positions", "warning", text, "set both to the same value")]
    if inside is None and beside is None:
        text = "rope_parameters has no rope_theta: the default of the class is taken"
        return [Finding("stored positions", "warning", text, "add the rope_theta that the model was trained with")]
    return []


def short_claim(config: ModelConfig) -> list[Finding]:
    """Returns a warning where max_position_embeddings is less than the length that RoPE is scaled from."""
    original, claimed = original_length(config), config.max_position_embeddings
    if original is None or claimed >= original or config.rope.get("rope_type", "default") == "default":
        return []
    text = f"max_position_embeddings is {format_tokens(claimed)}, and RoPE is scaled from {format_tokens(original)}"
    return [Finding("length", "warning", text, "correct max_position_embeddings or original_max_position_embeddings")]


def chat_template(path: Path) -> list[Finding]:
    """Returns whether the chat template compiles and renders one user message."""
    from ctxext.model.load import load_tokenizer

    tokenizer: Any = load_tokenizer(path)
    if not tokenizer.chat_template:
        return [Finding("chat template", "ok", "none: a base model, or its template is missing")]
    messages = [{"role": "user", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a foreign program and may raise anything
        found = f"the template fails on one message of a user: {type(error).__name__}: {str(error)[:200]}"
        return [Finding("chat template", "failure", found, "copy the template of the model these weights came from")]
    # A template that compiles may still drop the message.
    if "Hello" not in text:
        found = "the template leaves out the text of a user's message"
        return [Finding("chat template", "failure", found, "copy the template of the model these weights came from")]
    return [Finding("chat template", "ok", f"compiles; one message becomes {len(text):,} characters")]


def stop_tokens(path: Path, config: ModelConfig) -> list[Finding]:
    """Returns a warning where generation does not stop at the tokenizer's end-of-text token."""
    from ctxext.model.load import load_tokenizer

    # eos_token_id of generation_config.json takes precedence over that of config.json. It is one id or a list.
    defaults = path / "generation_config.json"
    stated = read_object(defaults).get("eos_token_id") if defaults.is_file() else None
    stops = config.fields.get("eos_token_id") if stated is None else stated
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    end = load_tokenizer(path).eos_token_id
    if end is None or not stops or end in stops:
        return []
    text = f"the tokenizer's end-of-text token is {end}, and generation stops at {', '.join(map(str, stops))}"
    return [Finding("stop tokens", "warning", text, "add it to eos_token_id in generation_config.json")]
