"""Reads files and rows as documents: one reader per format; errors name the place of the fault. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.data.files import TEXT_SUFFIXES, opened
from ctxext.errors import DataError, EnvironmentFault, InputError
from ctxext.extras import require

_PARQUET_ROWS = 64  # rows held at once: a row may be a whole book


@dataclass(frozen=True)
class Document:
    """One text and its origin: `name` is a file name, `file:line`, or an id of the corpus.

    answers   spans (start, stop) of characters that training scores, ascending and disjoint; None: all of the text
    ids       the text's tokens, if they are known already, such as those that a model sampled: other tokens for the
              same characters would not be what the model wrote
    rendered  a chat template wrote the text, including its beginning (no BOS is added)
    """

    text: str
    name: str
    answers: tuple[tuple[int, int], ...] | None = None
    ids: tuple[int, ...] | None = None
    rendered: bool = False


@dataclass(frozen=True)
class Rows:
    """How a row of JSONL, Parquet or a data set becomes a document.

    needs     the fields that every row has; of Parquet only these and `may` are read
    document  makes the document from a row and its place (`file:line`), or raises DataError with the place
    may       optional fields
    texts     whether text files are documents as well
    """

    needs: tuple[str, ...]
    document: Callable[[dict[str, Any], str], Document]
    may: tuple[str, ...] = ()
    texts: bool = False

    def of(self, row: dict[str, Any], place: str) -> Document:
        """Returns the document of a row. Raises DataError if a needed field is missing."""
        require_fields(self.needs, row, place)
        return self.document(row, place)


class NoRows(Exception):
    """A .json file has no rows. In a directory such files may lie next to the data."""


def _read_text(path: Path, rows: Rows) -> Iterator[Document]:
    with opened(path) as file:
        text = _decode(file.read(), 0, str(path)).removeprefix("\ufeff")
    # Models are trained on \n: a Victorian novel with \r\n doubled the perplexity of stories260K.
    yield Document(text.replace("\r\n", "\n"), str(path))


def _read_jsonl(path: Path, rows: Rows) -> Iterator[Document]:
    offset = 0
    with opened(path) as lines:
        # Count bytes as well as lines, so that an error names the byte in the file.
        for number, raw in enumerate(lines, start=1):
            place = f"{path}:{number}"
            line = _decode(raw, offset, place)
            offset += len(raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.strip():
                yield rows.of(_parse_line(line, place, rows.needs[0]), place)


def _read_json(path: Path, rows: Rows) -> Iterator[Document]:
    """Yields the rows of a list of objects, of one object, or of JSON Lines. Raises NoRows for anything else."""
    with opened(path) as file:
        text = _decode(file.read(), 0, str(path)).removeprefix("\ufeff")
    if not text.strip():
        return
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        # A whole object on the first line means JSON Lines; that reader names the line of a fault.
        first = text.lstrip().partition("\n")[0]
        try:
            is_row = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            is_row = False
        if not is_row:
            raise NoRows(f"not JSON: {_first_line(error)}") from None
        yield from _read_jsonl(path, rows)
        return
    found = data if isinstance(data, list) else [data]
    for number, row in enumerate(found, start=1):
        place = f"{path}: row {number}"
        # A wrong first row means that the file is not data. A wrong later row is a fault in the data.
        if number == 1 and not isinstance(row, dict):
            raise NoRows("no list of objects")
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object, got {type(row).__name__}", hint="write a list of objects")
        if number == 1 and (absent := next((name for name in rows.needs if name not in row), None)):
            raise NoRows(f"its first row has no field {absent!r}" if isinstance(data, list) else f"no field {absent!r}")
        yield rows.of(row, place)


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
    """Raises DataError for the first of the `needed` fields that is absent, with the format that matches the fields."""
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
    """Returns `text` if it is text that a tokenizer can read. Raises DataError otherwise."""
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {field!r} holds {type(text).__name__}, not text",
            hint="name a field that holds text in every row",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but UTF-8 cannot encode it
        raise DataError(
            f"{place}: field {field!r} has half a surrogate pair at character {error.start}",
            hint="repair the text: no tokenizer can read it",
        ) from error
    return text


def _read_parquet(path: Path, rows: Rows) -> Iterator[Document]:
    require("pyarrow", f"reading {path}")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            fields = table.schema_arrow.names
            require_fields(rows.needs, fields, str(path))
            # Read only these columns, in batches, because a row may be very large.
            wanted = [*rows.needs, *(field for field in rows.may if field in fields)]
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for values in zip(*(batch.column(field) for field in wanted), strict=True):
                    number += 1
                    place = f"{path}:{number}"
                    row = {field: _plain(value, place) for field, value in zip(wanted, values, strict=True)}
                    yield rows.of(row, place)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {error}", hint="check that the file is whole"
        ) from error


def _plain(value: Any, place: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: invalid UTF-8 at byte {error.start} of this row's text", hint="re-encode the text as UTF-8"
        ) from error


def _decode(raw: bytes, offset: int, place: str) -> str:
    """Returns `raw` as text; `offset` is where it begins in its file, in bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{place}: invalid UTF-8 at byte {at:,} of the file (0x{raw[error.start]:02x})",
            hint="re-encode the file as UTF-8, for example with iconv",
        ) from error


READERS: dict[str, Callable[[Path, Rows], Iterator[Document]]] = {
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def read_hub(hub_id: str, rows: Rows, split: str) -> Iterator[Document]:
    """Yields the rows of a data set on the hub, streamed. Scripts of the data set are never run."""
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            "the package `datasets` is not installed", hint="install it, or give a local file"
        ) from error
    name, _, config = hub_id.partition(":")
    try:
        # `load_dataset` and the iteration can both fail, since rows are fetched while they are read.
        found = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, row in enumerate(found, start=1):
            yield rows.of(row, f"{hub_id}:{number}")
    except ValueError as error:  # an unknown config or split: the message lists the existing ones
        raise InputError(
            f"the data set {hub_id!r} cannot be read: {error}", hint="check the config (NAME:CONFIG) and the split"
        ) from error
    except (OSError, RuntimeError) as error:
        raise EnvironmentFault(
            f"the data set {hub_id!r} cannot be fetched: {_first_line(error)}",
            hint=f"if {hub_id!r} was meant as a path: it does not exist. Without network, or with no access "
            "to a gated data set, give a local file or directory of text",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
