"""Writes a checkpoint of the zoo as a model directory: the published files, small, with random weights."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.zoo.checkpoint import Checkpoint, Config, scaled_config, scaled_ids
from tests.zoo.templates import TEMPLATES
from tests.zoo.tokenization import tokenizer_file

WORDS = ("bos_token", "eos_token", "pad_token", "unk_token")


def build(row: Checkpoint, directory: Path, *, weights: bool = True) -> Path:
    """The directory, with everything that the hub has for this checkpoint. Without `weights`, the small files alone."""
    directory.mkdir(parents=True)
    tokenizer, ids = tokenizer_file(row)
    rows = len(tokenizer["model"]["vocab"]) + sum(one >= 1000 for one in row.tokens) + row.spare_rows
    config = scaled_config(row, ids, rows)
    if weights:
        _write(directory / "config.json", config)
        _write_weights(row, config, directory)
    _write(directory / "config.json", config)
    _write(directory / "tokenizer.json", tokenizer)
    _write(directory / "tokenizer_config.json", _tokenizer_config(row, tokenizer["added_tokens"]))
    _write(directory / "special_tokens_map.json", {k: v for k in WORDS if (v := row.tokenizer_config.get(k))})
    (directory / "generation_config.json").unlink(missing_ok=True)  # save_pretrained writes one
    if row.generation is not None:
        numbered = {k: scaled_ids(v, ids) if k.endswith("_token_id") else v for k, v in row.generation.items()}
        _write(directory / "generation_config.json", numbered)
    if row.template and row.template_file:
        (directory / "chat_template.jinja").write_text(TEMPLATES[row.template], "utf-8")
    return directory


def _tokenizer_config(row: Checkpoint, added: list[dict[str, Any]]) -> Config:
    unknown = {row.tokenizer_config.get(word) for word in WORDS} - {None, *row.tokens.values()}
    assert not unknown, f"{row.name}: tokenizer_config.json names {unknown}, which the row does not list"
    decoder = {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added}
    inside = {"chat_template": TEMPLATES[row.template]} if row.template and not row.template_file else {}
    return {"added_tokens_decoder": decoder} | row.tokenizer_config | inside


def _write_weights(row: Checkpoint, config: Config, directory: Path) -> None:
    """Random weights of the stock class, in the published dtype and number of files, a tied head left out."""
    torch.manual_seed(zlib.crc32(row.name.encode()))
    stated = AutoConfig.from_pretrained(directory)
    if hasattr(stated, "quantization_config"):
        del stated.quantization_config
    model = AutoModelForCausalLM.from_config(stated)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:  # norms near one, biases and others near zero, none of them exactly
                parameter.copy_(("norm" in name) + 0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 1 if "embed_tokens" in name else 1 / math.sqrt(parameter.shape[-1]))
    model = model.to(getattr(torch, config.get("torch_dtype") or config.get("dtype") or "bfloat16"))
    stored = sum(
        tensor.numel() * tensor.element_size() for tensor in {p.data_ptr(): p for p in model.parameters()}.values()
    )
    model.save_pretrained(directory, max_shard_size=stored * 5 // (row.shards * 4) if row.shards > 1 else "50GB")


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
