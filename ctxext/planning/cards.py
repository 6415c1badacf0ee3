"""Cards and their rates: what data sheets state, what an H200 achieved of it, and what this machine was measured at.

    share of the bf16 peak                linear    attention forward    backward
    an H200, kernels written for Hopper    0.71           0.63             0.55      cuDNN, FlashAttention-3
    an H200, FlashAttention-2              0.71           0.37             0.32      torch's varlen kernel
    other cards                            0.71           0.63             0.55

The shares are those of 700, 620, 540 and 370, 320 TFLOP/s at a peak of 989. Everything else is arithmetic: a card's own
peak times these shares was not measured here. That cards before Hopper reach with FlashAttention-2 what Hopper reaches
with kernels of its own follows arXiv 2307.08691, which reports up to 73% of an A100's peak forward and 63% backward.
Adapters compute in fp32, which torch keeps off the tensor cores: the share of matrices, of the plain fp32 peak.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from ctxext.errors import InputError
from ctxext.machine.gpu import first_gpu

LINEAR, OWN_KERNELS, FLASH2 = 700 / 989, (620 / 989, 540 / 989), (370 / 989, 320 / 989)
STREAM = 0.8  # of a card's memory bandwidth that an elementwise kernel reaches: an assumption
HOST, LINK = 0.8, 0.7  # of PCIe's and of the cards' own link's rate in one direction: assumptions
HOST_MEMORY = 50e9  # bytes/s that an optimizer on the host reads and writes for each card: an assumption
MIB, GB, TERA = 1024**2, 1e9, 1e12
REFERENCE = "a100-80"  # its rates stand in where a memory alone is given


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card by its data sheet.

    memory     bytes, as nvidia-smi reports them
    peak       dense bf16 FLOP/s, accumulated in fp32; `single` those of fp32, without tensor cores
    bandwidth  of its memory, bytes/s; `pcie` and `link` (to other cards) in one direction
    device     the part of nvidia-smi's name that tells it
    """

    memory: int
    peak: float
    single: float
    bandwidth: float
    pcie: float
    link: float
    device: str = "-"
    hopper: bool = False


CARDS = {
    "h200": Card(memory=143_771 * MIB, peak=989 * TERA, bandwidth=4800 * GB, pcie=64 * GB, link=450 * GB,
                 single=67 * TERA, device="H200", hopper=True),
    "h100": Card(memory=81_559 * MIB, peak=989 * TERA, bandwidth=3350 * GB, pcie=64 * GB, link=450 * GB,
                 single=67 * TERA, device="H100 80GB HBM3", hopper=True),
    "h100-pcie": Card(memory=81_559 * MIB, peak=756 * TERA, bandwidth=2000 * GB, pcie=64 * GB, link=64 * GB,
                      single=51 * TERA, device="H100 PCIe", hopper=True),
    "a100-80": Card(memory=81_920 * MIB, peak=312 * TERA, bandwidth=2039 * GB, pcie=32 * GB, link=300 * GB,
                    single=19.5 * TERA, device="A100-SXM4-80GB"),
    "a100-40": Card(memory=40_960 * MIB, peak=312 * TERA, bandwidth=1555 * GB, pcie=32 * GB, link=300 * GB,
                    single=19.5 * TERA, device="A100-SXM4-40GB"),
    "l40s": Card(memory=46_068 * MIB, peak=362 * TERA, bandwidth=864 * GB, pcie=32 * GB, link=32 * GB,
                 single=91.6 * TERA, device="L40S"),
    "a6000": Card(memory=49_140 * MIB, peak=155 * TERA, bandwidth=768 * GB, pcie=32 * GB, link=32 * GB,
                  single=38.7 * TERA, device="RTX A6000"),
    "4090": Card(memory=24_564 * MIB, peak=165 * TERA, bandwidth=1008 * GB, pcie=32 * GB, link=32 * GB,
                 single=82.6 * TERA, device="RTX 4090"),
    "3090": Card(memory=24_576 * MIB, peak=71 * TERA, bandwidth=936 * GB, pcie=32 * GB, link=32 * GB,
                 single=35.6 * TERA, device="RTX 3090"),
}  # fmt: skip
SIZES = {"24gb": "3090", "40gb": "a100-40", "48gb": "a6000", "80gb": "a100-80"}  # the slowest of that size here


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second. FLOP/s and bytes/s; bytes are those read and written together.

    linear     by the width of a square matrix, ascending: narrow ones are slower; `adapters` the same in fp32
    attention  by kind (full, s2, sliding): forward and backward
    stream     elementwise operations; `optimizer` where it runs; `host` between the card and its host, one direction
    link       to other cards, one direction
    host_memory  read and written by an optimizer on the host, for each card
    source     where they come from, in words; `measured` on this machine, or arithmetic
    """

    linear: tuple[tuple[int, float], ...]
    adapters: tuple[tuple[int, float], ...]
    attention: dict[str, tuple[float, float]]
    stream: float
    host: float
    link: float
    source: str
    measured: bool
    host_memory: float = HOST_MEMORY

    def linear_at(self, width: float, name: Literal["linear", "adapters"] = "linear") -> float:
        """The rate of matrices `width` wide, between two that are known in proportion; beyond them the nearest."""
        known = self.linear if name == "linear" else self.adapters
        below, above = known[0], known[-1]
        for one in known:
            below = one if one[0] <= width else below
        for one in reversed(known):
            above = one if one[0] >= width else above
        if below[0] == above[0] or width <= below[0]:
            return below[1]
        share = (min(width, above[0]) - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    def times(self, name: str, factor: float) -> Rates:
        """These with one of them `factor` times as fast: `linear`, `attention` or one of the others."""
        if name in ("linear", "adapters"):
            return replace(self, **{name: tuple((width, rate * factor) for width, rate in getattr(self, name))})
        if name == "attention":
            faster = {kind: (forward * factor, back * factor) for kind, (forward, back) in self.attention.items()}
            return replace(self, attention=faster)
        return replace(self, **{name: getattr(self, name) * factor})


def find_card(name: str) -> tuple[str, Card]:
    """A card by name or size. Raises InputError with all of them."""
    known = SIZES.get(name.lower(), name.lower())
    if known not in CARDS:
        close = difflib.get_close_matches(known, [*CARDS, *SIZES], n=2)
        raise InputError(
            f"--gpu {name}: no such card; known are {', '.join(CARDS)}, by size {', '.join(SIZES)}, and this",
            hint=f"did you mean {' or '.join(close)}?" if close else "give --memory, such as 80G, for another one",
        )
    return known, CARDS[known]


def card_rates(name: str, *, packed: bool) -> Rates:
    """A card's rates. `packed`: rows hold documents, which go through varlen; sliding layers always do."""
    card = CARDS[name]
    flash2 = FLASH2 if card.hopper else OWN_KERNELS
    kinds = {"full": flash2 if packed else OWN_KERNELS, "s2": flash2 if packed else OWN_KERNELS, "sliding": flash2}
    of = "a third" if packed and card.hopper else "more than half"
    return Rates(
        linear=((4096, card.peak * LINEAR),),
        adapters=((4096, card.single * LINEAR),),
        attention={kind: (card.peak * forward, card.peak * back) for kind, (forward, back) in kinds.items()},
        stream=card.bandwidth * STREAM,
        host=card.pcie * HOST,
        link=card.link * LINK,
        source=f"{name}: of its peak, {card.peak / TERA:.0f} TFLOP/s, matrices at 71%, attention at {of}: arithmetic",
        measured=False,
    )


def card_here() -> tuple[str | None, int] | None:
    """(card, bytes) of the first GPU that torch will see: None and 0 for what is not known. None without a GPU."""
    found = first_gpu()
    if found is None:
        return None
    device, memory = found
    return next((name for name, card in CARDS.items() if card.device in device), None), memory * MIB
