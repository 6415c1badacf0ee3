"""Assigns command-line options to a spec that consists of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ctxext.errors import InputError


def spread(
    given: Mapping[str, Any],
    whole: dict[str, Any],
    parts: Sequence[dict[str, Any]],
    *,
    names: set[str],
    tag: str,
    classes: Mapping[str, type],
    of: str,
) -> None:
    """Puts the values of `given` into `whole` and `parts`, plain data from which specs are built later.

    A key is one of `names` (the fields of the whole), or PART.field (PART is a part's `tag`), or a field, which goes
    to all parts that have it. `classes` are the specs by tag; `of` names the subject in messages. Raises InputError
    for a key that matches nothing.
    """
    for key, value in given.items():
        if key in names:
            whole[key] = value
            continue
        named, dot, field = key.rpartition(".")
        # Without a part's name every part that has the field gets the value.
        takers = [
            one
            for one in parts
            if field in _fields(classes, str(one.get(tag)), tag) and (not dot or one.get(tag) == named)
        ]
        if not takers:
            has = ", ".join(name for name in classes if field in _fields(classes, name, tag)) or "nothing"
            raise InputError(f"{key} is not a field of {of}", hint=f"{has} has {field}")
        for one in takers:
            one[field] = value


def _fields(classes: Mapping[str, type], name: str, tag: str) -> set[str]:
    return {field.name for field in fields(classes[name])} - {tag} if name in classes else set()
