"""Compares a request with one that an older ctxext recorded, which did not have all of today's fields. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any


def known_fields(data: Any, recorded: Any) -> Any:
    """Returns `data` without the dataclass fields that `recorded` lacks and that hold their default.

    `data` holds dataclasses, mappings, sequences and plain values; `recorded` is plain data, as JSON gives it back. A
    field that was added later changes nothing for a step that leaves it alone. A new field with another value is kept,
    so that the two differ.
    """
    if is_dataclass(data) and not isinstance(data, type):
        known = recorded if isinstance(recorded, Mapping) else None
        kept: dict[str, Any] = {}
        for field in fields(data):
            value = getattr(data, field.name)
            # A new field at its default: the older version behaved as if it were not there.
            if known is not None and field.name not in known and value == _default(field):
                continue
            kept[field.name] = known_fields(value, None if known is None else known.get(field.name))
        return kept
    if isinstance(data, Mapping):
        known = recorded if isinstance(recorded, Mapping) else {}
        return {name: known_fields(value, known.get(str(name))) for name, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        items = recorded if isinstance(recorded, list) and len(recorded) == len(data) else [None] * len(data)
        return [known_fields(value, item) for value, item in zip(data, items, strict=True)]
    return data


def _default(field: Field[Any]) -> Any:
    """The default of a dataclass field; MISSING where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()
