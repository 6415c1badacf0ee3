"""RULER's two string matches of references in an answer (Hsieh et al. 2024, arXiv 2404.06654), 0 to 1.

Both ignore case and look for the exact reference anywhere in the answer: "art" is found in "party".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NOT_PRINTED = re.compile(r"[\x00-\x1f]")


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Returns the share of `references` (at least one) that are found in `answer`."""
    found = _found(answer, references)
    return sum(found) / len(found)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if any of `references` (at least one) is found in `answer`, else 0: all of them are right answers."""
    return float(max(_found(answer, references)))


def _found(answer: str, references: Sequence[str]) -> list[bool]:
    """Control characters inside the answer count as line ends; those at its ends are removed, as officially."""
    text = _NOT_PRINTED.sub("\n", answer.strip()).strip().lower()
    return [reference.lower() in text for reference in references]
