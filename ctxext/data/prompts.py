"""Turns text into the ids that a model reads first: a prompt by itself, or text that continues given ids. No torch."""

from __future__ import annotations

from typing import Any

TAIL = 32  # ids before a new text that can affect how its beginning is tokenised
ANCHORS = ("a", ".", "\n", " ")


def framing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the ids that a tokenizer adds before and after every text: BOS and EOS, if it adds them.

    The function tests this on a text and does not use bos_token_id: many tokenizers define a BOS and add none (SmolLM2,
    Yi).
    """
    bare, whole = (_ids(tokenizer, "a", add_special_tokens=special) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of `tokenizer(text)` without an appended EOS, which would end the text that is to continue."""
    ids, (_, after) = _ids(tokenizer, text, add_special_tokens=True), framing(tokenizer)
    return ids[: len(ids) - len(after)] if after and ids[-len(after) :] == after else ids


def continued_ids(tokenizer: Any, before: list[int], text: str) -> list[int]:
    """Returns the ids of `text` when it follows the ids `before`, which stay unchanged.

    The function tokenises the end of the earlier text and `text` together, and returns the ids after the earlier ones:
    a SentencePiece tokenizer then adds no space, and a template that begins with a control token gets the same ids as
    by itself. If a token would span the boundary ("\\n" + "\\n" is one token of many tokenizers), the earlier ids
    cannot change; `text` is then tokenised after one of ANCHORS that keeps the boundary. If none does, it is tokenised
    by itself.
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
