"""The GPU cards that are known, with the values of their data sheets. No torch.

NVIDIA's data sheets; for the 4090, the Ada whitepaper. Planning derives times from these values (planning/cards.py),
and training the model FLOPs utilisation (train/metrics.py).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ctxext.errors import InputError
from ctxext.machine.gpu import first_gpu

MIB, GB, TERA = 1024**2, 1e9, 1e12
REFERENCE = "a100-80"  # its rates are used if only a memory size is given


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card according to its data sheet.

    memory     bytes, as nvidia-smi reports them
    peak       dense bf16 FLOP/s, accumulated in fp32
    single     fp32 FLOP/s, without tensor cores
    bandwidth  of its memory, bytes/s
    pcie, link  to the host and to other cards, bytes/s in one direction
    device     its name, as nvidia-smi and torch give it
    hopper     True: kernels written for Hopper run on it
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
                 single=67 * TERA, device="NVIDIA H200", hopper=True),
    "h100": Card(memory=81_559 * MIB, peak=989 * TERA, bandwidth=3350 * GB, pcie=64 * GB, link=450 * GB,
                 single=67 * TERA, device="NVIDIA H100 80GB HBM3", hopper=True),
    "h100-pcie": Card(memory=81_559 * MIB, peak=756 * TERA, bandwidth=2000 * GB, pcie=64 * GB, link=64 * GB,
                      single=51 * TERA, device="NVIDIA H100 PCIe", hopper=True),
    "a100-80": Card(memory=81_920 * MIB, peak=312 * TERA, bandwidth=2039 * GB, pcie=32 * GB, link=300 * GB,
                    single=19.5 * TERA, device="NVIDIA A100-SXM4-80GB"),
    "a100-80-pcie": Card(memory=81_920 * MIB, peak=312 * TERA, bandwidth=1935 * GB, pcie=32 * GB, link=32 * GB,
                         single=19.5 * TERA, device="NVIDIA A100 80GB PCIe"),
    "a100-40": Card(memory=40_960 * MIB, peak=312 * TERA, bandwidth=1555 * GB, pcie=32 * GB, link=300 * GB,
                    single=19.5 * TERA, device="NVIDIA A100-SXM4-40GB"),
    "a100-40-pcie": Card(memory=40_960 * MIB, peak=312 * TERA, bandwidth=1555 * GB, pcie=32 * GB, link=32 * GB,
                         single=19.5 * TERA, device="NVIDIA A100-PCIE-40GB"),
    "l40s": Card(memory=46_068 * MIB, peak=362 * TERA, bandwidth=864 * GB, pcie=32 * GB, link=32 * GB,
                 single=91.6 * TERA, device="NVIDIA L40S"),
    "a6000": Card(memory=49_140 * MIB, peak=155 * TERA, bandwidth=768 * GB, pcie=32 * GB, link=32 * GB,
                  single=38.7 * TERA, device="NVIDIA RTX A6000"),
    "4090": Card(memory=24_564 * MIB, peak=165 * TERA, bandwidth=1008 * GB, pcie=32 * GB, link=32 * GB,
                 single=82.6 * TERA, device="NVIDIA GeForce RTX 4090"),
    "3090": Card(memory=24_576 * MIB, peak=71 * TERA, bandwidth=936 * GB, pcie=32 * GB, link=32 * GB,
                 single=35.6 * TERA, device="NVIDIA GeForce RTX 3090"),
}  # fmt: skip
SIZES = {"24gb": "3090", "40gb": "a100-40", "48gb": "a6000", "80gb": "a100-80"}  # the usual card of that size


def find_card(name: str) -> tuple[str, Card]:
    """Returns a card by name or memory size. Raises InputError that lists all of them."""
    known = SIZES.get(name.lower(), name.lower())
    if known not in CARDS:
        close = difflib.get_close_matches(known, [*CARDS, *SIZES], n=2)
        raise InputError(
            f"--gpu {name}: unknown GPU; allowed are {', '.join(CARDS)}, by size {', '.join(SIZES)}, and this",
            hint=f"did you mean {' or '.join(close)}?" if close else "for another GPU give --memory, such as 80G",
        )
    return known, CARDS[known]


def card_named(device: str) -> str | None:
    """Returns the card of this device; None for another device, such as a part of a card (MIG) or a variant."""
    return next((name for name, card in CARDS.items() if card.device == device), None)


def card_here() -> tuple[str | None, int] | None:
    """Returns (card, bytes) of the first GPU that torch will see; None without a GPU.

    The card is None if it is not in CARDS.
    """
    found = first_gpu()
    if found is None:
        return None
    device, memory = found
    return card_named(device), memory * MIB
