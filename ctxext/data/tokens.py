"""Encodes documents as token ids, and marks which tokens training scores: the answers, if a document has answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ctxext.data.encoding import PlainText
from ctxext.data.readers import Document
from ctxext.errors import InputError

_BATCH_CHARACTERS = 1 << 20  # characters after which a batch of documents goes to the tokenizer


class Encoded(NamedTuple):
    """A document's ids and what the store needs of it.

    marks       which ids are scored; None: all of them
    text_bytes  UTF-8 bytes of the text
    rendered    whether a chat template rendered the text
    """

    ids: list[int]
    marks: np.ndarray | None
    text_bytes: int
    rendered: bool


def encode_documents(documents: Iterable[Document], plain: PlainText) -> Iterator[Encoded]:
    """Yields each document that has any token, in order."""
    for batch in _batches(documents):
        # Encode plain and rendered texts of a batch in one call each; documents with known ids are not encoded.
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
    """Returns (ids, their characters) of texts whose control tokens are intended. InputError for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not map tokens to characters, so answers cannot be found",
            hint="give the model a fast tokenizer (tokenizer.json)",
        )
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(texts, return_offsets_mapping=True, **options)
    return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


def scored_tokens(spans: list[tuple[int, int]], answers: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Returns which tokens overlap an answer, bool [tokens].

    `spans` has each token's characters, as a fast tokenizer returns them.
    """
    begin, stop = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    begin = np.minimum(begin, stop - 1)  # an empty span (trimmed spaces) counts as its last character
    starts, stops = np.array(answers, dtype=np.int64).reshape(-1, 2).T
    at = np.searchsorted(stops, begin, side="right")  # the first answer that ends after the token begins
    # The token overlaps if that answer also starts before the token ends; the sentinel means that no answer follows.
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
