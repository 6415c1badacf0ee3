"""Documents as token ids, and which of these training scores: those of answers, where a document has answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ctxext.data.encoding import PlainText
from ctxext.data.readers import Document
from ctxext.errors import InputError

_BATCH_CHARACTERS = 1 << 20  # documents handed to the tokenizer together, at least one


class Encoded(NamedTuple):
    """A document's ids, which of them are scored (None: all), the UTF-8 bytes of its text, and whether a chat template
    rendered it."""

    ids: list[int]
    marks: np.ndarray | None
    text_bytes: int
    rendered: bool


def encode_documents(documents: Iterable[Document], plain: PlainText) -> Iterator[Encoded]:
    """Each document that has any token."""
    for batch in _batches(documents):
        unread = [document.text for document in batch if document.answers is None and document.ids is None]
        rendered = [document.text for document in batch if document.answers is not None]
        of_text = iter(plain.encode(unread)[0] if unread else [])
        of_answers = iter(_encode_rendered(rendered, plain.tokenizer) if rendered else [])
        for document in batch:
            marks = None
            if document.ids is not None:
                ids = list(document.ids)
            elif document.answers is None:
                ids = next(of_text)
            else:
                ids, spans = next(of_answers)
                marks = scored_tokens(spans, document.answers) if ids else None
            if ids:
                yield Encoded(ids, marks, len(document.text.encode()), document.rendered)


def _encode_rendered(texts: list[str], tokenizer: Any) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, their characters) of texts whose control tokens are meant. InputError for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not say which characters a token has: answers are not found",
            hint="give the model a fast tokenizer (tokenizer.json)",
        )
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(texts, return_offsets_mapping=True, **options)
    return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


def scored_tokens(spans: list[tuple[int, int]], answers: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which tokens overlap an answer, bool [tokens]; `spans` are the characters of each, as a fast tokenizer says."""
    begin, stop = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    begin = np.minimum(begin, stop - 1)  # spaces that were trimmed to nothing stand for the last of them
    starts, stops = np.array(answers, dtype=np.int64).reshape(-1, 2).T
    at = np.searchsorted(stops, begin, side="right")  # the first answer that ends after the token begins
    return np.append(starts, np.iinfo(np.int64).max)[at] < stop


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
