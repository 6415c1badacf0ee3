"""A Llama whose weights are written by hand, so that which head retrieves is known before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ctxext.config.loader import build
from ctxext.model.source import resolve
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run
from tests.conftest import VOCAB, write_byte_tokenizer

HEADS, D, CODE = 8, 256, 16
THETA = 1e8  # of D / 2 = 128 pairs the first turn fast, and those from FIXED on hardly at all in 512 tokens
FIXED = 60
INDUCTION = (1, 5)  # layer, head
ONE, OWN, BEFORE, COPIED, NOISE, WIDTH = 0, 1, 1 + CODE, 1 + 9 * CODE, 1 + 10 * CODE, 192


@pytest.fixture(scope="session")
def induction(tmp_path_factory) -> Path:
    """Two layers that copy. Every token is a code of 16 numbers of length 1.

    layer 0   head h looks at the token h + 1 places back (RoPE alone: a query of fixed phases against a fixed key) and
              writes its code into a part of the residual of its own
    layer 1   head 5 asks for the token that has the same 8 tokens before it as the next one will have, by pairs that
              RoPE hardly turns, and writes that token's code where the output head reads. The others attend somewhere
              and write where nobody reads.

    Eight tokens are more than are needed to tell the key's place from all others, so that one head of layer 0 may be
    lost: only the retrieval head may not.
    """
    directory = tmp_path_factory.mktemp("induction") / "induction"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(VOCAB, CODE, generator=generator), dim=1)
    embedding = torch.zeros(VOCAB, WIDTH)
    embedding[:, ONE], embedding[:, OWN:BEFORE] = 1.0, codes
    head = torch.zeros(VOCAB, WIDTH)
    head[:, COPIED:NOISE] = 30 * codes
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(WIDTH)}
    for layer, weights in enumerate((_looks_back(), _induces(generator))):
        of = f"model.layers.{layer}."
        tensors |= {f"{of}self_attn.{name}_proj.weight": weight for name, weight in weights.items()}
        tensors |= {f"{of}{name}_layernorm.weight": torch.ones(WIDTH) for name in ("input", "post_attention")}
        tensors |= {f"{of}mlp.{name}_proj.weight": torch.zeros(8, WIDTH) for name in ("gate", "up")}
        tensors |= {f"{of}mlp.down_proj.weight": torch.zeros(WIDTH, 8)}
    save_file({name: x.contiguous() for name, x in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "head_dim": D, "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None, "dtype": "float32",
        "hidden_act": "silu", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(directory)
    return directory


def _looks_back() -> dict[str, Tensor]:
    """Layer 0. A token's norm is sqrt 2, so that what the layer reads of its entry ONE is sqrt(WIDTH / 2)."""
    q, k, v = (torch.zeros(HEADS, D, WIDTH) for _ in "qkv")
    o = torch.zeros(WIDTH, HEADS, D)
    frequencies = THETA ** (-torch.arange(D // 2) / (D // 2))
    fast, read = slice(0, 24), (WIDTH / 2) ** 0.5
    for h in range(HEADS):
        phase = -(h + 1) * frequencies[fast]  # turned by the query's place, it meets a key h + 1 places back
        q[h, :24, ONE], q[h, D // 2 : D // 2 + 24, ONE] = 400 * phase.cos() / read, 400 * phase.sin() / read
        k[h, :24, ONE] = 1 / read
        v[h, :CODE, OWN:BEFORE] = torch.eye(CODE) / read
        o[BEFORE + h * CODE : BEFORE + (h + 1) * CODE, h, :CODE] = torch.eye(CODE)
    return _flat(q, k, v, o)


def _induces(generator: torch.Generator) -> dict[str, Tensor]:
    """Layer 1. The norm of a token and the eight before it is sqrt 10."""
    q, k, v = (0.05 * torch.randn(HEADS, D, WIDTH, generator=generator) for _ in "qkv")
    o, h, read = torch.zeros(WIDTH, HEADS, D), INDUCTION[1], (WIDTH / 10) ** 0.5
    o[NOISE:] = 0.05 * torch.randn(WIDTH - NOISE, HEADS, D, generator=generator)
    q[h], k[h], v[h], o[:, h] = 0, 0, 0, 0
    # eight codes of 16 in pairs that do not turn: 64 in the first half of the head, 64 in the second
    place = torch.cat((torch.arange(FIXED, FIXED + 64), torch.arange(D // 2 + FIXED, D // 2 + FIXED + 64)))
    now = torch.arange(OWN, OWN + HEADS * CODE)  # a token and the seven before it, asked for as ...
    q[h, place, now] = 400 / read
    k[h, place, now + CODE] = 1 / read  # ... the eight before another
    v[h, :CODE, OWN:BEFORE] = torch.eye(CODE) / read
    o[COPIED:NOISE, h, :CODE] = torch.eye(CODE)
    return _flat(q, k, v, o)


def _flat(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> dict[str, Tensor]:
    return {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1), "o": o.flatten(1)}


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> Path:
    """Text to hide things in, without a digit."""
    path = tmp_path_factory.mktemp("letters") / "letters.txt"
    names = ("abode", "brook", "cloud", "dune", "elm", "fjord", "gorge", "heath", "isle", "jetty", "knoll")
    path.write_text("".join(f"{a} above {b} and {c},\n" for a in names for b in names[:3] for c in names[:3]))
    return path


@pytest.fixture(scope="session")
def kept_run() -> Callable[..., Path]:
    """make(model, place, text, **fields) -> a finished run that keeps every step's checkpoint."""

    def make(model: Path, place: Path, text: Path, **fields: Any) -> Path:
        run = place / "run"
        data = {"ctx": 128, "steps": 4, "global_batch_size": 1, "data": {"source": str(text)},
                "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
                "faults": {"save_steps": 1, "keep": 10, "keep_at_end": True}}  # fmt: skip
        plan = plan_run(resolve(str(model)), build(FinetuneSpec, data | fields, source="test"))
        start_run(plan, run)
        run_finetune(plan, run)
        return run

    return make


@pytest.fixture(scope="session")
def plain_run(kept_run, model_dir, letters, tmp_path_factory) -> Path:
    """Three steps of LoRA on a random llama; do not write to it."""
    return kept_run(model_dir("llama"), tmp_path_factory.mktemp("plain"), letters, steps=3)
