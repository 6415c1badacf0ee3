"""Text into the ids that a model reads first: a prompt by itself, and text that goes on where ids end. No torch."""

from __future__ import annotations

from typing import Any

TAIL = 32  # ids before a new text that can have a part in how its beginning is divided
ANCHORS = ("a", ".", "\n", " ")


def framing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after every text: BOS where it adds one, EOS where it appends one.

    It is seen on a text, not read from bos_token_id: many tokenizers name a BOS and add none (SmolLM2, Yi).
    """
    bare, whole = (_ids(tokenizer, "a", add_special_tokens=special) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of `tokenizer(text)` without what the tokenizer appends: an EOS would end the text that is to go on."""
    ids, (_, after) = _ids(tokenizer, text, add_special_tokens=True), framing(tokenizer)
    return ids[: len(ids) - len(after)] if after and ids[-len(after) :] == after else ids


def continued_ids(tokenizer: Any, before: list[int], text: str) -> list[int]:
    """The ids of `text` where it follows the ids `before`, which stay as they are.

    They are those that the tokenizer gives for the end of the earlier text and `text` together, behind the earlier
    ones: a SentencePiece tokenizer puts no space before it, and a template that begins with a control token is divided
    as by itself. Where a token would reach over the boundary ("\\n" + "\\n" is one token of many tokenizers), the
    earlier ids cannot change, and `text` is divided as it is behind one of ANCHORS with a boundary between. Where none
    has one, it is divided by itself.
    """
    tail = str(tokenizer.decode(before[-TAIL:], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    for earlier in (tail, *ANCHORS):
        head = _ids(tokenizer, earlier, add_special_tokens=False)
        both = _ids(tokenizer, earlier + text, add_special_tokens=False)
        if head and both[: len(head)] == head:
            return both[len(head) :]
    return _ids(tokenizer, text, add_special_tokens=False)


def _ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
