"""Synthetic text that trains a small model to look things up: copies, key-value lists, and passkeys.

A corpus of a few megabytes alone does not teach a model of two million parameters retrieval at its trained length; this
text does, and the project reports its use together with the model's results. The passkey text has the same sentences as
haystack.py: the evaluation measures an in-distribution format with unseen keys in unseen filler.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from ctxext.data.readers import Document

MIN_SPAN_CHARS = 320
KEY_DIGITS = 5
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")

SYMBOLS = string.ascii_letters + string.digits + string.punctuation

NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is "


class Filler:
    """Text to hide things in: runs of whole lines of `documents`, of any length, drawn with a caller's generator."""

    def __init__(self, documents: Sequence[Document]):
        self._text = "".join(document.text for document in documents)

    def draw(self, rng: random.Random, chars: int) -> str:
        """Returns at most `chars` characters that end with a newline (empty if `chars` is below one)."""
        if chars < 1:
            return ""
        # Begin after the next newline, and cut the end back to a whole line if there is one.
        start = rng.randrange(max(1, len(self._text) - chars - 200))
        start = self._text.find("\n", start) + 1
        text = self._text[start : start + chars - 1]
        return text.rsplit("\n", 1)[0] + "\n" if "\n" in text else text + "\n"


def digits(rng: random.Random) -> str:
    """Returns a key: five digits, the first of them not zero."""
    return str(rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))


def word(rng: random.Random) -> str:
    """Returns a made-up word of two or three syllables: `bodira`."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def passkey(rng: random.Random, filler: Filler, chars: int) -> str:
    """Returns filler with a needle in it, the question and its answer: about `chars` characters in all."""
    key = digits(rng)
    needle = NEEDLE.format(key=key)
    ending = f"{QUESTION}{key}.\n"
    room = max(0, chars - len(needle) - len(ending))
    before = int(rng.random() * room)
    return filler.draw(rng, before) + needle + filler.draw(rng, room - before) + ending


def key_value(rng: random.Random, filler: Filler, chars: int) -> str:
    """Returns assignments of numbers to made-up names in filler, with questions for them at all distances."""
    parts: list[str] = []
    names: list[tuple[str, str]] = []
    size = 0
    while size < chars - 40:
        # Half of the parts ask for an earlier name, a quarter assigns a new one, a quarter is filler.
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
    """Returns a line of different characters in random order, repeated, half the time with filler between.

    Every character of a repetition is determined by the one before it: this is the densest training signal for looking
    back.
    """
    most = min(len(SYMBOLS), max(8, chars // 2))
    segment = "".join(rng.sample(SYMBOLS, rng.randint(8, most))) + "\n"
    parts = [segment]
    size = len(segment)
    # The squared draw makes short gaps more likely than long ones.
    while size < chars:
        gap = filler.draw(rng, int(rng.random() ** 2 * (chars - size - len(segment)))) if rng.random() < 0.5 else ""
        parts += [gap, segment]
        size += len(gap) + len(segment)
    return "".join(parts)[:chars]


def repeat(rng: random.Random, filler: Filler, chars: int) -> str:
    """Returns a few random characters repeated without gaps, which lets attention to earlier tokens form at all.

    Most of the text is determined by what is one short period earlier, so the first steps of training have a single
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
    """Returns one synthetic document of 100 characters to `span_chars`; its kind is drawn from `kinds` by weight.

    The logarithm of the length is uniform: short documents teach lookup soonest, most of the text is in long ones.
    """
    chosen = [KINDS[kind] for kind in kinds]
    make = rng.choices([make for make, _ in chosen], [weight for _, weight in chosen])[0]
    chars = round(100 * (span_chars / 100) ** rng.random())
    return Document(text=make(rng, filler, chars), name=f"{name}:{make.__name__}")
