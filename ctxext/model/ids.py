"""Checks that each token given to a model has a row in its embedding. Imports no torch.

A tokenizer with more tokens than the model has rows is common (a token was added, the matrix was not resized). It is
harmless until such a token occurs. Without this check torch raises an IndexError on a CPU, and a device assertion on
a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ctxext.errors import ModelError


def check_ids(ids: Iterable[int], vocabulary: int, name: str) -> None:
    """Raises ModelError if one of `ids` is `vocabulary` or more; `name` is the model's name for the message."""
    largest = max(ids, default=0)
    if largest >= vocabulary:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest}, but the model has {vocabulary} tokens",
            hint="put the model's own tokenizer beside its weights",
        )


def guard_ids(model: Any, vocabulary: int, name: str) -> None:
    """Checks the ids of every forward of a causal LM, before its embedding looks them up.

    A single token is not checked: in decoding the model's own head chose it, and reading its value would synchronise
    the GPU at every step.
    """

    def check(_: Any, given: tuple[Any, ...]) -> None:
        ids = given[0]
        if ids.shape[-1] > 1:
            check_ids([int(ids.max())], vocabulary, name)

    model.get_input_embeddings().register_forward_pre_hook(check)
