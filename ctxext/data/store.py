"""Stores tokens on disk once, with the bounds of their documents and, for chat data, which tokens are scored.

Offsets are tokens from the beginning of the whole stream.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctxext.config.locks import alone_at
from ctxext.data.documents import Document, Documents
from ctxext.data.encoding import PlainText
from ctxext.data.files import Reading
from ctxext.data.tokens import encode_documents
from ctxext.data.tokens import scored_tokens as scored_tokens
from ctxext.errors import DataError, EnvironmentFault, InputError

FORMAT = 4  # 3: control tokens of plain text are read as text; 4: a document begins with the ids `begin` (BOS)
_META, _BOUNDS = "meta.json", "bounds.npy"
_OURS = re.compile(r"(tokens|scored)-\d{5,}\.bin|bounds\.npy|meta\.json")


@dataclass(frozen=True)
class StoreMeta:
    """The content of `meta.json`: the counts, and what decides whether the tokens are still valid.

    scored                  number of tokens that training scores; None: all of them, and no extra file is written
    min_tokens, max_tokens  limits for the documents; `left_out` counts the documents outside of them
    max_id                  the largest id, EOS included: a model needs a row for it
    begin                   ids that each document begins with, such as BOS
    reading                 what was read and what was skipped (files.Reading.as_dict)
    """

    tokenizer: str  # tokenizer_hash
    source: str  # fingerprint of what was read
    eos_id: int
    dtype: str  # uint16 or uint32
    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents
    shard_tokens: int
    scored: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    left_out: int = 0
    max_id: int = -1
    begin: list[int] = field(default_factory=list)
    reading: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class TokenStore:
    """Token shards in one directory, memory-mapped: opening takes no time, whatever the size.

    `bounds` [documents] int64 has the offset of each document's first token, ascending from 0. Each document ends with
    the EOS that follows it. `scored` has a byte for each token of `shards`, 1 if training scores it; None if it scores
    all. `reused` is True if `tokenise` found these tokens and made none.
    """

    directory: Path
    meta: StoreMeta
    bounds: np.ndarray
    shards: tuple[np.ndarray, ...] = field(repr=False)
    scored: tuple[np.ndarray, ...] | None = field(default=None, repr=False)
    reused: bool = False

    @classmethod
    def open(cls, directory: Path, *, reused: bool = False) -> TokenStore:
        """Opens what `tokenise` has written. DataError if it is absent, unfinished or cut short."""
        directory = Path(directory)
        meta = _read_meta(directory)
        if meta is None:
            raise DataError(
                f"{directory} has no finished tokens ({_META} is missing or of another version)",
                hint="tokenise the data again",
            )
        # The sizes of all shards follow from the metadata; a shorter file fails when it is mapped.
        counts = [min(meta.shard_tokens, meta.tokens - start) for start in range(0, meta.tokens, meta.shard_tokens)]
        try:
            shards = _mapped(directory, "tokens", meta.dtype, counts)
            scored = None if meta.scored is None else _mapped(directory, "scored", "uint8", counts)
            bounds = np.load(directory / _BOUNDS, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"the tokens in {directory} are damaged: {error}",
                hint="remove the directory and tokenise the data again",
            ) from error
        if len(bounds) != meta.documents:
            raise DataError(
                f"{directory} has bounds for {len(bounds):,} documents, {_META} has {meta.documents:,}",
                hint="remove the directory and tokenise the data again",
            )
        return cls(directory, meta, bounds, shards, scored, reused)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens start <= offset < stop, int64 [stop - start], across shards."""
        return self._read(self.shards, start, stop).astype(np.int64)

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        """Returns whether training scores these tokens, bool [stop - start]."""
        if self.scored is None:
            return np.ones(stop - start, dtype=bool)
        return self._read(self.scored, start, stop).astype(bool)

    def _read(self, shards: tuple[np.ndarray, ...], start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.meta.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.meta.tokens}")
        size, parts = self.meta.shard_tokens, []
        while start < stop:
            shard, at = divmod(start, size)
            count = min(stop - start, size - at)
            parts.append(shards[shard][at : at + count])
            start += count
        return np.concatenate(parts) if parts else np.empty(0, dtype=shards[0].dtype)


def _mapped(directory: Path, stream: str, dtype: str, counts: list[int]) -> tuple[np.ndarray, ...]:
    return tuple(
        np.memmap(_shard_path(directory, i, stream), dtype=dtype, mode="r", shape=(count,))
        for i, count in enumerate(counts)
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Returns the sha256 of what decides the tokens of a text: the fast tokenizer's state, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__}\0{state}".encode()).hexdigest()


def tokenise(
    documents: Iterable[Document],
    tokenizer: Any,
    directory: Path,
    *,
    eos_id: int,
    begin: Sequence[int] = (),
    source_fingerprint: str = "",
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    shard_tokens: int = 1 << 28,
    progress: Callable[[int, int], None] | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> TokenStore:
    """Writes the tokens of `documents`, each followed by `eos_id`, to `directory`, and opens them.

    Each document begins with the ids `begin` (BOS of a tokenizer that adds one: `prompts.framing`) unless it has them
    already or a chat template rendered it: templates write their own. Documents without tokens are skipped, and those
    with fewer than `min_tokens` or more than `max_tokens` (without `begin` and EOS) are left out. Ids are uint16 if all
    ids of the vocabulary fit, else uint32.

    `source_fingerprint` (documents.fingerprint) identifies the source. If `directory` has finished tokens with the same
    fingerprint, tokenizer, BOS, EOS and lengths, nothing is read and the result has `reused` True. Other tokens of
    ctxext there are replaced, so the name of a directory that processes share should include all of these values. An
    empty fingerprint never matches. `progress(documents, tokens)` is called with the totals.

    Plain text has no control tokens (data/encoding.py). In documents with `answers`, control tokens are intended; a
    token is scored if its characters overlap an answer. EOS is scored if the token before it is, unless that is a
    control token that already ends the answer. EOS is not repeated if such a document ends with it: templates write it.

    The tokens are written next to `directory` and renamed when complete; `meta.json` is written last. If several
    processes use one `directory`, one writes and the others wait for it (`waiting()` is called). On a file system
    without locks each writes its own copy, and the first finished one stays.

    Errors: InputError (EOS is not in the vocabulary, a directory with other files, answers with a slow tokenizer),
    DataError (no document, documents with answers next to others), EnvironmentFault (the disk).
    """
    directory = Path(directory)
    vocab = _ids_of(tokenizer)
    if not 0 <= eos_id < vocab:
        raise InputError(
            f"eos_id {eos_id} is outside the vocabulary of {vocab:,} tokens",
            hint="give the id of a token that ends a document",
        )
    if shard_tokens < 1:
        raise InputError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    # Look for finished tokens first: nothing is read then.
    wanted = _Wanted(tokenizer_hash(tokenizer), source_fingerprint, eos_id, list(begin), min_tokens, max_tokens)
    if wanted.held_by(directory):
        return TokenStore.open(directory, reused=True)
    _refuse_foreign(directory)

    def write(place: Path) -> None:
        _write(place, documents, tokenizer, wanted, shard_tokens, progress)

    return _made_once(directory, write, wanted, waiting)


def _made_once(
    directory: Path, write: Callable[[Path], None], wanted: _Wanted, waiting: Callable[[], None]
) -> TokenStore:
    """Lets one of several processes write while the others wait. Raises EnvironmentFault for errors of the disk."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with alone_at(directory.with_name(f".{directory.name}.lock"), waiting):
            # Check again: another process may have written these tokens while this one waited.
            if wanted.held_by(directory):
                return TokenStore.open(directory, reused=True)
            return _replaced(directory, write, wanted)
    except OSError as error:
        raise EnvironmentFault(
            f"the tokens cannot be written to {directory}: {error.strerror or error}",
            hint="free some space, or name a directory on another disk in XDG_CACHE_HOME",
        ) from error


@dataclass(frozen=True)
class _Wanted:
    """What decides the tokens; the names are those of StoreMeta."""

    tokenizer: str
    source: str
    eos_id: int
    begin: list[int]
    min_tokens: int | None
    max_tokens: int | None

    def held_by(self, directory: Path) -> bool:
        """Checks whether a directory has finished tokens for these values. False if `source` is empty."""
        found = _read_meta(directory)
        names = [part.name for part in fields(self)]
        return bool(self.source and found) and all(getattr(found, name) == getattr(self, name) for name in names)


def _replaced(directory: Path, write: Callable[[Path], None], wanted: _Wanted) -> TokenStore:
    """Writes tokens under a temporary name and renames them. If another process finished first, its tokens stay."""
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir()
        write(partial)
        if wanted.held_by(directory):
            return TokenStore.open(directory, reused=True)
        if directory.exists():
            # Rename the old tokens before removing them: a process that has them mapped is not affected, and the path
            # is free at once.
            old = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.old")
            directory.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        try:
            partial.rename(directory)
        except OSError:
            # Without locks, another process may have finished since the last check.
            if wanted.held_by(directory):
                return TokenStore.open(directory, reused=True)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenStore.open(directory)


def _ids_of(tokenizer: Any) -> int:
    """Returns one more than the largest id of a vocabulary, which may have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def _write(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Any,
    wanted: _Wanted,
    shard_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills an empty directory with shards, bounds and metadata."""
    shortest, longest, left_out = wanted.min_tokens, wanted.max_tokens, 0
    dtype = "uint16" if _ids_of(tokenizer) <= 65_535 else "uint32"
    plain = PlainText(tokenizer)
    with _Writer(directory, dtype, shard_tokens) as writer:
        for ids, marks, size, rendered in encode_documents(documents, plain):
            # The length without BOS is compared with the limits; the text may already begin with it.
            begun = rendered or ids[: len(wanted.begin)] == wanted.begin
            length = len(ids) - (0 if rendered or not begun else len(wanted.begin))
            if length < (shortest or 0) or (longest is not None and length > longest):
                left_out += 1
                continue
            if not begun:
                ids = wanted.begin + ids
                marks = marks if marks is None else np.append(np.zeros(len(wanted.begin), dtype=bool), marks)
            # A rendered document that ends with EOS gets no second one.
            if marks is None or ids[-1] != wanted.eos_id:
                # If the answer ends with its own end-of-turn token, the EOS after it is not part of the answer.
                ended = ids[-1] in plain.control
                ids = [*ids, wanted.eos_id]
                marks = marks if marks is None else np.append(marks, marks[-1] and not ended)
            writer.add(ids, marks, size)
            if progress is not None:
                progress(len(writer.bounds), writer.tokens)
    if not writer.tokens and left_out:
        allowed = f"{shortest or 1:,} tokens or more" + (f", at most {longest:,}" if longest is not None else "")
        raise DataError(
            f"all {left_out:,} documents are left out: none has {allowed}",
            hint="change data.min_tokens and data.max_tokens",
        )
    if not writer.tokens:
        raise DataError("no document has a token", hint="give data with text")
    np.save(directory / _BOUNDS, np.frombuffer(writer.bounds, dtype=np.int64))
    # Store the report of the source, with the counts of this encoding, for later runs that reuse the tokens.
    reading = documents.reading if isinstance(documents, Documents) else Reading("", documents=len(writer.bounds))
    reading = replace(reading, tokens=writer.tokens, notes=plain.notes())
    meta = StoreMeta(
        dtype=dtype,
        tokens=writer.tokens,
        documents=len(writer.bounds),
        text_bytes=writer.text_bytes,
        shard_tokens=shard_tokens,
        scored=writer.scored,
        left_out=left_out,
        max_id=writer.max_id,
        reading=reading.as_dict(),
        **asdict(wanted),
    )
    (directory / _META).write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")


def _refuse_foreign(directory: Path) -> None:
    """Raises InputError unless the directory has only token files; only such a directory may be replaced."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; the tokens need a directory", hint="give another path")
    foreign = [path.name for path in directory.glob("*") if not _OURS.fullmatch(path.name)]
    if foreign:
        raise InputError(
            f"{directory} has files that are not tokens, such as {min(foreign)}",
            hint="give a directory for the tokens alone",
        )


class _Writer:
    """Appends to the shards in turn; each has exactly `shard_tokens` tokens, except the last.

    The first document decides whether there are marks; all others must agree.
    """

    def __init__(self, directory: Path, dtype: str, shard_tokens: int):
        self.directory, self.dtype, self.shard_tokens = directory, dtype, shard_tokens
        self.bounds = array("q")
        self.tokens = self.text_bytes = 0
        self.max_id = -1
        self.scored: int | None = None
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, ids: list[int], marks: np.ndarray | None, text_bytes: int) -> None:
        # Appends one document: its ids, its marks (bool [tokens], None: no answers), and its text's size in bytes.
        if not self.tokens:
            self.scored = None if marks is None else 0
        if (marks is None) != (self.scored is None):
            raise DataError("some documents have answers and others have none", hint="give them as two sources")
        self.bounds.append(self.tokens)
        self.text_bytes += text_bytes
        self.max_id = max(self.max_id, *ids)
        streams = {"tokens": np.asarray(ids, dtype=self.dtype)}
        if marks is not None and self.scored is not None:
            streams["scored"] = marks.astype(np.uint8)
            self.scored += int(marks.sum())
        # A document may span several shards. Tokens and marks are split at the same offsets.
        done = 0
        while done < len(ids):
            shard, at = divmod(self.tokens, self.shard_tokens)
            count = min(len(ids) - done, self.shard_tokens - at)
            for stream, values in streams.items():
                if at == 0:
                    if stream in self._files:
                        self._files[stream].close()
                    self._files[stream] = _shard_path(self.directory, shard, stream).open("wb")
                self._files[stream].write(values[done : done + count].tobytes())
            done += count
            self.tokens += count


def _shard_path(directory: Path, index: int, stream: str) -> Path:
    return directory / f"{stream}-{index:05d}.bin"


def _read_meta(directory: Path) -> StoreMeta | None:
    """Returns None if there are no finished tokens that this version can read."""
    try:
        meta = StoreMeta(**json.loads((directory / _META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return meta if meta.format == FORMAT else None
