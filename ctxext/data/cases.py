"""Questions that a model answers by generating: made once, written as JSONL with a manifest, run from the file.

The manifest has the file's hash. A case is text, so that a person can read it and another tool can score it. Its number
of tokens was counted with one tokenizer, whose hash is in the manifest. Generators use a private `random.Random`, never
the global one, seeded by the case's own id: the cases of one task do not depend on which others are made.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ctxext
from ctxext.config.output import disk_faults, write_whole
from ctxext.data.prompts import prompt_ids as prompt_ids  # re-exported
from ctxext.errors import DataError, InputError

_REPAIR = "make the cases again, or remove the manifest"
_FIELDS = {"id": str, "task": str, "length": int, "prompt": str, "references": list, "max_new_tokens": int}


@dataclass(frozen=True)
class Case:
    """One question: `prompt` ends where the answer begins.

    id              unique in its file, and the same for every tokenizer: comparisons pair cases by it
    length          requested tokens: prompt and `max_new_tokens` together have at most as many
    references      answers; the task decides whether all or one of them must be found
    facts           other known facts, such as its depth
    """

    id: str
    task: str
    length: int
    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int
    facts: dict[str, Any] = field(default_factory=dict)


def private_random(*of: object) -> random.Random:
    """Returns a generator that depends only on `of`, in every process and on every platform."""
    return random.Random("/".join(map(str, of)))


def largest(fits: Callable[[int], bool], start: int = 1) -> int:
    """Returns the largest n >= 0 for which `fits(n)`, by doubling and halving; 0 if not even 1 fits.

    `fits` should hold for all numbers below one for which it holds. If it is only almost monotonic (tokens merge),
    the result may be off by a little, so the caller tests what it made.
    """
    low, high = 0, max(1, start)
    # After this loop `low` fits and `high` does not.
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def write_cases(path: Path, cases: Sequence[Case], facts: dict[str, Any]) -> dict[str, Any]:
    """Writes JSONL to `path`, then its manifest with `facts`, the count, the version and the file's sha256."""
    return write_rows(path, cases, {**facts, "cases": len(cases)})


def write_rows(path: Path, rows: Sequence[Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Does the same as `write_cases` for any dataclass, without the count.

    The manifest is written last: rows without one come from a process that was killed.
    """
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows).encode()
    manifest = {**facts, "ctxext": ctxext.__version__, "sha256": hashlib.sha256(lines).hexdigest()}
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lines)
    write_whole(manifest_of(path), json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_cases(path: Path) -> tuple[list[Case], dict[str, Any]]:
    """Returns the cases of a file and its manifest (empty if there is none).

    Errors: InputError (no such file), DataError (a line that does not parse, a field that is missing or of another
    type, a repeated id, each with its line; no case at all; invalid UTF-8; a damaged manifest; bytes that differ
    from the manifest's hash).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the cases {path}: {error.strerror}") from None
    # A file without a manifest (written by hand) is accepted. With a manifest, its sha256 must match.
    manifest = read_manifest(path) if manifest_of(path).is_file() else {}
    if manifest and hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise DataError(f"the sha256 of {path} differs from the one in its manifest", hint=_REPAIR)
    if not data.strip():
        raise DataError(f"{path} has no case", hint="make the cases again")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{number}: invalid UTF-8 at byte {error.start:,} of the file (0x{data[error.start]:02x})",
            hint="re-encode the file as UTF-8",
        ) from error
    cases, seen = [], set[str]()
    # Split only at "\n": str.splitlines also splits at characters that may occur inside a JSON string.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        case = _case(line, f"{path}:{number}")
        if case.id in seen:
            raise DataError(f"{path}:{number}: the id {case.id!r} is used twice", hint="give each case its own id")
        seen.add(case.id)
        cases.append(case)
    return cases, manifest


def _case(line: str, place: str) -> Case:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object")
    for name, kind in _FIELDS.items():
        if not isinstance(row.get(name), kind):
            got = "missing" if name not in row else f"{type(row[name]).__name__} {str(row[name])[:40]!r}"
            raise DataError(f"{place}: {name} is {got}; allowed: {kind.__name__}")
    given = {name: row[name] for name in _FIELDS} | {"references": tuple(row["references"])}
    return Case(**given, facts=row.get("facts", {}))


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a file of rows. Raises DataError if it is damaged or has no sha256."""
    try:
        manifest = json.loads(manifest_of(path).read_bytes())
    except ValueError as error:
        raise DataError(f"{manifest_of(path)}: not JSON ({error})", hint=_REPAIR) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), str):
        raise DataError(f"{manifest_of(path)}: not a JSON object with a sha256", hint=_REPAIR)
    return manifest


def manifest_of(path: Path) -> Path:
    """Returns the path of the manifest of a file of rows: next to the file."""
    return path.with_name(f"{path.name}.manifest.json")


def evenly(cases: Iterable[Any], limit: int | None, groups: Callable[[Any], Sequence[object]]) -> list[Any]:
    """Returns at most `limit` of `cases`, taken in turn from each group, and within a group from each subgroup.

    `groups(case)` returns a case's groups, outermost first, such as (length, task, depth). The order of the cases is
    kept.
    """
    everything = list(cases)
    if limit is None or limit >= len(everything):
        return everything
    turns = _in_turns(list(range(len(everything))), [tuple(groups(case)) for case in everything], 0)
    return [everything[i] for i in sorted(turns[:limit])]


def _in_turns(indices: list[int], groups: list[tuple[object, ...]], level: int) -> list[int]:
    if level == len(groups[indices[0]]):
        return indices
    parts: dict[object, list[int]] = {}
    for i in indices:
        parts.setdefault(groups[i][level], []).append(i)
    # Order each group by its subgroups first, then take one index from each group per round.
    queues = [_in_turns(part, groups, level + 1) for part in parts.values()]
    longest = max(len(queue) for queue in queues)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
