"""Whether a run's data is what it was when the run began: contents are compared, and files that changed are named.

run/data.json   {"files": {path: sha256}, "changed": [what changed and was accepted, in words]}; the hash of all is in
                spec.yaml. A run of an older version has no data.json, and its hash is of times. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ctxext.config.output import write_whole
from ctxext.data import fingerprints
from ctxext.data.documents import EMBEDDED, SELF, file_hashes, fingerprint
from ctxext.data.files import NAMED
from ctxext.train.spec import DataSpec, MixturePart

DATA_FILE = "data.json"


def data_hash(data: DataSpec) -> str | None:
    """A hash of what is read, of all parts of a mixture; None where that is a data set of the hub, which has none."""
    return _together(data, _contents)


def write_record(run: Path, data: DataSpec, changed: Sequence[str] = ()) -> None:
    """data.json, whole or not at all. `changed` is what differs from the data that the run began with."""
    record = {"files": _files(data), "changed": list(changed)}
    write_whole(run / DATA_FILE, json.dumps(record, indent=1) + "\n")


def changes_of_data(run: Path) -> list[str]:
    """What of the data changed while the run was interrupted, and was accepted with --force."""
    return list(_record(run).get("changed", []))


def moved_data(run: Path, then: str | None, data: DataSpec, now: str | None) -> list[str]:
    """What differs from the data that `run` began with, in words; nothing where the contents are the same.

    `then` is the hash in the run's spec.yaml, `now` is `data_hash(data)`.
    """
    if now == then:
        return []
    if then is not None and then == _by_time(data):
        # The files are the same. This version reads more of them, which would be other data.
        return [f"{path} (the version that began this run did not read it)" for path in _read_since(data)]
    before, after = _record(run).get("files"), _files(data)
    if not isinstance(before, dict):
        return ["its files (an older version began this run and did not record which)"]
    found = [f"{path} (missing)" for path in before if path not in after]
    found += [f"{path} (new)" for path in after if path not in before]
    found += [f"{path} (changed)" for path in after if before.get(path, after[path]) != after[path]]
    return found or ["the order or the formats of its files"]


def some_of(moved: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    rest = len(moved) - NAMED
    return ", ".join(moved[:NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def _contents(part: MixturePart) -> str:
    return fingerprint(part.source, text_field=part.text_field, format=part.format)


def _by_time(data: DataSpec) -> str | None:
    """The hash that versions before this one wrote; None where it cannot be made of what is there."""

    def hashed(part: MixturePart) -> str | None:
        return fingerprints.by_time(part.source, text_field=part.text_field, format=part.format)

    return _together(data, hashed)


def _together(data: DataSpec, hashed: Callable[[MixturePart], str | None]) -> str | None:
    """The parts' hashes as one; None where there is none, or where one of them is None."""
    hashes = [hashed(part) for part in data.parts if part.source == EMBEDDED or _is_path(part.source)]
    if len(hashes) < 2 or None in hashes:
        return hashes[0] if len(hashes) == 1 else None
    return hashlib.sha256(" ".join(map(str, hashes)).encode()).hexdigest()


def _is_path(source: str) -> bool:
    return source != SELF and Path(source).exists()


def _files(data: DataSpec) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in data.parts:
        found |= file_hashes(part.source, format=part.format) or {}
    return found


def _read_since(data: DataSpec) -> list[str]:
    """The files that this version reads and older ones passed over."""
    paths = [path for part in data.parts for path in file_hashes(part.source, format=part.format) or {}]
    before = {
        str(path)
        for part in data.parts
        if part.source != EMBEDDED and _is_path(part.source)
        for path in fingerprints.read_before(Path(part.source), part.format)
    }
    return [path for path in paths if path not in before]


def _record(run: Path) -> dict[str, Any]:
    """What data.json says; a file that is absent or broken says nothing."""
    try:
        record = json.loads((run / DATA_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
