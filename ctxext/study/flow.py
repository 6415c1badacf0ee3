"""References of a pipeline file, and the values that replace them. No torch.

${model}         a value or an axis
${heal}          the output directory of a step
${search.best}   a field of what a step reported
${measure[*]}    the output directories of a step, one for each cell of the matrix
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

REFERENCE = re.compile(r"\$\{([A-Za-z0-9_-]+)((?:\.[A-Za-z0-9_-]+)*)(\[\*\])?\}")


class Reference(NamedTuple):
    """One `${...}`. `path`: the keys inside a step's report. `every`: whether [*] follows."""

    text: str
    name: str
    path: tuple[str, ...]
    every: bool


def references(value: Any) -> Iterator[Reference]:
    """Yields every reference in a string, or in the strings of nested lists and mappings."""
    if isinstance(value, str):
        for match in REFERENCE.finditer(value):
            yield Reference(match[0], match[1], tuple(match[2].split(".")[1:]), match[3] is not None)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from references(part)


def malformed(value: Any) -> Iterator[str]:
    """Yields every string that has a `${` which does not begin a valid reference."""
    if isinstance(value, str):
        if "${" in REFERENCE.sub("", value):
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from malformed(part)


def filled(value: Any, known: Mapping[str, Any], every: Mapping[str, list[Any]] | None = None) -> Any:
    """Returns a copy of `value` with references replaced. A reference that is not known yet stays as it is.

    known   values and the reports of steps, by name; a report has its output directory as `out`
    every   the output directories of all cells of a step, by the step's name

    A string that is exactly one reference becomes the found value with its type; inside longer text the value is
    converted to a string. A list item `${step[*]}` is replaced by one item for each cell.
    Raises LookupError for a path that a report does not have.
    """
    if isinstance(value, Mapping):
        return {key: filled(part, known, every) for key, part in value.items()}
    if isinstance(value, list | tuple):
        made = []
        for part in value:
            found = filled(part, known, every)
            # Only ${step[*]} is spliced into the list. A reference to a value that is a list stays one item.
            made += found if isinstance(found, list) and _is_every(part) else [found]
        return made
    if not isinstance(value, str):
        return value
    for reference in references(value):
        found = _answer(reference, known, every or {})
        if found is reference:
            continue
        # The string is nothing but this reference: keep the type of the value.
        if reference.text == value:
            return found
        value = value.replace(reference.text, str(found))
    return value


def _is_every(value: Any) -> bool:
    return isinstance(value, str) and any(
        reference.every and reference.text == value for reference in references(value)
    )


def _answer(reference: Reference, known: Mapping[str, Any], every: Mapping[str, list[Any]]) -> Any:
    """Returns the value of a reference, or the reference itself where the value is not known yet."""
    if reference.every:
        return every.get(reference.name, reference)
    if reference.name not in known:
        return reference
    found = known[reference.name]
    # A reference to a step without a path is the step's output directory.
    if not reference.path:
        return found["out"] if isinstance(found, Mapping) and "out" in found else found
    for key in reference.path:
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        else:
            has = ", ".join(map(str, found)) if isinstance(found, Mapping) else "none"
            raise LookupError(f"{reference.text}: {key!r} is unknown; allowed: {has}")
    return found
