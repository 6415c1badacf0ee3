"""Cuts sequences of one exact length from the tokens on disk (data/store.py).

T is the length of a sequence in tokens. Offsets are tokens from the beginning of the whole stream.
"""

from __future__ import annotations

import copy
import hashlib
from typing import NamedTuple

import numpy as np
import torch

from ctxext.data.store import TokenStore
from ctxext.errors import DataError, InputError

NO_LABEL = -100  # torch's ignore_index
_SCAN = 1 << 22  # tokens examined at once in the search for sequences without a label


class Packed(NamedTuple):
    """One sequence; all three are int64 [T]."""

    tokens: torch.Tensor
    document_starts: torch.Tensor  # index within the sequence of the first token of t's document
    labels: torch.Tensor  # the token the model must predict at t, or -100


class PackedSequences:
    """The stream of documents, joined by EOS, as sequences of exactly `seq_len` tokens in a seeded order.

    Sequence i depends on i alone and takes constant time and memory, for any i >= 0: resuming a run needs only the next
    index. Indices 0 .. len - 1 are one epoch, every sequence once; each later epoch has a new order. The tokens after
    the last whole sequence (fewer than `seq_len`) are not used. If only answers are scored, the `without_answer`
    sequences that have none are not used either: a step made only of such sequences would have nothing to learn.

    `document_mask` True: document_starts[t] is where t's document begins, for the attention; 0 for a document that
    began in an earlier sequence. The first token of a new document is then not predicted from the one before (label
    -100 at its EOS); EOS itself is predicted. False: documents are joined unmasked, all starts are 0 and every token
    but the first is predicted, the first of a document from the EOS before it. Tokens that the store does not score are
    never predicted.

    Raises DataError if the data is shorter than one sequence, or if no sequence has an answer.
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
        # With answers, `_kept` has the numbers of the usable sequences; without, all are usable.
        whole = store.meta.tokens // seq_len
        self._kept = None if store.scored is None else self._with_answer(whole)
        self._first, self._count = 0, whole if self._kept is None else len(self._kept)
        self.without_answer = whole - self._count
        if not self._count:
            raise DataError(
                f"none of the {whole:,} sequences of {seq_len:,} tokens has a token of an answer",
                hint="give rows with answers, or a longer context",
            )

    def part(self, first: int, count: int) -> PackedSequences:
        """Returns only these sequences, in the order of the stream, so that some can be held out."""
        if first < 0 or count < 1 or first + count > self._count:
            raise InputError(f"sequences {first} to {first + count} of a stream that has {self._count}")
        part = copy.copy(self)
        part._first, part._count = self._first + first, count
        return part

    def __len__(self) -> int:
        """Returns the number of sequences in one epoch."""
        return self._count

    def offset(self, i: int) -> int:
        """Returns where sequence i begins in the stream, in tokens."""
        epoch, place = divmod(i, self._count)
        number = self._first + _permuted(place, self._count, self.seed, epoch)
        return (number if self._kept is None else int(self._kept[number])) * self.seq_len

    def sequence(self, i: int) -> Packed:
        """Returns sequence i of the endless stream of epochs. Raises IndexError for i < 0."""
        if i < 0:
            raise IndexError(f"sequence {i}")
        first = self.offset(i)
        stop = first + self.seq_len
        tokens = torch.from_numpy(self.store.read(first, stop))
        # The label at t is the token at t + 1; the last position has no next token.
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:-1] = tokens[1:]
        starts = np.zeros(self.seq_len, dtype=np.int64)
        if self.store.scored is not None:
            labels[:-1][torch.from_numpy(~self.store.read_scored(first + 1, stop))] = NO_LABEL
        if self.document_mask:
            inner = self._bounds(first + 1, stop) - first  # documents that begin after the first token
            # Write each start at its own position, then carry it forward over the document.
            starts[inner] = inner
            np.maximum.accumulate(starts, out=starts)
            labels[inner - 1] = NO_LABEL
        return Packed(tokens, torch.from_numpy(starts), labels)

    def _bounds(self, start: int, stop: int) -> np.ndarray:
        """Returns the offsets in start <= offset < stop at which documents begin."""
        low, high = np.searchsorted(self.store.bounds, [start, stop])
        return np.asarray(self.store.bounds[low:high])

    def _with_answer(self, whole: int) -> np.ndarray:
        """Returns the numbers of the sequences that have a label, ascending, int64."""
        T, found = self.seq_len, []
        step = max(1, _SCAN // T)
        for number in range(0, whole, step):
            start, stop = number * T, min(number + step, whole) * T
            scored = self.store.read_scored(start, stop)
            # These positions lose their label in `sequence`: the first token of a document, and the first of a sequence
            # (`1:`).
            if self.document_mask:
                scored[self._bounds(start, stop) - start] = False
            found.append(number + np.flatnonzero(scored.reshape(-1, T)[:, 1:].any(axis=1)))
        return np.concatenate(found)


def attended_share(store: TokenStore, seq_len: int) -> float:
    """Returns the share of tokens with at least seq_len / 2 earlier tokens of their own document in their sequence.

    Documents longer than many sequences give 0.5, the maximum. Near 0 the documents are so short that training at
    `seq_len` with a document mask teaches almost nothing about distance.
    """
    used = store.meta.tokens // seq_len * seq_len
    if not used:
        return 0.0
    # Cut the stream at documents and at sequences. A piece of n tokens has n - ceil(seq_len / 2) such tokens, or none.
    edges = np.union1d(np.asarray(store.bounds), np.arange(0, used, seq_len))
    pieces = np.diff(edges[edges < used], append=used)
    return float(np.maximum(pieces - (seq_len + 1) // 2, 0).sum() / used)


def _permuted(place: int, count: int, seed: int, epoch: int) -> int:
    """Returns where `place` goes in a permutation of range(count) that is never stored.

    It is a Feistel network over the next even power of two, repeated until the result is inside the range (Black &
    Rogaway 2002, Ciphers with Arbitrary Finite Domains): fewer than 4 steps on average. Not for cryptography.
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
