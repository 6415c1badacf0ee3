"""The one check that the tokens a model is given have rows in its embedding. No torch is imported.

A tokenizer with more tokens than the model has rows is common (a token was added, the matrix was not resized), and
harmless until such a token occurs. torch would end in an IndexError on a CPU, and in an assertion on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ctxext.errors import ModelError


def check_ids(ids: Iterable[int], vocabulary: int, name: str) -> None:
    """Raises ModelError where one of `ids` is `vocabulary` or more; `name` is the model's."""
    largest = max(ids, default=0)
    if largest >= vocabulary:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest}, the model has {vocabulary}",
            hint="put this model's own tokenizer beside its weights",
        )


def guard_ids(model: Any, vocabulary: int, name: str) -> None:
    """Check the ids of every forward of a causal LM, before its embedding looks them up.

    One token alone is not checked: decoding gives a model what its own head chose, and a look at it would make a GPU
    wait at every step.
    """

    def check(_: Any, given: tuple[Any, ...]) -> None:
        ids = given[0]
        if ids.shape[-1] > 1:
            check_ids([int(ids.max())], vocabulary, name)

    model.get_input_embeddings().register_forward_pre_hook(check)
