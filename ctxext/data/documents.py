"""Text in, documents out, one at a time: files, directories, the embedded corpus, or a `datasets` id."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ctxext.errors import DataError, EnvironmentFault, InputError

EMBEDDED = "embedded"
SELF = "self"  # text that the model at hand samples (train/prepare.py), nothing that can be read here
HUB_PREFIX = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_PARQUET_ROWS = 64  # rows held at once: a row may be a whole book
ROW_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text and where it came from: `name` is a file name, `file:line`, or an id of the corpus.

    `answers` are the spans (start, stop) of characters that training scores, ascending, apart from each other; None:
    all of the text. `ids` are its tokens where these are known already, as those of text that a model sampled: another
    division of the same letters would be text that it did not write.
    """

    text: str
    name: str
    answers: tuple[tuple[int, int], ...] | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rows:
    """How a row of JSONL, Parquet or a data set becomes a document.

    needs     the fields every row has; of Parquet only these and `may` are read
    document  makes it of a row and its place (`file:line`), or raises DataError, which names the place
    texts     .txt and .md are documents as well
    """

    needs: tuple[str, ...]
    document: Callable[[dict[str, Any], str], Document]
    may: tuple[str, ...] = ()
    texts: bool = False

    def of(self, row: dict[str, Any], place: str) -> Document:
        require_fields(self.needs, row, place)
        return self.document(row, place)


def _text_rows(field: str) -> Rows:
    return Rows((field,), lambda row, place: Document(checked_text(row[field], place, field), place), texts=True)


def read_documents(
    source: str, *, text_field: str = "text", split: str | None = None, rows: Rows | None = None
) -> Iterator[Document]:
    """The documents of `source`, lazily: no more than one file of text or one batch of rows is in memory.

    `source` is one of

    - a file: `.txt` and `.md` are one document each; `.jsonl` has one object a line, `.parquet` one row a
      document, with the text in `text_field`;
    - a directory: every file below it with one of these suffixes, in the order of their paths; files with
      other suffixes and hidden ones are not data and are passed over;
    - `embedded`: the files of `ctxext.data.corpus`, whole, of the part `split` (default "train");
    - `hub:NAME[:CONFIG]`, or NAME[:CONFIG] where no such path exists: a `datasets` id, streamed.

    `rows` makes other documents of rows than the text of `text_field` (data/chat.py); of a directory, .txt and .md are
    then not data. Documents of white space alone are passed over. UTF-8 is required; a byte order mark is removed, and
    in `.txt` and `.md` the line ends of Windows become plain newlines.

    Errors: InputError (nothing is there, an unknown suffix, a split asked of files) at the call;
    DataError (no text at all, invalid UTF-8, a line that does not parse, a missing field, each with its
    place) and EnvironmentFault (no network for a `datasets` id) while reading.
    """
    if source == EMBEDDED:
        from ctxext.data import corpus

        return _non_empty(iter(corpus.stdlib_documents(cast(corpus.Split, split or "train"))), source)
    if source == SELF:
        raise InputError(f"{SELF}: text that a model samples is for ctxext finetune alone", hint="give files")
    rows = rows or _text_rows(text_field)
    hub_id = _hub_id(source)
    if hub_id is not None:
        return _non_empty(_read_hub(hub_id, rows, split or "train"), source)
    if split is not None:
        raise InputError(
            f"split {split!r} was asked of {source!r}, but files have no splits",
            hint="give one file or directory for each split",
        )
    return _non_empty(_read_files(_files(Path(source), rows.texts), rows), source)


def fingerprint(source: str, *, text_field: str = "text", split: str | None = None, format: str = "text") -> str:
    """A cheap hash of what `read_documents` would read, to know whether tokens made earlier still hold.

    Files: the path, size and modification time of each, not their content. The embedded corpus: its own
    hash. A `datasets` id: its name alone, so that a data set that moved upstream is not noticed. `format` other than
    text is what `rows` were (train/spec.py).
    """
    read_as = [] if format == "text" else [format]
    digest = hashlib.sha256(json.dumps([source, text_field, split, *read_as]).encode())
    if source == EMBEDDED:
        from ctxext.data import corpus

        digest.update(corpus.fingerprint()["sha256"].encode())
    elif _hub_id(source) is None:
        for path in _files(Path(source), texts=format == "text"):
            status = path.stat()
            digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _hub_id(source: str) -> str | None:
    """The `datasets` id meant by `source`, or None where it names a path (that may not exist)."""
    if source.startswith(HUB_PREFIX):
        name = source.removeprefix(HUB_PREFIX)
        if not _HUB_ID.fullmatch(name):
            raise InputError(f"{source!r} is no data set id", hint="write hub:NAME or hub:OWNER/NAME[:CONFIG]")
        return name
    is_path = Path(source).exists() or Path(source).suffix in _READERS or not _HUB_ID.fullmatch(source)
    return None if is_path else source


def _files(source: Path, texts: bool = True) -> list[Path]:
    """The files `source` stands for, in the order they are read; without `texts`, those alone that have rows."""
    suffixes = tuple(_READERS) if texts else ROW_SUFFIXES
    allowed = ", ".join(suffixes)
    if source.is_dir():
        files = sorted(
            path
            for path in source.rglob("*")
            if path.suffix in suffixes
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(source).parts)
        )
        if not files:
            raise InputError(f"no file to read in the directory {source}", hint=f"it may hold {allowed}")
        return files
    if not source.exists():
        raise InputError(
            f"no such file or directory: {source}",
            hint=f"give {allowed}, a directory of them, {EMBEDDED}, or hub:NAME for a data set",
        )
    if source.suffix not in suffixes:
        raise InputError(
            f"{source} has the suffix {source.suffix!r}; allowed are {allowed}", hint="rename or convert the file"
        )
    return [source]


def _non_empty(documents: Iterator[Document], source: str) -> Iterator[Document]:
    found = False
    for document in documents:
        if document.text and not document.text.isspace():
            found = True
            yield document
    if not found:
        raise DataError(f"{source} has no text: every document is empty", hint="give data that holds text")


def _read_files(files: list[Path], rows: Rows) -> Iterator[Document]:
    for path in files:
        try:
            yield from _READERS[path.suffix](path, rows)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}",
                hint="check that the file is whole and that you may read it",
            ) from error


def _read_text(path: Path, rows: Rows) -> Iterator[Document]:
    text = _decode(path.read_bytes(), 0, str(path)).removeprefix("\ufeff")
    # Models are trained on \n: a Victorian novel with \r\n doubled the perplexity of stories260K.
    yield Document(text.replace("\r\n", "\n"), str(path))


def _read_jsonl(path: Path, rows: Rows) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            place = f"{path}:{number}"
            line = _decode(raw, offset, place)
            offset += len(raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.strip():
                yield rows.of(_parse_line(line, place, rows.needs[0]), place)


def _parse_line(line: str, place: str, field: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: this line is not JSON: {error}", hint="JSONL has one whole object on each line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, got {type(row).__name__}", hint=f'write {{"{field}": ...}}')
    return row


def require_fields(needed: tuple[str, ...], fields: Iterable[str], place: str) -> None:
    """Raises DataError for the first of the `needed` fields that is absent, with the format that would fit."""
    fields = list(fields)
    absent = next((field for field in needed if field not in fields), None)
    if absent is None:
        return
    hint = f"name the field that holds the {'text' if len(needed) == 1 else absent}"
    if "messages" in needed or "completion" in needed:
        hint = "write those fields; plain text is read with data.format=text"
    if "messages" in fields:
        hint = "conversations are read with --set data.format=messages"
    elif {"prompt", "completion"} <= set(fields):
        hint = "prompts and their completions are read with --set data.format=prompt"
    raise DataError(f"{place}: no field {absent!r}; the fields there are {', '.join(fields) or 'none'}", hint=hint)


def checked_text(text: Any, place: str, field: str) -> str:
    """`text`, if it is text that a tokenizer can read. DataError otherwise."""
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {field!r} holds {type(text).__name__}, not text",
            hint="name a field that holds text in every row",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no text that UTF-8 can hold
        raise DataError(
            f"{place}: field {field!r} has half a surrogate pair at character {error.start}",
            hint="repair the text: no tokenizer can read it",
        ) from error
    return text


def _read_parquet(path: Path, rows: Rows) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            fields = table.schema_arrow.names
            require_fields(rows.needs, fields, str(path))
            wanted = [*rows.needs, *(field for field in rows.may if field in fields)]
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for values in zip(*(batch.column(field) for field in wanted), strict=True):
                    number += 1
                    place = f"{path}:{number}"
                    row = {field: _plain(value, place) for field, value in zip(wanted, values, strict=True)}
                    yield rows.of(row, place)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no readable Parquet file: {error}", hint="check that the file is whole") from error


def _plain(value: Any, place: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: invalid UTF-8 at byte {error.start} of this row's text", hint="re-encode the text as UTF-8"
        ) from error


def _decode(raw: bytes, offset: int, place: str) -> str:
    """`raw` as text; `offset` is where it begins in its file, in bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{place}: invalid UTF-8 at byte {at:,} of the file (0x{raw[error.start]:02x})",
            hint="re-encode the file as UTF-8, for example with iconv",
        ) from error


_READERS: dict[str, Callable[[Path, Rows], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_hub(hub_id: str, rows: Rows, split: str) -> Iterator[Document]:
    """Rows of a data set on the hub, streamed. Scripts of the data set are never run."""
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            "the package `datasets` is not installed", hint="install it, or give a local file"
        ) from error
    name, _, config = hub_id.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, row in enumerate(found, start=1):
            yield rows.of(row, f"{hub_id}:{number}")
    except ValueError as error:  # an unknown config or split: the message lists those there are
        raise InputError(
            f"the data set {hub_id!r} cannot be read: {error}", hint="check the config (NAME:CONFIG) and the split"
        ) from error
    except (OSError, RuntimeError) as error:
        raise EnvironmentFault(
            f"the data set {hub_id!r} cannot be fetched: {_first_line(error)}",
            hint=f"if {hub_id!r} was meant as a path: it does not exist. Without network, or with no access "
            "to a gated data set, give a local .txt, .md, .jsonl or .parquet file",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
