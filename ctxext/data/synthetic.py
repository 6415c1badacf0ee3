"""Synthetic text that makes a small model look things up: copies, key-value lists, and passkeys.

A corpus of a few megabytes alone does not give a model of two million parameters retrieval at the length it is
trained at; this text does, and the project says so wherever it reports the model. The passkey text shares its sentences
with haystack.py: what the evaluation measures is an in-distribution format with unseen keys in unseen filler.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from ctxext.data.documents import Document

MIN_SPAN_CHARS = 320
KEY_DIGITS = 5
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")

SYMBOLS = string.ascii_letters + string.digits + string.punctuation

NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is "


class Filler:
    """Text to hide things in: runs of whole lines of `documents`, at any length, from a caller's generator."""

    def __init__(self, documents: Sequence[Document]):
        self._text = "".join(document.text for document in documents)

    def draw(self, rng: random.Random, chars: int) -> str:
        """At most `chars` characters that end with a line end (empty where `chars` is below one)."""
        if chars < 1:
            return ""
        start = rng.randrange(max(1, len(self._text) - chars - 200))
        start = self._text.find("\n", start) + 1
        text = self._text[start : start + chars - 1]
        return text.rsplit("\n", 1)[0] + "\n" if "\n" in text else text + "\n"


def digits(rng: random.Random) -> str:
    """A key: five digits, the first of them not zero."""
    return str(rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))


def word(rng: random.Random) -> str:
    """A made-up word of two or three syllables: `bodira`."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def passkey(rng: random.Random, filler: Filler, chars: int) -> str:
    """Filler, a needle somewhere in it, filler, the question and its answer: about `chars` characters in all."""
    key = digits(rng)
    needle = NEEDLE.format(key=key)
    ending = f"{QUESTION}{key}.\n"
    room = max(0, chars - len(needle) - len(ending))
    before = int(rng.random() * room)
    return filler.draw(rng, before) + needle + filler.draw(rng, room - before) + ending


def key_value(rng: random.Random, filler: Filler, chars: int) -> str:
    """Assignments of numbers to made-up names in filler, and questions for them all the way, near and far."""
    parts: list[str] = []
    names: list[tuple[str, str]] = []
    size = 0
    while size < chars - 40:
        draw = rng.random()
        if names and draw < 0.5:
            name, value = rng.choice(names)
            part = f"assert {name} == {value}\n"
        elif draw < 0.75:
            name, value = word(rng), digits(rng)
            names.append((name, value))
            part = f"{name} = {value}\n"
        else:
            part = filler.draw(rng, rng.randint(40, max(41, chars // 4)))
        parts.append(part)
        size += len(part)
    return "".join(parts)[:chars]


def copy(rng: random.Random, filler: Filler, chars: int) -> str:
    """A line of different characters in random order, again and again, half the time with filler between.

    Every character of a repetition is decided by the one before it: the densest lesson there is in looking back.
    """
    most = min(len(SYMBOLS), max(8, chars // 2))
    segment = "".join(rng.sample(SYMBOLS, rng.randint(8, most))) + "\n"
    parts = [segment]
    size = len(segment)
    while size < chars:
        gap = filler.draw(rng, int(rng.random() ** 2 * (chars - size - len(segment)))) if rng.random() < 0.5 else ""
        parts += [gap, segment]
        size += len(gap) + len(segment)
    return "".join(parts)[:chars]


def repeat(rng: random.Random, filler: Filler, chars: int) -> str:
    """A handful of random characters again and again, nothing between: what makes looking back form at all.

    Most of it is decided by what stands one short period earlier, so the first steps of training have one
    thing to learn.
    """
    segment = "".join(rng.choices(SYMBOLS, k=rng.randint(4, 24)))
    return (segment * (chars // len(segment) + 1))[:chars]


KINDS = {
    "passkey": (passkey, 0.4),
    "key_value": (key_value, 0.2),
    "copy": (copy, 0.4),
    "repeat": (repeat, 0.4),
}  # with weights
DEFAULT_KINDS = ("passkey", "key_value", "copy")


def draw(
    rng: random.Random, filler: Filler, span_chars: int, *, name: str, kinds: Sequence[str] = DEFAULT_KINDS
) -> Document:
    """One synthetic document, of one of `kinds` drawn by its weight, of 100 characters to `span_chars`.

    The logarithm of the length is uniform: short documents teach looking up soonest, most of the text is in long ones.
    """
    chosen = [KINDS[kind] for kind in kinds]
    make = rng.choices([make for make, _ in chosen], [weight for _, weight in chosen])[0]
    chars = round(100 * (span_chars / 100) ** rng.random())
    return Document(text=make(rng, filler, chars), name=f"{name}:{make.__name__}")
