"""Parses tokens and bytes that users type; formats tokens, bytes, durations and counts for users.

Units of tokens and bytes are powers of 1024 (100k tokens are 102,400); those of parameters and FLOPs are powers of
1000. Parsing is strict: no exponents ("1e5"), no leading zeros ("010"), no rounding ("0.3k" is 307.2 tokens: an error).
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from ctxext.errors import InputError

_NUMBER = r"(?P<number>(?:0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:_\d{3})+)(?:\.\d+)?)"
_TOKENS = re.compile(rf"{_NUMBER}\s*(?P<unit>[km]?)", re.IGNORECASE | re.ASCII)
_BYTES = re.compile(rf"{_NUMBER}\s*(?P<unit>[kmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)

_BINARY = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_LONGEST = 40


def parse_tokens(value: int | str) -> int:
    """Parses a number of tokens: 8192, "8k", "100k" (102,400), "3.5k" (3,584), "1m" (1,048,576), "102,400".

    Zero is allowed; the caller checks whether it makes sense. Raises InputError for anything else, including a negative
    or a fractional number of tokens.
    """
    allowed = 'a whole number of tokens, such as 8192, "8k", "100k" or "1m" (k = 1024)'
    return _whole(value, _TOKENS, "tokens", allowed)


def parse_bytes(value: int | str) -> int:
    """Parses a number of bytes: 1024, "512M", "80G", "80GB" and "80GiB" (all units are powers of 1024).

    Raises InputError for anything else, including a negative or a fractional number of bytes.
    """
    allowed = 'a whole number of bytes, such as "512M", "80G" or "1.5GiB" (k = 1024)'
    return _whole(value, _BYTES, "bytes", allowed)


def format_tokens(count: int) -> str:
    """Returns 102400 as "102,400": always with every digit; `parse_tokens` can parse the result."""
    return f"{count:,}"


def format_bytes(count: int | float) -> str:
    """Returns bytes in the largest binary unit in which they are 1 or more: "1.5 GiB", "640 B"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{_short(size)} {unit}"
        size /= 1024
    return f"{_short(size)} TiB"


def format_duration(seconds: float) -> str:
    """Returns seconds as "4.1 ms", "3.2 s", "42 s", "12 min 5 s", "1 h 23 min" or "2 d 3 h"; "0 s" only for 0."""
    # The limits lie just below 0.1 s and 10 s, so that rounding never shows "100 ms" or "10.0 s".
    if 0 < seconds < 0.0995:
        return f"{_short(seconds * 1000)} ms" if seconds >= 5e-5 else "under 0.1 ms"
    if seconds < 9.95:
        return f"{_short(seconds)} s"
    whole = round(seconds)
    steps = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for size, unit, smaller, smaller_unit in steps:
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest} {smaller_unit}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def first_of(number: int, noun: str) -> str:
    """Returns "the first token" or "the first 4 tokens"."""
    return f"the first {noun}" if number == 1 else f"the first {counted(number, noun)}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Returns a count with its noun: "1 sequence", "2,000 sequences", "3 processes" (`many`: an irregular plural)."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def format_count(count: int | float) -> str:
    """Returns a count in powers of 1000: 1,200,000 as "1.2M", 6,738,415,616 as "6.7B"; below 1,000 without a unit."""
    return _decimal(count, ("", "k", "M", "B", "T"))


def format_flops(count: int | float) -> str:
    """Returns floating-point operations (a count, not a rate) in powers of 1000: "3.4 TFLOP"."""
    return _decimal(count, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP"))


def _whole(value: int | str, pattern: re.Pattern[str], noun: str, allowed: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    # Exact fractions, so that "3.5k" has no rounding error and "0.3k" is recognised as fractional.
    match = pattern.fullmatch(value.strip()) if isinstance(value, str) and len(value) <= _LONGEST else None
    if match is None:
        raise InputError(f"{_shown(value)} is no number of {noun}; allowed: {allowed}")
    count = _exact(match["number"]) * _BINARY[match["unit"].lower()]
    if count.denominator != 1:
        raise InputError(f"{_shown(value)} is {float(count):g} {noun}; allowed: {allowed}")
    return int(count)


def _exact(number: str) -> Fraction:
    return Fraction(Decimal(number.replace(",", "").replace("_", "")))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _decimal(count: int | float, units: tuple[str, ...]) -> str:
    size = float(count)
    for unit in units[:-1]:
        if abs(size) < 999.95 or (unit == units[0] and abs(size) < 1000):
            return f"{_short(size)}{unit}"
        size /= 1000
    return f"{_short(size)}{units[-1]}"
