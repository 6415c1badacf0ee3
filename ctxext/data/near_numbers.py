"""Passkeys that differ only in their last digit, so that only this digit tells which one a text contains.

The near-identical numbers are those of the layer-wise probe in "Rethinking the Role of Efficient Attention in Hybrid
Architectures" (arXiv 2606.15378, code): 31415920 and so on. The sentences are those of the passkey (synthetic.py),
whose keys have fewer digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctxext.data.cases import private_random
from ctxext.data.haystack import Tokenizer, haystack_ids
from ctxext.data.prompts import framing
from ctxext.data.synthetic import NEEDLE, QUESTION
from ctxext.errors import InputError

STEM = "3141592"
MIDDLE = (0.25, 0.75)  # range of the needles' depths


@dataclass(frozen=True)
class NearCase:
    """A prompt of exact length that contains number `label`; a probe predicts the label from the last token's state."""

    prompt_ids: tuple[int, ...]
    label: int
    depth: float


def near_cases(
    tokenizer: Tokenizer, text: str, length: int, *, classes: int, samples: int, parting: bool, seed: int
) -> list[NearCase]:
    """Returns `samples` cases of `length` tokens in runs of `text`, with the labels 0 to classes - 1 in turn.

    At most 10 classes. A prompt ends with the question. With `parting` it also contains the answer's tokens that all
    classes share, so that the next token is the first that differs. Depths are drawn from MIDDLE. Raises InputError for
    a length without space.
    """
    keys = [f"{STEM}{label}" for label in range(classes)]
    hay = haystack_ids(tokenizer, text)
    begin, _ = framing(tokenizer)
    needles = [tokenizer.encode("\n" + NEEDLE.format(key=key), add_special_tokens=False) for key in keys]
    with_answers = [tokenizer.encode("\n" + QUESTION + key, add_special_tokens=False) for key in keys]
    question = tokenizer.encode("\n" + QUESTION, add_special_tokens=False)
    # A tokenizer may merge tokens across the boundary, so the end of the prompt is the common prefix of the question's
    # tokens with and without an answer.
    end = _shared(with_answers if parting else [question, *with_answers])
    fixed = len(begin) + max(map(len, needles)) + len(end)
    if fixed > length:
        raise InputError(
            f"these numbers need at least {fixed} tokens with this tokenizer, got length {length}",
            hint="give a greater length",
        )
    cases = []
    for number in range(samples):
        label, rng = number % classes, private_random("near numbers", seed, length, number)
        start, depth = rng.randrange(len(hay)), rng.uniform(*MIDDLE)
        # Needles may differ in length; the filler makes up the difference, so that all prompts have exactly `length`
        # tokens.
        room = length - len(begin) - len(needles[label]) - len(end)
        filler = [hay[(start + i) % len(hay)] for i in range(room)]
        before = round(depth * room)
        prompt = [*begin, *filler[:before], *needles[label], *filler[before:], *end]
        cases.append(NearCase(tuple(prompt), label, depth))
    return cases


def _shared(rows: Sequence[Sequence[int]]) -> list[int]:
    """Returns the longest common prefix of all rows."""
    count = next((i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), min(map(len, rows)))
    return list(rows[0][:count])
