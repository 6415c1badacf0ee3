"""Sequences of several sources in fixed proportions: the index i alone decides which source sequence i comes from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ctxext.data.packing import Packed, PackedSequences
from ctxext.data.store import StoreMeta
from ctxext.errors import InputError

CYCLE = 1000  # sequences after which the pattern of sources repeats: weights count in thousandths


@dataclass(frozen=True)
class Stores:
    """The stores of a mixture as one store: counts are summed, `source` is a hash of all sources and proportions."""

    meta: StoreMeta


class Mixture:
    """Sequences of several `parts`, in a repeating cycle with `slots` sequences per part; used like PackedSequences.

    Sequence i depends on i alone and takes constant time. Slot i of the cycle belongs to a part, and the sequence is
    that part's next one; its number is the count of earlier slots of the part. The slots of a part are spaced evenly in
    the cycle, at a seeded phase, so that any stretch of a run has the proportions of the whole to within about one
    sequence per part.
    """

    def __init__(self, parts: Sequence[PackedSequences], slots: Sequence[int], *, seed: int):
        if not parts or len(parts) != len(slots) or min(slots) < 1:
            raise InputError(f"{len(parts)} parts with {list(slots)} slots: each part needs one or more")
        if len({part.seq_len for part in parts}) > 1:
            raise InputError(f"parts of different lengths: {[part.seq_len for part in parts]} tokens")
        self.parts, self.slots, self.seq_len = tuple(parts), tuple(slots), parts[0].seq_len
        # Slot k of a part with `count` slots is at position (k + phase) / count of the cycle; sort all slots by
        # position.
        phases = [random.Random(f"{seed}/{number}").random() for number in range(len(parts))]
        order = sorted(
            ((k + phases[number]) / count, number, k) for number, count in enumerate(slots) for k in range(count)
        )
        self._order = [(number, k) for _, number, k in order]

    def __len__(self) -> int:
        """Returns the number of sequences in one cycle."""
        return len(self._order)

    def place(self, i: int) -> tuple[int, int]:
        """Returns (the part that sequence i comes from, its number there). Raises IndexError for i < 0."""
        if i < 0:
            raise IndexError(f"sequence {i}")
        cycle, slot = divmod(i, len(self._order))
        number, k = self._order[slot]
        return number, cycle * self.slots[number] + k

    def sequence(self, i: int) -> Packed:
        """Returns sequence i of the endless stream. Raises IndexError for i < 0."""
        number, index = self.place(i)
        return self.parts[number].sequence(index)

    @property
    def store(self) -> Stores:
        """The metadata of all parts combined. `scored` None counts as all tokens."""
        metas = [part.store.meta for part in self.parts]
        # Other proportions are other data, so the hash includes the slots.
        named = " ".join(f"{count}:{meta.source}" for count, meta in zip(self.slots, metas, strict=True))
        return Stores(
            replace(
                metas[0],
                source=hashlib.sha256(named.encode()).hexdigest(),
                tokens=sum(meta.tokens for meta in metas),
                documents=sum(meta.documents for meta in metas),
                text_bytes=sum(meta.text_bytes for meta in metas),
                scored=sum(meta.tokens if meta.scored is None else meta.scored for meta in metas),
                left_out=sum(meta.left_out for meta in metas),
                max_id=max(meta.max_id for meta in metas),
                reading={},
            )
        )


Sequences = PackedSequences | Mixture


def apportion(total: int, weights: Sequence[float], *, least: int = 0) -> list[int]:
    """Returns whole numbers that add up to `total`, in proportion to `weights` (largest remainder), none below `least`.

    If `total` is too small for `least` each, no error is raised: the plain proportional numbers are returned.
    """
    # Fractions keep the shares exact, so that rounding does not depend on the platform.
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    # Move single units from the largest number to those below `least`.
    while total >= least * len(counts) and min(counts) < least:
        counts[counts.index(min(counts))] += 1
        counts[counts.index(max(counts))] -= 1
    return counts


def slots_of(weights: Sequence[float]) -> list[int]:
    """Returns the slots of parts with these weights in a cycle of CYCLE. InputError if one rounds to zero."""
    slots = apportion(CYCLE, weights)
    if 0 in slots:
        raise InputError(
            f"weight {weights[slots.index(0)]} of {sum(weights)} is less than a sequence in {CYCLE}",
            hint="raise the weight, or leave the part out",
        )
    return slots
