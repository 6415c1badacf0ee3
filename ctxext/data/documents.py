"""Reads text sources as documents, one at a time: files, directories, the embedded corpus, or a `datasets` id."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from ctxext.config import manifest as manifests
from ctxext.data.files import TEXT_SUFFIXES, Found, Reading, find, kind_of, record
from ctxext.data.readers import READERS, NoRows, read_hub
from ctxext.data.readers import Document as Document
from ctxext.data.readers import Rows as Rows
from ctxext.data.readers import checked_text as checked_text
from ctxext.data.readers import require_fields as require_fields
from ctxext.errors import DataError, InputError

EMBEDDED = "embedded"
MOST_COMPARED = 1 << 32  # bytes up to which `fingerprint` hashes the contents for callers that read only a part
SELF = "self"  # text that the trained model samples itself (train/prepare.py); it cannot be read here
HUB_PREFIX = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def _text_rows(field: str) -> Rows:
    return Rows((field,), lambda row, place: Document(checked_text(row[field], place, field), place), texts=True)


class Documents(Iterator[Document]):
    """Documents, one at a time, with a report of what has been read of their source so far (`reading`)."""

    def __init__(self, documents: Iterator[Document], reading: Reading):
        self.reading = record(reading)
        self._documents = _with_text(documents, reading)

    def __iter__(self) -> Documents:
        return self

    def __next__(self) -> Document:
        return next(self._documents)


def read_documents(
    source: str, *, text_field: str = "text", split: str | None = None, rows: Rows | None = None
) -> Documents:
    """Returns the documents of `source`, lazily: at most one file of text or one batch of rows is in memory.

    `source` is one of

    - a file: `.txt`, `.text` and `.md` are one document each; `.jsonl` has one object a line, `.parquet` one row a
      document, with the text in `text_field`; `.json` holds a list of objects, one object, or JSON Lines, and is read
      whole; each but `.parquet` may be compressed (`.gz`, `.zst`); suffixes may be upper-case;
    - a directory: every file below it with one of these suffixes, in the order of their paths. Links are followed, and
      a file with two names is read once. Hidden files, other files, and `.json` files without such rows are skipped;
      `reading` of the result names them (data/files.py);
    - `embedded`: the files of `ctxext.data.corpus`, whole, of the part `split` (default "train");
    - `hub:NAME[:CONFIG]`, or NAME[:CONFIG] if no such path exists: a `datasets` id, streamed.

    `rows` makes other documents of rows than the text of `text_field` (data/chat.py); then text files of a directory
    are not data. Documents of only white space are skipped. UTF-8 is required; a byte order mark is removed, and
    Windows line ends in text become plain newlines.

    Errors at the call: InputError (no such source, an unknown suffix, a split requested of files). Errors while
    reading: DataError (no text at all, invalid UTF-8, a line that does not parse, a missing field, each with its
    place; a damaged file) and EnvironmentFault (no network for a `datasets` id).
    """
    if source == EMBEDDED:
        from ctxext.data import corpus

        return Documents(iter(corpus.stdlib_documents(cast(corpus.Split, split or "train"))), Reading(source))
    if source == SELF:
        raise InputError(f"{SELF}: only ctxext finetune supports text that the model samples", hint="give files")
    # A path wins over a hub id of the same name: `_hub_id` returns None if the path exists.
    rows = rows or _text_rows(text_field)
    hub_id = _hub_id(source)
    if hub_id is not None:
        return Documents(read_hub(hub_id, rows, split or "train"), Reading(source))
    if split is not None:
        raise InputError(
            f"split {split!r} was given for {source!r}, but files have no splits",
            hint="give one file or directory for each split",
        )
    found = find(Path(source), rows.texts)
    reading = Reading.begun(source, found)
    return Documents(_read_files(found, Path(source), rows, reading), reading)


def fingerprint(
    source: str, *, text_field: str = "text", split: str | None = None, format: str = "text", most: int | None = None
) -> str:
    """Returns a hash of what `read_documents` would read, to check whether tokens made earlier are still valid.

    - Files: their formats and contents (sha256) in reading order, without their paths and times, so that a copy is the
      same data. If they have more than `most` bytes together, the hash uses paths, sizes and times instead; this is for
      callers that read only a part.
    - The embedded corpus: its own hash.
    - A `datasets` id: only its name, so a data set that changed upstream is not detected.

    `format` other than text is the format of `rows` (train/finetune_spec.py).
    """
    files = source != EMBEDDED and _hub_id(source) is None
    read_as = [] if format == "text" else [format]
    # The name of a file source is not part of the hash, so a moved copy has the same hash.
    named = ["contents" if files else source, text_field, split, *read_as]
    digest = hashlib.sha256(json.dumps(named).encode())
    if source == EMBEDDED:
        from ctxext.data import corpus

        digest.update(corpus.fingerprint()["sha256"].encode())
    elif files:
        paths = find(Path(source), texts=format == "text").files
        found = [path.stat() for path in paths] if most is not None else []
        if most is not None and sum(status.st_size for status in found) > most:
            stamps = [f"{path.resolve()}\0{s.st_size}\0{s.st_mtime_ns}" for path, s in zip(paths, found, strict=True)]
        else:
            stamps = content_hashes(paths)
        for path, stamp in zip(paths, stamps, strict=True):
            # The format decides how the bytes are read, so it is part of the hash.
            digest.update(f"{''.join(kind_of(path) or ())}\0{stamp}\0".encode())
    return digest.hexdigest()


def file_hashes(source: str, *, format: str = "text") -> dict[str, str] | None:
    """Returns the sha256 of each file of `source`, by its path; None if the source is not files."""
    if source in (EMBEDDED, SELF) or not Path(source).exists():
        return None
    paths = find(Path(source), texts=format == "text").files
    return {str(path): content for path, content in zip(paths, content_hashes(paths), strict=True)}


def content_hashes(paths: Iterable[Path]) -> list[str]:
    """Returns the sha256 of each file. DataError if one cannot be read."""
    try:
        return manifests.content_hashes(paths)
    except OSError as error:
        raise _unreadable(Path(error.filename or "a file"), error) from error


def _hub_id(source: str) -> str | None:
    """Returns the `datasets` id that `source` means, or None if it names a path (which may not exist)."""
    if source.startswith(HUB_PREFIX):
        name = source.removeprefix(HUB_PREFIX)
        if not _HUB_ID.fullmatch(name):
            raise InputError(f"{source!r} is not a data set id", hint="write hub:NAME or hub:OWNER/NAME[:CONFIG]")
        return name
    is_path = Path(source).exists() or kind_of(Path(source)) is not None or not _HUB_ID.fullmatch(source)
    return None if is_path else source


def _with_text(documents: Iterator[Document], reading: Reading) -> Iterator[Document]:
    """Yields the documents that are not only white space, and counts the others as skipped."""
    for document in documents:
        if _blank(document):
            reading.empty_rows += 1
        else:
            reading.documents += 1
            yield document
    # A source without any text is an error; its message names what was skipped.
    if not reading.documents:
        words = reading.passed_over_in_words()
        raise DataError(
            f"{reading.source} has no text" + (f"; skipped: {words}" if words else ""), hint="give data with text"
        )


def _blank(document: Document) -> bool:
    return not document.text or document.text.isspace()


def _read_files(found: Found, source: Path, rows: Rows, reading: Reading) -> Iterator[Document]:
    for path in found.files:
        kind = kind_of(path)
        assert kind is not None
        # Blank text files count as empty files, blank rows as empty rows (`_with_text`).
        is_text, count = kind[0] in TEXT_SUFFIXES, 0
        reading.files += 1
        try:
            for document in READERS[kind[0]](path, rows):
                if not (is_text and _blank(document)):
                    count += 1
                    yield document
        except NoRows as reason:
            # A .json file without rows is an error if the user named it, and is skipped if it lies in a directory.
            if path == source:
                hint = f'write a list of objects, each with "{rows.needs[0]}", or rename the file'
                raise DataError(f"{path}: {reason}", hint=hint) from None
            reading.pass_over(_shown(path, source), str(reason))
            continue
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from error
        if not count:
            reading.pass_over(_shown(path, source), "empty")


def _shown(path: Path, source: Path) -> str:
    return path.name if path == source else path.relative_to(source).as_posix()


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path} cannot be read: {reason}", hint="check that the file is whole and that you may read it")
