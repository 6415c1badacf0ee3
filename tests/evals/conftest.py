"""Small models with a tokenizer of one token a byte, in the shape `load_model` gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 260


@dataclass
class Loaded:
    """The attributes of a loaded model that evaluation reads."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    usable_length: int = 128
    name: str = "stand-in"


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="session")
def random_llama() -> Callable[..., LlamaForCausalLM]:
    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
        }
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()

    return make


@pytest.fixture(scope="session")
def loaded(random_llama: Callable[..., LlamaForCausalLM], byte_tokenizer: PreTrainedTokenizerFast) -> Loaded:
    return Loaded(random_llama(), byte_tokenizer)


@pytest.fixture(scope="session")
def stand_in() -> type[Loaded]:
    return Loaded
