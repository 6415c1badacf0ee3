"""Encodes plain text as token ids; what looks like a control token (`<s>`, `<|endoftext|>`) stays plain characters.

Stock tokenizers turn such characters into a control token wherever they occur. A web page that shows `</s>` would
then end a document in its middle. In text that a chat template rendered, control tokens are intended (data/tokens.py
keeps them). Added tokens that are not special, such as runs of spaces or `<think>`, stay tokens. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctxext.errors import InputError
from ctxext.units import counted

Spans = list[tuple[int, int]]


class PlainText:
    """Encodes plain text with one tokenizer; adds no BOS and no EOS.

    control       the ids of the control tokens
    read_as_text  number of control tokens that the tokenizer found in the text and that were encoded as text instead
    kept          number of control tokens that remain: the vocabulary has no other token for these characters
    largest       the largest id so far; -1 before the first text
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.read_as_text = self.kept = 0
        self.largest = -1
        special = set(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.control = frozenset(special | {id for id, token in added.items() if token.special})
        # An unknown character also gives the unknown token, so only its name in the text counts as a control token.
        self._unknown = getattr(tokenizer, "unk_token_id", None)
        named = added.get(self._unknown)
        self._unknown_name = named.content if named is not None and named.special else None
        self._other = [token.content for id, token in added.items() if id not in self.control]

    def encode(self, texts: Sequence[str], *, spans: bool = False) -> tuple[list[list[int]], list[Spans] | None]:
        """Returns the ids of each text, and with `spans` also the characters of each id (else None).

        InputError if a slow tokenizer cannot encode the control tokens as text.
        """
        ids, places = self._encoded(texts, spans)
        # Encode all texts at once, then only those with control tokens again, with the option that splits them.
        again = [number for number, text in enumerate(texts) if self._controls(ids[number], text)]
        if again:
            self._check_slow([texts[number] for number in again])
            other, other_places = self._encoded([texts[number] for number in again], spans, split_special_tokens=True)
            for position, number in enumerate(again):
                text, left = texts[number], self._controls(other[position], "")
                self.kept += left
                self.read_as_text += max(0, self._controls(ids[number], text) - left)
                ids[number] = other[position]
                if places is not None and other_places is not None:
                    places[number] = other_places[position]
        self.largest = max([self.largest, *(max(row) for row in ids if row)])
        return ids, places

    def notes(self) -> list[str]:
        """Returns lines about control tokens for the screen; empty if the text had none."""
        notes = []
        if self.read_as_text:
            what = counted(self.read_as_text, "control token")
            notes.append(f"{what} in the text read as the characters they are, such as <s> in a web page")
        if self.kept:
            what = counted(self.kept, "control token")
            notes.append(f"warning: {what} in the text kept: the tokenizer has no other token for these characters")
        return notes

    def _encoded(
        self, texts: Sequence[str], spans: bool, **options: bool
    ) -> tuple[list[list[int]], list[Spans] | None]:
        options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if spans:
            options["return_offsets_mapping"] = True
        try:
            found = self.tokenizer(list(texts), **options)
        finally:
            # The call leaves the option set in the tokenizer's backend. Reset it, because other callers share it.
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is not None:
                backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
        return list(found["input_ids"]), list(found["offset_mapping"]) if spans else None

    def _controls(self, ids: Sequence[int], text: str) -> int:
        """Counts the control tokens in a text's ids."""
        count = text.count(self._unknown_name) if self._unknown_name else 0
        if self.control.isdisjoint(ids):
            return count
        return count + sum(id in self.control and id != self._unknown for id in ids)

    def _check_slow(self, texts: Sequence[str]) -> None:
        """Raises InputError if a slow tokenizer would also split added tokens that are not control tokens."""
        if getattr(self.tokenizer, "is_fast", False):
            return
        found = next((token for token in self._other if any(token in text for text in texts)), None)
        if found is not None:
            raise InputError(
                f"the text has control tokens next to {found!r}, and {type(self.tokenizer).__name__} treats both as "
                "text or neither as text",
                hint="give the model a fast tokenizer (tokenizer.json), or take the control tokens out of the text",
            )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of one plain text; for an object that is not a stock tokenizer, the result of its `encode`."""
    if not callable(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return PlainText(tokenizer).encode([text])[0][0]
