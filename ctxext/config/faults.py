"""Describes pydantic's errors in a spec as this project does: path, given value, allowed values."""

from __future__ import annotations

import difflib
import types
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

_ALLOWED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
    "path_type": "a path",
    "literal_error": "{expected}",
    "union_tag_invalid": "a mapping with type {expected_tags}",
    "union_tag_not_found": "a mapping with a type",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "finite_number": "a finite number",
}
_MOST = 50  # lines; a file with more faults is not a spec at all
# Fault types that are not reported for a value with a fault inside it. This includes lists, since pydantic counts only
# the valid items.
_WRONG_SHAPE = {"dataclass_type", "literal_error", "none_required", "union_tag_not_found", "too_short"}


@dataclass(frozen=True)
class _Fault:
    path: tuple[str | int, ...]
    type: str
    given: Any
    allowed: str


def describe(cls: type, data: Any, error: ValidationError) -> list[str]:
    """Returns one line per fault, in pydantic's order. The union branches that do not match count as one fault."""
    found = [_fault(data, line) for line in error.errors(include_url=False)]
    # If a fault lies deeper, the outer "wrong type" faults come from union branches that were not meant.
    outer = {fault.path[:depth] for fault in found for depth in range(len(fault.path))}
    lines: dict[tuple[str | int, ...], list[_Fault]] = {}
    for fault in found:
        if not (fault.path in outer and fault.type in _WRONG_SHAPE):
            lines.setdefault(fault.path, []).append(fault)
    messages = [_line(cls, data, path, faults) for path, faults in list(lines.items())[:_MOST]]
    return messages + ([f"and {len(lines) - _MOST:,} more"] if len(lines) > _MOST else [])


def _fault(data: Any, line: Any) -> _Fault:
    """Converts one pydantic error. The path is `loc` without the names of union branches that pydantic inserts."""
    path: list[str | int] = []
    last = len(line["loc"]) - 1
    # A step belongs to the path only if the data has it; walk the data along with `loc`.
    for position, step in enumerate(line["loc"]):
        if (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int)):
            path.append(step)
            data = data[step]
        elif position == last and line["type"] == "missing":
            path.append(step)
    context = line.get("ctx", {})
    if line["type"] == "value_error":
        allowed = str(context["error"])
    else:
        allowed = _ALLOWED.get(line["type"], line["msg"]).format(**context)
    return _Fault(tuple(path), line["type"], line["input"], allowed)


def _line(cls: type, data: Any, path: tuple[str | int, ...], faults: list[_Fault]) -> str:
    where = ".".join(str(step) for step in path)
    kinds = {fault.type for fault in faults}
    if kinds == {"missing"}:
        return f"{where}: missing; it has no default"
    if kinds == {"unexpected_keyword_argument"}:
        return f"{where}: unknown key; {_near(str(path[-1]), _keys(cls, data, path[:-1]))}"
    # A ValueError of `__post_init__` has a full sentence; the other faults share one "got ...; allowed: ... or ...".
    messages = [fault.allowed for fault in faults if fault.type == "value_error"]
    allowed = " or ".join(dict.fromkeys(fault.allowed for fault in faults if fault.type != "value_error"))
    given = f"got {_shown(faults[0].given)}; allowed: {allowed}" if allowed else ""
    text = "; ".join([*dict.fromkeys(messages), *([given] if given else [])])
    return f"{where}: {text}" if where else text


def _near(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}allowed: {', '.join(keys) or 'none'}"


def _keys(cls: type, data: Any, path: tuple[str | int, ...]) -> list[str]:
    """Returns the keys of the spec at `path`; if several specs are possible there, the keys of all of them."""
    specs = _specs(cls, data)
    for step in path:
        data = data[step]
        # An index stays within the annotation, since `_specs` already looks inside lists and tuples.
        inner = specs if isinstance(step, int) else [get_type_hints(outer).get(step) for outer in specs]
        specs = [found for annotation in inner for found in _specs(annotation, data)]
    return list(dict.fromkeys(field.name for found in specs for field in fields(found)))


def _specs(annotation: Any, data: Any) -> list[Any]:
    """Returns the specs that an annotation names, without those whose `type` differs from the one in `data`."""
    if is_dataclass(annotation):
        tag = get_type_hints(annotation).get("type")
        given = data.get("type") if isinstance(data, dict) else None
        other = get_origin(tag) is Literal and given is not None and given not in get_args(tag)
        return [] if other else [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, list, dict):
        return [found for inner in get_args(annotation) for found in _specs(inner, data)]
    return []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
