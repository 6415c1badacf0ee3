"""Checks that a run's data is the same as at its start. Contents are compared, and changed files are named. No torch.

run/data.json   {"files": {path: sha256}, "changed": [accepted changes, in words]}; the hash of all files is in
                spec.yaml. A run of an older version has no data.json, and its hash uses modification times.
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
from ctxext.train.finetune_spec import DataSpec, MixturePart

DATA_FILE = "data.json"


def data_hash(data: DataSpec, then: str | None = None) -> str | None:
    """Returns a hash of all files of all parts of a mixture; None for a data set of the hub, which has no hash.

    `then` is a hash that was recorded earlier. It is returned where it has the form that older versions wrote and the
    data is still the same.
    """
    if then is not None and then == _by_time(data) and not _read_since(data):
        return then
    return _together(data, _contents)


def write_record(run: Path, data: DataSpec, changed: Sequence[str] = ()) -> None:
    """Writes data.json atomically. `changed`: the differences from the data at the start of the run."""
    record = {"files": _files(data), "changed": list(changed)}
    write_whole(run / DATA_FILE, json.dumps(record, indent=1) + "\n")


def changes_of_data(run: Path) -> list[str]:
    """Returns the changes of the data while the run was interrupted that were accepted with --force."""
    return list(_record(run).get("changed", []))


def moved_data(run: Path, then: str | None, data: DataSpec, now: str | None) -> list[str]:
    """Returns the differences from the data at the start of `run`, in words; [] if the contents are the same.

    `then` is the hash in the run's spec.yaml, `now` is `data_hash(data)`.
    """
    if now == then:
        return []
    if then is not None and then == _by_time(data):
        # The old hash matches: no file has changed. But this version may read more files, so that the data differs.
        return [f"{path} (the ctxext version that started this run did not read it)" for path in _read_since(data)]
    # Compare file by file: missing, new and changed ones.
    before, after = _record(run).get("files"), _files(data)
    if not isinstance(before, dict):
        return ["its files (an older version started this run and did not record which ones)"]
    found = [f"{path} (missing)" for path in before if path not in after]
    found += [f"{path} (new)" for path in after if path not in before]
    found += [f"{path} (changed)" for path in after if before.get(path, after[path]) != after[path]]
    return found or ["the order or the formats of its files"]


def first_few(moved: Sequence[str]) -> str:
    """Returns the first few differences in one line, and the number of the others."""
    rest = len(moved) - NAMED
    return ", ".join(moved[:NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def _contents(part: MixturePart) -> str:
    return fingerprint(part.source, text_field=part.text_field, format=part.format)


def _by_time(data: DataSpec) -> str | None:
    """The hash that older versions wrote; None if it cannot be computed from the files that are there."""

    def hashed(part: MixturePart) -> str | None:
        return fingerprints.by_time(part.source, text_field=part.text_field, format=part.format)

    return _together(data, hashed)


def _together(data: DataSpec, hashed: Callable[[MixturePart], str | None]) -> str | None:
    """One hash of all parts' hashes; None if there are no parts with a hash, or if a part's hash is None."""
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
    """The files that this version reads and older versions skipped."""
    paths = [path for part in data.parts for path in file_hashes(part.source, format=part.format) or {}]
    before = {
        str(path)
        for part in data.parts
        if part.source != EMBEDDED and _is_path(part.source)
        for path in fingerprints.read_before(Path(part.source), part.format)
    }
    return [path for path in paths if path not in before]


def _record(run: Path) -> dict[str, Any]:
    """The content of data.json; {} if the file is missing or damaged."""
    try:
        record = json.loads((run / DATA_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
