"""The rates of GPU cards: shares of the values of their data sheets (machine/cards.py), and rates measured here.

    share of the bf16 peak                linear    attention forward    backward
    an H200, kernels written for Hopper    0.71           0.63             0.55      cuDNN, FlashAttention-3
    an H200, FlashAttention-2              0.71           0.37             0.32      torch's varlen kernel
    other cards                            0.71           0.63             0.55

The shares are 700, 620, 540 and 370, 320 TFLOP/s at a peak of 989. Everything else is arithmetic: the peak of another
card times these shares is not measured here. The assumption that cards before Hopper reach with FlashAttention-2 the
shares that Hopper reaches with its own kernels follows arXiv 2307.08691, which reports up to 73% of an A100's peak
forward and 63% backward. Adapters compute in fp32, for which torch does not use the tensor cores: their share is that
of matrices, of the plain fp32 peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ctxext.machine.cards import CARDS, TERA

LINEAR, OWN_KERNELS, FLASH2 = 700 / 989, (620 / 989, 540 / 989), (370 / 989, 320 / 989)
STREAM = 0.8  # share of a card's memory bandwidth that an elementwise kernel reaches: an assumption
HOST, LINK = 0.8, 0.7  # share of the rates of PCIe and of the link between cards, in one direction: assumptions
HOST_MEMORY = 50e9  # bytes/s that an optimizer on the host reads and writes, per card: an assumption


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates of a device in FLOP/s and bytes/s. Bytes are those read and those written together.

    linear       by the width of a square matrix, ascending: narrow ones are slower
    adapters     the same in fp32
    attention    by kind (full, s2, sliding): forward and backward
    stream       elementwise operations, and the optimizer on the device
    host         between the card and its host, in one direction
    link         to other cards, in one direction
    host_memory  read and written by an optimizer on the host, per card
    source       where the rates come from, in words
    measured     True: measured on this machine; False: arithmetic
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
        """Returns the rate of matrices of this width, interpolated linearly; outside the known widths the nearest."""
        known = self.linear if name == "linear" else self.adapters
        below, above = known[0], known[-1]
        # `below` is the widest known matrix that is not wider, `above` the narrowest that is not narrower.
        for one in known:
            below = one if one[0] <= width else below
        for one in reversed(known):
            above = one if one[0] >= width else above
        if below[0] == above[0] or width <= below[0]:
            return below[1]
        share = (min(width, above[0]) - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    def times(self, name: str, factor: float) -> Rates:
        """Returns these rates with one of them (`linear`, `attention` or another) multiplied by `factor`."""
        if name in ("linear", "adapters"):
            return replace(self, **{name: tuple((width, rate * factor) for width, rate in getattr(self, name))})
        if name == "attention":
            faster = {kind: (forward * factor, back * factor) for kind, (forward, back) in self.attention.items()}
            return replace(self, attention=faster)
        return replace(self, **{name: getattr(self, name) * factor})


def card_rates(name: str, *, packed: bool) -> Rates:
    """Returns a card's rates.

    `packed`: rows hold several documents, for which the varlen kernel is used; sliding layers always use it.
    """
    card = CARDS[name]
    # The varlen kernel is FlashAttention-2, which is slow on Hopper alone.
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
        source=f"{name}: arithmetic, matrices at 71% of its peak of {card.peak / TERA:.0f} TFLOP/s, attention at {of}",
        measured=False,
    )
