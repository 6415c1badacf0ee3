"""The data hash of versions up to 0.1 (by path, size and time), so that runs begun with them can still be resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ctxext.data.documents import EMBEDDED, fingerprint

_TEXTS, _ROWS = (".txt", ".md"), (".jsonl", ".parquet")


def by_time(source: str, *, text_field: str = "text", split: str | None = None, format: str = "text") -> str | None:
    """Returns the old hash of `source`; for files it is by path, size and modification time.

    Returns None if those versions did not read the file.
    """
    path = Path(source)
    # The hash of the embedded corpus and of a data set is the same in all versions.
    if source == EMBEDDED or not path.exists():
        return fingerprint(source, text_field=text_field, split=split, format=format)
    read_as = [] if format == "text" else [format]
    files = read_before(path, format)
    if not files:
        return None
    digest = hashlib.sha256(json.dumps([source, text_field, split, *read_as]).encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def read_before(source: Path, format: str = "text") -> list[Path]:
    """Returns the files that those versions read: lower-case suffixes, uncompressed, without links to directories."""
    suffixes = _TEXTS + _ROWS if format == "text" else _ROWS
    if not source.is_dir():
        return [source] if source.suffix in suffixes else []
    return sorted(
        path
        for path in source.rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
