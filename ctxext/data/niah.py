"""Needles in a haystack at chosen lengths and depths: a sentence with a number in it, which is asked for at the end.

The needle and the question are RULER's single needle with a number as value (Hsieh et al. 2024, arXiv 2404.06654, table
1). The text is a book or any given text, and the depths are chosen, not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctxext.data.cases import Case, evenly, largest, private_random, prompt_ids
from ctxext.data.synthetic import word
from ctxext.errors import InputError

BEFORE = "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
BEFORE += "the number afterwards.\n"
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text? "
QUESTION += "The special magic number for {key} mentioned in the provided text is"
NEW_TOKENS = 24  # more than seven digits need with any tokenizer
FEW = 24  # tokens by which a case may be shorter than its length


@dataclass(frozen=True)
class NiahQuestion:
    """A case and its prompt's tokens."""

    case: Case
    ids: list[int]

    @property
    def id(self) -> str:
        """The id of the case."""
        return self.case.id

    @property
    def size(self) -> int:
        """The length in tokens."""
        return self.case.length


def niah_questions(
    tokenizer: Any, text: str, lengths: Sequence[int], depths: Sequence[float], cases: int, limit: int | None, seed: int
) -> list[NiahQuestion]:
    """Returns `cases` questions at each length (tokens) and depth (0 first, 1 last) in `text`.

    With `limit` it returns at most so many, taken evenly. Raises InputError for a length without space for needle and
    question, and for an empty text.
    """
    cells = [(length, depth, i) for length in lengths for depth in dict.fromkeys(depths) for i in range(cases)]
    chosen = evenly(cells, limit, lambda cell: cell[:2])
    words = text.split()
    room = {length: _room(tokenizer, words, length) for length in lengths}
    return [_fitted(tokenizer, words, room[cell[0]], *cell, seed) for cell in chosen]


def niah_case(words: Sequence[str], count: int, length: int, depth: float, number: int, seed: int) -> Case:
    """Returns a case with `count` of `words` and the needle after depth x count of them.

    The words begin at a random position and continue at the start of the text when it ends.
    """
    rng = private_random("niah", seed, length, depth, number)
    key, value = f"{word(rng)}-{word(rng)}", str(rng.randrange(10**6, 10**7))
    start = rng.randrange(len(words))
    filler = [words[(start + i) % len(words)] for i in range(count)]
    at = round(depth * count)
    hay = " ".join([*filler[:at], NEEDLE.format(key=key, value=value), *filler[at:]])
    prompt = BEFORE + hay + QUESTION.format(key=key)
    return Case(f"{length}/{depth}/{number}", "", length, prompt, (value,), NEW_TOKENS, {"depth": depth, "key": key})


def _room(tokenizer: Any, words: Sequence[str], length: int) -> int:
    """Returns about how many words of filler fit into a case of `length` tokens."""
    if not words:
        raise InputError("the haystack text is empty")

    def tokens(count: int) -> int:
        return len(prompt_ids(tokenizer, niah_case(words, count, length, 0.5, 0, 0).prompt)) + NEW_TOKENS

    if tokens(0) > length:
        raise InputError(
            f"a needle in a haystack needs at least {tokens(0)} tokens with this tokenizer, got length {length}",
            hint="evaluate at a greater length",
        )
    return largest(lambda count: tokens(count) <= length, start=max(1, length // 2))


def _fitted(
    tokenizer: Any, words: Sequence[str], count: int, length: int, depth: float, number: int, seed: int
) -> NiahQuestion:
    """Returns the case, filled up to `length` tokens except for a few.

    Some passages have more tokens per word than others, so the count of words is corrected for each case.
    """
    best: NiahQuestion | None = None
    for _ in range(8):
        # The case's own generator makes it the same at every attempt, except for the count of words.
        case = niah_case(words, count, length, depth, number, seed)
        question = NiahQuestion(case, prompt_ids(tokenizer, case.prompt))
        spare = length - len(question.ids) - case.max_new_tokens
        if spare >= 0 and (best is None or len(question.ids) > len(best.ids)):
            best = question
        if 0 <= spare < FEW:
            break
        # Change the words by the spare tokens, at this case's own ratio of words to tokens; aim at the middle of the
        # tolerance, and move by at least one word.
        step = round((spare - FEW // 2) * max(1, count) / len(question.ids))
        count = max(0, count + (step or (1 if spare > 0 else -1)))
    # If no attempt was short enough, use no filler: `_room` has checked that such a case fits.
    return best or _fitted(tokenizer, words, 0, length, depth, number, seed)
