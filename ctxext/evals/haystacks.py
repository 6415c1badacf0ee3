"""The text that needles are hidden in, and the name that reports give it. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from ctxext.data import documents
from ctxext.data.haystack import haystack_text

GRASS = "grass"  # the repeated sentences of the passkey papers
CHARACTERS = 2 << 20  # read from the beginning of a text; needles are hidden in a window of it


def haystack(data: str, text_field: str = "text") -> tuple[str, str]:
    """Returns (name, text) of `data`: "embedded" (its held-out files), "grass", or a source for `read_documents`."""
    if data == documents.EMBEDDED:
        return "held-out embedded text", haystack_text("held-out")
    if data == GRASS:
        return "repeated grass sentences", haystack_text("grass")
    return data, _beginning(documents.read_documents(data, text_field=text_field))


def _beginning(texts: Iterable[documents.Document]) -> str:
    parts, size = [], 0
    for document in texts:
        parts.append(document.text)
        size += len(document.text)
        if size >= CHARACTERS:
            break
    return "\n".join(parts)[:CHARACTERS]
