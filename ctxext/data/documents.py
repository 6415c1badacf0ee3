"""Text in, documents out, one at a time: files, directories, the embedded corpus, or a `datasets` id."""

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
MOST_COMPARED = 1 << 32  # bytes of text whose content is compared where only its beginning is read
SELF = "self"  # text that the model at hand samples (train/prepare.py), nothing that can be read here
HUB_PREFIX = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def _text_rows(field: str) -> Rows:
    return Rows((field,), lambda row, place: Document(checked_text(row[field], place, field), place), texts=True)


class Documents(Iterator[Document]):
    """Documents, one at a time, with what has been read of their source so far (`reading`)."""

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
    """The documents of `source`, lazily: no more than one file of text or one batch of rows is in memory.

    `source` is one of

    - a file: `.txt`, `.text` and `.md` are one document each; `.jsonl` has one object a line, `.parquet` one row a
      document, with the text in `text_field`; `.json` holds a list of objects, one object, or JSON Lines, and is read
      whole; each but `.parquet` may be compressed (`.gz`, `.zst`); suffixes may be upper-case;
    - a directory: every file below it with one of these suffixes, in the order of their paths. Links are followed, and
      what two names lead to is read once. Hidden files, others, and `.json` that has no such rows are passed over;
      `reading` of the result names them (data/files.py);
    - `embedded`: the files of `ctxext.data.corpus`, whole, of the part `split` (default "train");
    - `hub:NAME[:CONFIG]`, or NAME[:CONFIG] where no such path exists: a `datasets` id, streamed.

    `rows` makes other documents of rows than the text of `text_field` (data/chat.py); of a directory, files of text are
    then not data. Documents of white space alone are passed over. UTF-8 is required; a byte order mark is removed, and
    in text the line ends of Windows become plain newlines.

    Errors: InputError (nothing is there, an unknown suffix, a split asked of files) at the call;
    DataError (no text at all, invalid UTF-8, a line that does not parse, a missing field, each with its
    place; a damaged file) and EnvironmentFault (no network for a `datasets` id) while reading.
    """
    if source == EMBEDDED:
        from ctxext.data import corpus

        return Documents(iter(corpus.stdlib_documents(cast(corpus.Split, split or "train"))), Reading(source))
    if source == SELF:
        raise InputError(f"{SELF}: text that a model samples is for ctxext finetune alone", hint="give files")
    rows = rows or _text_rows(text_field)
    hub_id = _hub_id(source)
    if hub_id is not None:
        return Documents(read_hub(hub_id, rows, split or "train"), Reading(source))
    if split is not None:
        raise InputError(
            f"split {split!r} was asked of {source!r}, but files have no splits",
            hint="give one file or directory for each split",
        )
    found = find(Path(source), rows.texts)
    reading = Reading.begun(source, found)
    return Documents(_read_files(found, Path(source), rows, reading), reading)


def fingerprint(
    source: str, *, text_field: str = "text", split: str | None = None, format: str = "text", most: int | None = None
) -> str:
    """A hash of what `read_documents` would read, to know whether tokens made earlier still hold.

    Files: their formats and contents (sha256) in the order they are read, not their places and times, so that a copy
    is the same data; of more than `most` bytes together, the paths, sizes and times, for callers that read only a part.
    The embedded corpus: its own hash. A `datasets` id: its name alone, so that a data set that moved upstream is not
    noticed. `format` other than text is what `rows` were (train/spec.py).
    """
    files = source != EMBEDDED and _hub_id(source) is None
    read_as = [] if format == "text" else [format]
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
            digest.update(f"{''.join(kind_of(path) or ())}\0{stamp}\0".encode())
    return digest.hexdigest()


def file_hashes(source: str, *, format: str = "text") -> dict[str, str] | None:
    """The sha256 of each file that `source` stands for, by its path; None where it stands for none."""
    if source in (EMBEDDED, SELF) or not Path(source).exists():
        return None
    paths = find(Path(source), texts=format == "text").files
    return {str(path): content for path, content in zip(paths, content_hashes(paths), strict=True)}


def content_hashes(paths: Iterable[Path]) -> list[str]:
    """The sha256 of each file. DataError where one cannot be read."""
    try:
        return manifests.content_hashes(paths)
    except OSError as error:
        raise _unreadable(Path(error.filename or "a file"), error) from error


def _hub_id(source: str) -> str | None:
    """The `datasets` id meant by `source`, or None where it names a path (that may not exist)."""
    if source.startswith(HUB_PREFIX):
        name = source.removeprefix(HUB_PREFIX)
        if not _HUB_ID.fullmatch(name):
            raise InputError(f"{source!r} is no data set id", hint="write hub:NAME or hub:OWNER/NAME[:CONFIG]")
        return name
    is_path = Path(source).exists() or kind_of(Path(source)) is not None or not _HUB_ID.fullmatch(source)
    return None if is_path else source


def _with_text(documents: Iterator[Document], reading: Reading) -> Iterator[Document]:
    """The documents that are not white space alone; the others are counted as passed over."""
    for document in documents:
        if _blank(document):
            reading.empty_rows += 1
        else:
            reading.documents += 1
            yield document
    if not reading.documents:
        words = reading.passed_over_in_words()
        raise DataError(
            f"{reading.source} has no text" + (f"; passed over: {words}" if words else ""),
            hint="give data that holds text",
        )


def _blank(document: Document) -> bool:
    return not document.text or document.text.isspace()


def _read_files(found: Found, source: Path, rows: Rows, reading: Reading) -> Iterator[Document]:
    for path in found.files:
        kind = kind_of(path)
        assert kind is not None
        is_text, count = kind[0] in TEXT_SUFFIXES, 0
        reading.files += 1
        try:
            for document in READERS[kind[0]](path, rows):
                if not (is_text and _blank(document)):
                    count += 1
                    yield document
        except NoRows as reason:
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
