"""Chooses which layers stay full: the budget, and a search that measures layouts instead of adding up single damages.

A choice is the ascending tuple of its full layers. A callback measures the cost of choices, many at a time, so that
layouts can be measured together (damage.py) and the search can run without a model. No torch.

If there are few layouts, all are measured. Otherwise full layers are added one by one to the all-sliding layout. The
first estimate of a layer's gain is the damage of its window minus the damage of its full kind, each measured in the
source. The BREADTH layers with the largest estimates are measured together with the layers already chosen, so that
interactions count, and the best is added. Measured gains replace the estimates. All other estimates are scaled by
measured over estimated gain, since damages do not add up. At the end layers are swapped: those with the smallest loss
when removed for those with the largest estimates. The search is greedy and does not guarantee an optimum. The fixed
patterns are also measured, so that the choice is never worse than they are on the measured text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.errors import InputError
from ctxext.model.layout import HybridSpec, LayerKind
from ctxext.ops.cost import ModelShape, kv_cache_bytes
from ctxext.units import format_tokens, parse_tokens

Full = tuple[int, ...]
Measure = Callable[[Sequence[Full]], list[float]]

EXHAUSTIVE = 64  # up to this many layouts, all are measured
BREADTH = 4  # candidates measured for each added full layer
SWAPPED = 3  # layers that may leave, and layers that may replace them, in one round of swaps
SWAP_ROUNDS = 2
FIXED = ("SN", "NS", "SSSN")  # fixed patterns for comparison; N means the layout's full letter
ROW_TOKENS = 2048  # of a calibration row, at least; more for a large window
CALIBRATION_TOKENS = 8192


@dataclass(frozen=True)
class Request:
    """The checked options of the planner. Lengths are tokens.

    full         how many layers stay full
    length       at which the KV cache and FLOPs are counted
    calibration  text to measure on, as for read_documents; of the embedded corpus the training part
    tokens       of text in total, in rows of `row_tokens`
    method       auto: layouts are measured and searched; retrieval: the layers with the strongest retrieval heads
    """

    full: int
    length: int
    calibration: str
    tokens: int
    row_tokens: int
    method: str = "auto"


@dataclass(frozen=True)
class LayerSearch:
    """All measured choices with their scores (lower is better). `best` has the requested number of full layers."""

    best: Full
    measured: dict[Full, float]
    exhaustive: bool


def request_of(
    shape: ModelShape,
    source: Sequence[LayerKind],
    hybrid: HybridSpec,
    usable_length: int,
    method: Any,
    requested: Mapping[str, Any],
) -> Request | None:
    """Checks the planner's options as the user gave them (`requested`). None without the planner (`method` None).

    Raises InputError for an option of the planner without the planner.
    """
    if method is None:
        if requested:
            option = next(iter(requested)).replace("_", "-")
            raise InputError(f"--{option} needs --full-layers auto or retrieval", hint="add --full-layers auto")
        return None
    length, tokens = (
        None if name not in requested else parse_tokens(requested[name]) for name in ("length", "calibration_tokens")
    )
    budget = requested.get("budget")
    return plan_request(
        shape,
        source,
        hybrid,
        usable_length,
        budget=None if budget is None else str(budget),
        length=length,
        calibration=requested.get("calibration"),
        tokens=tokens,
        i_know=bool(requested.get("i_know")),
        method=method,
    )


def plan_request(
    shape: ModelShape,
    source: Sequence[LayerKind],
    hybrid: HybridSpec,
    usable_length: int,
    *,
    budget: str | None,
    length: int | None,
    calibration: str | None,
    tokens: int | None,
    i_know: bool,
    method: str = "auto",
) -> Request:
    """Checks the options against the model. Raises InputError for impossible ones.

    A layout without S, or with two kinds of full layers, is also refused.
    """
    # Raises for a layout without S or with two kinds of full layers.
    _ = hybrid.full_letter
    window = hybrid.sliding_window or 0
    at = usable_length if length is None else length
    if at < 1:
        raise InputError(f"--length {at}: allowed is 1 token or more")
    # A row must be longer than the window; otherwise the window hides nothing.
    row = min(usable_length, max(ROW_TOKENS, 2 * window))
    if row <= window:
        raise InputError(
            f"a window of {format_tokens(window)} tokens covers all of the {format_tokens(usable_length)} that this "
            "model supports: windows change nothing, so that no layer can be chosen",
            hint="give a smaller --sliding-window",
        )
    count = CALIBRATION_TOKENS if tokens is None else tokens
    if count < row and tokens is not None:
        raise InputError(
            f"--calibration-tokens {format_tokens(count)}: allowed is one row or more, here {format_tokens(row)}"
        )
    read_documents(calibration or EMBEDDED)  # raises if there is no such source; reads nothing yet
    full = full_layer_count(budget, shape, source, window, at)
    if full == 0 and not i_know:
        raise InputError(
            "a budget of 0 full layers: the model could retrieve nothing further back than the window",
            hint="give --budget 1 or more, or add --i-know if this is intended",
        )
    if full == 0 and method != "auto":
        raise InputError(f"--full-layers {method}: a budget of 0 full layers leaves nothing to choose")
    return Request(full, at, calibration or EMBEDDED, max(count, row), row, method)


def full_layer_count(
    budget: str | None, shape: ModelShape, source: Sequence[LayerKind], window: int, length: int
) -> int:
    """Returns how many layers a budget leaves full.

    The budget is a number of layers, a share of the source's KV cache at `length` tokens such as 25%, or None: every
    second layer, as in 1:1 alternation. Raises InputError.
    """
    L = shape.num_layers
    if budget is None:
        return L // 2
    text = budget.strip()
    number = text.removesuffix("%")
    try:
        value = float(number) if text.endswith("%") else int(number)
    except ValueError:
        raise InputError(
            f"--budget {budget!r}: allowed are a number of full layers such as 4, or a share of the source's KV cache "
            "such as 25%"
        ) from None
    if not text.endswith("%"):
        if not 0 <= value < L:
            raise InputError(f"--budget {budget}: this model has {L} layers, so 0 to {L - 1} of them can stay full")
        return int(value)
    if not 0 < value <= 100:
        raise InputError(f"--budget {budget}: allowed are shares above 0%, up to 100%")
    whole = kv_cache_bytes(shape, [kind.sliding_window for kind in source], length)
    # The KV cache with k full layers, for each k; the largest k within the budget is taken.
    sizes = [kv_cache_bytes(shape, [None] * k + [window] * (L - k), length) for k in range(L)]
    if sizes[0] > value / 100 * whole:
        raise InputError(
            f"--budget {budget}: sliding layers alone hold {100 * sizes[0] / whole:.3g}% of the source's KV cache at "
            f"{format_tokens(length)} tokens",
            hint="give a larger budget, a smaller --sliding-window, or the intended --length",
        )
    return max(k for k, size in enumerate(sizes) if size <= value / 100 * whole)


def fixed_choices(L: int, k: int) -> dict[str, Full]:
    """Returns the patterns for comparison by name: FIXED tiled over the layers, and k layers evenly spread."""
    named = {pattern: tuple(i for i in range(L) if pattern[i % len(pattern)] == "N") for pattern in FIXED}
    if k:
        named["even, last"] = tuple(-(-(i + 1) * L // k) - 1 for i in range(k))
        named["even, first"] = tuple(i * L // k for i in range(k))
    return named


def search(L: int, k: int, gains: Sequence[float], measure: Measure) -> LayerSearch:
    """Returns the best choice of k of L layers that the search finds (see the top of this file).

    `gains` [L] is the estimated gain of keeping each layer full. `measure` returns the score of each choice in its
    argument.
    """
    measured: dict[Full, float] = {}

    def look(choices: Iterable[Full]) -> None:
        new = [choice for choice in dict.fromkeys(choices) if choice not in measured]
        if new:
            measured.update(zip(new, measure(new), strict=True))

    # With up to EXHAUSTIVE subsets all sizes are measured, otherwise only those up to k layers.
    sizes = range(L + 1) if 2**L <= EXHAUSTIVE else range(k + 1)
    exhaustive = sum(comb(L, size) for size in sizes) <= EXHAUSTIVE
    fixed = fixed_choices(L, k).values()
    if exhaustive:
        look([*(choice for size in sizes for choice in combinations(range(L), size)), *fixed])
    else:
        look([(), *fixed])
        believed = _add_one_by_one(L, k, gains, measured, look)
        _swap(L, k, believed, measured, look)
    return LayerSearch(_best(measured, k), measured, exhaustive)


def strongest(L: int, k: int, scores: Sequence[float], measure: Measure) -> LayerSearch:
    """Returns the k of L layers with the largest `scores` [L], measured with the fixed patterns of k full layers."""
    best = tuple(sorted(sorted(range(L), key=lambda i: (-scores[i], i))[:k]))
    choices = list(dict.fromkeys([best, *(choice for choice in fixed_choices(L, k).values() if len(choice) == k)]))
    return LayerSearch(best, dict(zip(choices, measure(choices), strict=True)), exhaustive=False)


def _best(measured: dict[Full, float], k: int) -> Full:
    return min((choice for choice in measured if len(choice) == k), key=lambda choice: (measured[choice], choice))


def _with(choice: Full, layer: int) -> Full:
    return tuple(sorted((*choice, layer)))


def _without(choice: Full, layer: int) -> Full:
    return tuple(i for i in choice if i != layer)


def _add_one_by_one(
    L: int, k: int, gains: Sequence[float], measured: dict[Full, float], look: Callable[[Iterable[Full]], None]
) -> list[float]:
    """Measures a path from no full layer to k of them. Returns each layer's estimated gain at its end."""
    believed, chosen = list(gains), Full()
    for _ in range(k):
        # Try the BREADTH layers with the largest estimated gains.
        left = sorted((i for i in range(L) if i not in chosen), key=lambda i: -believed[i])
        tried, rest = left[:BREADTH], left[BREADTH:]
        look(_with(chosen, i) for i in tried)
        found = {i: measured[chosen] - measured[_with(chosen, i)] for i in tried}
        # Scale the estimates of the other layers by measured over estimated gain.
        meant, got = sum(believed[i] for i in tried), sum(found.values())
        if meant > 0 and got > 0:
            for i in rest:
                believed[i] *= got / meant
        for i, gain in found.items():
            believed[i] = gain
        chosen = _with(chosen, min(tried, key=lambda i: measured[_with(chosen, i)]))
    return believed


def _swap(
    L: int, k: int, believed: Sequence[float], measured: dict[Full, float], look: Callable[[Iterable[Full]], None]
) -> None:
    """Measures swaps of a chosen layer for another, starting from the best choice, until none is better."""
    for _ in range(SWAP_ROUNDS):
        best = _best(measured, k)
        look(_without(best, i) for i in best)
        # SWAPPED layers whose removal costs least, and SWAPPED outside layers with the largest estimates.
        leave = sorted(best, key=lambda i: measured[_without(best, i)])[:SWAPPED]
        come = sorted((i for i in range(L) if i not in best), key=lambda i: -believed[i])[:SWAPPED]
        look(_with(_without(best, i), j) for i in leave for j in come)
        if _best(measured, k) == best:
            return
