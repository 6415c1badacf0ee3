"""A small random model, loaded as `load_model` loads it, and a stand-in for models made in a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ctxext.model.load import LoadedModel, load_model


@dataclass
class StandIn:
    """The attributes of a loaded model that evaluation reads."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    usable_length: int = 128
    name: str = "stand-in"


@pytest.fixture(scope="session")
def loaded(model_dir: Callable[..., Path]) -> LoadedModel:
    """Random, usable to 128 tokens, one token a byte."""
    return load_model(model_dir(max_position_embeddings=128), device="cpu")


@pytest.fixture(scope="session")
def stand_in() -> type[StandIn]:
    return StandIn
