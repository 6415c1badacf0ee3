"""Passkey retrieval: five digits are hidden at a chosen depth in a text of exact length, and asked for at the end.

The task is from Mohtashami & Jaggi (2023, Landmark Attention, appendix), as LongLoRA (2024, section 4.2) runs it. The
sentences are those of the synthetic training text (synthetic.py). A model trained on the embedded corpus therefore
knows the format, but not the keys, and not the filler as long as the filler is held-out text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ctxext.data.corpus import stdlib_documents
from ctxext.data.encoding import plain_ids
from ctxext.data.prompts import framing
from ctxext.data.synthetic import NEEDLE, QUESTION, digits
from ctxext.errors import InputError

Haystack = Literal["held-out", "grass"]

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class Tokenizer(Protocol):
    """The methods of a tokenizer that are used here; Hugging Face's fast and slow tokenizers have them."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class HaystackCase:
    """One question: after `prompt_ids` the model must continue with exactly `answer_ids`."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    length: int  # requested tokens; prompt and answer together have at most that many
    depth: float  # 0 is the beginning of the text, 1 is just before the question
    needle_start: int  # tokens before the needle
    key: str


def haystack_text(kind: Haystack) -> str:
    """Returns the text to hide keys in: the embedded corpus's held-out files, or the classic repeated sentences."""
    if kind == "held-out":
        return "".join(document.text for document in stdlib_documents("held-out"))
    if kind == "grass":
        return GRASS * 64
    raise InputError(f"haystack {kind!r} is unknown: allowed are 'held-out' and 'grass'")


def haystack_ids(tokenizer: Tokenizer, text: str, *, max_tokens: int = 1 << 20) -> list[int]:
    """Returns the token ids of a text, read as plain text, so that a thousand cases tokenise it only once."""
    ids = plain_ids(tokenizer, text[: 8 * max_tokens])[:max_tokens]
    if not ids:
        raise InputError("the haystack text is empty")
    return ids


def passkey_case(
    tokenizer: Tokenizer, length: int, depth: float, rng: random.Random, haystack: Sequence[int]
) -> HaystackCase:
    """Returns a case of exactly `length` tokens, prompt and answer together, with the needle at `depth` (0 to 1).

    `haystack` is token ids (`haystack_ids`). The filler is a run of it from a random position and continues at the
    start when it reaches the end, so a short haystack is repeated. Filler is cut in tokens, which makes the length
    exact; a word may be broken at a cut. BOS comes first if the tokenizer adds one. Raises InputError for a depth
    outside 0..1 and for a length without space for needle and question.
    """
    if not 0.0 <= depth <= 1.0:
        raise InputError(f"passkey depth {depth} is outside 0 to 1")
    key = digits(rng)
    bos, _ = framing(tokenizer)
    needle = tokenizer.encode("\n" + NEEDLE.format(key=key), add_special_tokens=False)
    question = tokenizer.encode("\n" + QUESTION, add_special_tokens=False)
    with_answer = tokenizer.encode("\n" + QUESTION + key, add_special_tokens=False)
    # A tokenizer may merge tokens across the boundary of question and key. So tokenise both together, and take as the
    # answer all tokens after the longest common prefix.
    common = next((i for i, (a, b) in enumerate(zip(question, with_answer, strict=False)) if a != b), len(question))
    question, answer = with_answer[:common], with_answer[common:]
    # The rest of the length is filler; the needle splits it at the depth.
    room = length - len(bos) - len(needle) - len(with_answer)
    if room < 0:
        raise InputError(
            f"a passkey needs at least {length - room} tokens with this tokenizer, got length {length}",
            hint="evaluate at a greater length",
        )
    start = rng.randrange(len(haystack))
    filler = [haystack[(start + i) % len(haystack)] for i in range(room)]
    before = round(depth * room)
    prompt = bos + filler[:before] + list(needle) + filler[before:] + list(question)
    return HaystackCase(tuple(prompt), tuple(answer), length, depth, len(bos) + before, key)


def key_places(tokenizer: Tokenizer, case: HaystackCase) -> tuple[int, ...]:
    """Returns the positions of the key's tokens in a case's prompt: the needle's tokens that contain a digit."""
    needle = tokenizer.encode("\n" + NEEDLE.format(key=case.key), add_special_tokens=False)
    digits = [i for i, token in enumerate(needle) if any(c.isdigit() for c in tokenizer.decode([token]))]
    return tuple(case.needle_start + i for i in digits)


def passkey_cases(
    tokenizer: Tokenizer,
    length: int,
    *,
    depths: Sequence[float],
    per_depth: int,
    seed: int = 0,
    haystack: Haystack | str = "held-out",
) -> list[HaystackCase]:
    """Returns `per_depth` cases at every depth, from a generator of their own: equal arguments give equal cases.

    `haystack` is 'held-out', 'grass', or the user's own text.
    """
    text = haystack_text(haystack) if haystack in ("held-out", "grass") else haystack
    ids = haystack_ids(tokenizer, text)
    rng = random.Random(f"passkey/{seed}/{length}")
    return [passkey_case(tokenizer, length, depth, rng, ids) for depth in depths for _ in range(per_depth)]
