"""Values that flow by name: `${model}`, `${heal}` (a step's output), `${search.best}` (a number it found), and
`${measure[*]}`, the outputs of a step's every cell. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

REFERENCE = re.compile(r"\$\{([A-Za-z0-9_-]+)((?:\.[A-Za-z0-9_-]+)*)(\[\*\])?\}")


class Reference(NamedTuple):
    """What a `${...}` names: `path` are keys within what a step reported, `every` is whether [*] follows."""

    text: str
    name: str
    path: tuple[str, ...]
    every: bool


def references(value: Any) -> Iterator[Reference]:
    """Every reference in text, however deep it stands in lists and mappings."""
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
    """Text with a `${` that no reference begins."""
    if isinstance(value, str):
        if "${" in REFERENCE.sub("", value):
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from malformed(part)


def filled(value: Any, known: Mapping[str, Any], every: Mapping[str, list[Any]] | None = None) -> Any:
    """`value` with the references that `known` answers in their place; text that is one reference takes its type.

    `known` are values and steps' reports by name, a report with its output as `out`; `every` are the outputs of all
    cells. A list item that is `${step[*]}` becomes as many. Raises LookupError for a path that a report does not have.
    """
    if isinstance(value, Mapping):
        return {key: filled(part, known, every) for key, part in value.items()}
    if isinstance(value, list | tuple):
        made = []
        for part in value:
            found = filled(part, known, every)
            made += found if isinstance(found, list) and _is_every(part) else [found]
        return made
    if not isinstance(value, str):
        return value
    for reference in references(value):
        found = _answer(reference, known, every or {})
        if found is reference:
            continue
        if reference.text == value:
            return found
        value = value.replace(reference.text, str(found))
    return value


def _is_every(value: Any) -> bool:
    return isinstance(value, str) and any(
        reference.every and reference.text == value for reference in references(value)
    )


def _answer(reference: Reference, known: Mapping[str, Any], every: Mapping[str, list[Any]]) -> Any:
    """What a reference stands for, or the reference where that is not known yet."""
    if reference.every:
        return every.get(reference.name, reference)
    if reference.name not in known:
        return reference
    found = known[reference.name]
    if not reference.path:
        return found["out"] if isinstance(found, Mapping) and "out" in found else found
    for key in reference.path:
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        else:
            has = ", ".join(map(str, found)) if isinstance(found, Mapping) else "nothing below"
            raise LookupError(f"{reference.text}: no {key!r}; there are {has}")
    return found
