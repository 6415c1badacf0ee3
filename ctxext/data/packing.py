"""Tokens on disk, once, with the bounds of their documents; and sequences of one exact length cut from them.

T is the length of a sequence in tokens. Offsets are tokens from the beginning of the whole stream.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ctxext.data.documents import Document
from ctxext.errors import DataError, EnvironmentFault, InputError

NO_LABEL = -100  # torch's ignore_index
_FORMAT = 1
_META, _BOUNDS = "meta.json", "bounds.npy"
_OURS = re.compile(r"tokens-\d{5,}\.bin|bounds\.npy|meta\.json")
_BATCH_CHARACTERS = 1 << 20  # documents handed to the tokenizer together, at least one


@dataclass(frozen=True)
class StoreMeta:
    """What `meta.json` says: the counts, and the hashes that decide whether the tokens still hold."""

    tokenizer: str  # tokenizer_hash
    source: str  # fingerprint of what was read
    eos_id: int
    dtype: str  # uint16 or uint32
    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents
    shard_tokens: int
    format: int = _FORMAT


@dataclass(frozen=True)
class TokenStore:
    """Token shards in one directory, memory-mapped: opening costs nothing, whatever the size.

    `bounds` [documents] int64 has the offset of each document's first token, ascending from 0. Each document
    ends with the EOS that follows it. `reused` says that `tokenise` found these tokens and made none.
    """

    directory: Path
    meta: StoreMeta
    bounds: np.ndarray
    shards: tuple[np.ndarray, ...] = field(repr=False)
    reused: bool = False

    @classmethod
    def open(cls, directory: Path, *, reused: bool = False) -> TokenStore:
        """Opens what `tokenise` has written. DataError where it is absent, unfinished or cut short."""
        directory = Path(directory)
        meta = _read_meta(directory)
        if meta is None:
            raise DataError(
                f"{directory} holds no finished tokens ({_META} is missing or of another version)",
                hint="tokenise the data again",
            )
        counts = [min(meta.shard_tokens, meta.tokens - start) for start in range(0, meta.tokens, meta.shard_tokens)]
        try:
            shards = tuple(
                np.memmap(_shard_path(directory, i), dtype=meta.dtype, mode="r", shape=(count,))
                for i, count in enumerate(counts)
            )
            bounds = np.load(directory / _BOUNDS, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"the tokens in {directory} are damaged: {error}",
                hint="remove the directory and tokenise the data again",
            ) from error
        if len(bounds) != meta.documents:
            raise DataError(
                f"{directory} has bounds for {len(bounds):,} documents, {_META} says {meta.documents:,}",
                hint="remove the directory and tokenise the data again",
            )
        return cls(directory, meta, bounds, shards, reused)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start <= offset < stop, int64 [stop - start], across shards."""
        if not 0 <= start <= stop <= self.meta.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.meta.tokens}")
        size, parts = self.meta.shard_tokens, []
        while start < stop:
            shard, at = divmod(start, size)
            count = min(stop - start, size - at)
            parts.append(self.shards[shard][at : at + count].astype(np.int64))
            start += count
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides the tokens of a text: the fast tokenizer's state, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__}\0{state}".encode()).hexdigest()


def tokenise(
    documents: Iterable[Document],
    tokenizer: Any,
    directory: Path,
    *,
    eos_id: int,
    source_fingerprint: str = "",
    shard_tokens: int = 1 << 28,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Writes the tokens of `documents`, each followed by `eos_id`, to `directory`, and opens them.

    No BOS is added. Documents that have no tokens are passed over. Ids are uint16 where the vocabulary has at
    most 65,535 entries, else uint32. `source_fingerprint` (documents.fingerprint) names what is read: where
    `directory` holds finished tokens of the same fingerprint, tokenizer and EOS, nothing is read and the
    result has `reused` True; other tokens of ours are replaced. An empty fingerprint never matches.
    `progress(documents, tokens)` is called with the totals so far.

    The tokens are written beside `directory` and renamed when whole; `meta.json` is written last.
    Errors: InputError (no EOS in the vocabulary, a directory of something else), DataError (no document),
    EnvironmentFault (the disk).
    """
    directory = Path(directory)
    vocab = len(tokenizer)
    if not 0 <= eos_id < vocab:
        raise InputError(
            f"eos_id {eos_id} is outside the vocabulary of {vocab:,} tokens",
            hint="give the id of a token that ends a document",
        )
    if shard_tokens < 1:
        raise InputError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    key = (tokenizer_hash(tokenizer), source_fingerprint, eos_id)
    found = _read_meta(directory)
    if found and source_fingerprint and (found.tokenizer, found.source, found.eos_id) == key:
        return TokenStore.open(directory, reused=True)
    _refuse_foreign(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, documents, tokenizer, key, shard_tokens, progress)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    except OSError as error:
        raise EnvironmentFault(
            f"the tokens cannot be written to {directory}: {error.strerror or error}",
            hint="free some space, or give a directory on another disk",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenStore.open(directory)


def _write(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Any,
    key: tuple[str, str, int],
    shard_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills an empty directory; `key` is (tokenizer hash, source fingerprint, EOS)."""
    eos_id = key[2]
    dtype = "uint16" if len(tokenizer) <= 65_535 else "uint32"
    with _Writer(directory, dtype, shard_tokens) as writer:
        for ids, size in _encode(documents, tokenizer):
            writer.add([*ids, eos_id], size)
            if progress is not None:
                progress(len(writer.bounds), writer.tokens)
    if not writer.tokens:
        raise DataError("no document has a token", hint="give data that holds text")
    np.save(directory / _BOUNDS, np.frombuffer(writer.bounds, dtype=np.int64))
    meta = StoreMeta(*key, dtype, writer.tokens, len(writer.bounds), writer.text_bytes, shard_tokens)
    (directory / _META).write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")


def _refuse_foreign(directory: Path) -> None:
    """Only a directory with nothing but token files may be replaced."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; the tokens need a directory", hint="give another path")
    foreign = [path.name for path in directory.glob("*") if not _OURS.fullmatch(path.name)]
    if foreign:
        raise InputError(
            f"{directory} holds other files than tokens, such as {min(foreign)}", hint="give a directory of its own"
        )


class _Writer:
    """Appends to the shards in turn, each of exactly `shard_tokens` tokens but the last."""

    def __init__(self, directory: Path, dtype: str, shard_tokens: int):
        self.directory, self.dtype, self.shard_tokens = directory, dtype, shard_tokens
        self.bounds = array("q")
        self.tokens = self.text_bytes = 0
        self._file: Any = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, ids: list[int], text_bytes: int) -> None:
        self.bounds.append(self.tokens)
        self.text_bytes += text_bytes
        pending = np.asarray(ids, dtype=self.dtype)
        while len(pending):
            shard, at = divmod(self.tokens, self.shard_tokens)
            if at == 0:
                self.__exit__()
                self._file = _shard_path(self.directory, shard).open("wb")
            part, pending = np.split(pending, [self.shard_tokens - at])
            self._file.write(part.tobytes())
            self.tokens += len(part)


def _encode(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """(ids, UTF-8 bytes of the text) of each document that has any token."""
    for batch in _batches(documents):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for text, ids in zip(batch, encoded["input_ids"], strict=True):
            if ids:
                yield ids, len(text.encode())


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shard_path(directory: Path, index: int) -> Path:
    return directory / f"tokens-{index:05d}.bin"


def _read_meta(directory: Path) -> StoreMeta | None:
    """None where there are no finished tokens that this version can read."""
    try:
        meta = StoreMeta(**json.loads((directory / _META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return meta if meta.format == _FORMAT else None


class Packed(NamedTuple):
    """One sequence; all three int64 [T]."""

    tokens: torch.Tensor
    document_starts: torch.Tensor  # index within the sequence of the first token of t's document
    labels: torch.Tensor  # the token the model must predict at t, or -100


class PackedSequences:
    """The stream of documents, joined by EOS, as sequences of exactly `seq_len` tokens in a seeded order.

    Sequence i is made from i alone, in constant time and memory, for any i >= 0: resuming a run needs only
    the next index. Indices 0 .. len - 1 are one epoch, every sequence once; later ones are shuffled anew.
    The tokens after the last whole sequence (fewer than `seq_len`) are not used.

    `document_mask`: document_starts[t] tells the attention where t's document begins; 0 for one that began in
    an earlier sequence. The first token of a new document is then not predicted from the one before (label
    -100 at its EOS); EOS itself is predicted. False: documents are joined unmasked, all starts are 0 and
    every token but the first is predicted, the first of a document from the EOS before it.

    Raises DataError where the data is shorter than one sequence.
    """

    def __init__(self, store: TokenStore, seq_len: int, *, seed: int, document_mask: bool):
        if seq_len < 2:
            raise InputError(f"seq_len is {seq_len}; a sequence needs at least 2 tokens")
        if store.meta.tokens < seq_len:
            raise DataError(
                f"the data has {store.meta.tokens:,} tokens; one sequence needs {seq_len:,}",
                hint="give more text, or a shorter context",
            )
        self.store, self.seq_len, self.seed, self.document_mask = store, seq_len, seed, document_mask
        self._count = store.meta.tokens // seq_len

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self._count

    def offset(self, i: int) -> int:
        """Where sequence i begins in the stream, in tokens."""
        epoch, place = divmod(i, self._count)
        return _permuted(place, self._count, self.seed, epoch) * self.seq_len

    def sequence(self, i: int) -> Packed:
        """Sequence i of the endless stream of epochs. Raises IndexError for i < 0."""
        if i < 0:
            raise IndexError(f"sequence {i}")
        first = self.offset(i)
        tokens = torch.from_numpy(self.store.read(first, first + self.seq_len))
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:-1] = tokens[1:]
        starts = np.zeros(self.seq_len, dtype=np.int64)
        if self.document_mask:
            bounds = self.store.bounds
            low, high = np.searchsorted(bounds, [first + 1, first + self.seq_len])
            inner = np.asarray(bounds[low:high]) - first  # documents that begin after the first token
            starts[inner] = inner
            np.maximum.accumulate(starts, out=starts)
            labels[inner - 1] = NO_LABEL
        return Packed(tokens, torch.from_numpy(starts), labels)


def attended_share(store: TokenStore, seq_len: int) -> float:
    """The share of tokens with at least seq_len / 2 earlier tokens of their own document in their sequence.

    Documents longer than many sequences give 0.5, the best there is; near 0 the documents are so short that
    training at `seq_len` with a document mask teaches next to nothing about distance.
    """
    used = store.meta.tokens // seq_len * seq_len
    if not used:
        return 0.0
    edges = np.union1d(np.asarray(store.bounds), np.arange(0, used, seq_len))
    pieces = np.diff(edges[edges < used], append=used)
    return float(np.maximum(pieces - (seq_len + 1) // 2, 0).sum() / used)


def _permuted(place: int, count: int, seed: int, epoch: int) -> int:
    """Where `place` goes in a permutation of range(count) that is never written down.

    A Feistel network over the next even power of two, walked until it lands inside the range (Black & Rogaway
    2002, Ciphers with Arbitrary Finite Domains): fewer than 4 steps on average. Not for secrets.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(6):
            key = hashlib.blake2b(f"{seed}/{epoch}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(key) & mask)
        place = left << half | right
        if place < count:
            return place
