"""The proof of a conversion, in two numbers.

identity  the converted weights in the SOURCE's own layout (for most: full attention and RoPE everywhere), in the target
          class, against the source itself: 0 in fp32, or a config field was forgotten
hybrid    the real layout in stock transformers against the same model walked by hand in fp64 (model/walk.py): rounding
          only, or the window or the missing RoPE is on the wrong layer or off by one

How much rounding is allowed is measured on the model itself, since it grows with depth and with the length of a row:
the walk is taken in fp32 as well, and what it differs by from fp64 is fp32's rounding in this model on these tokens.

What is proved of a window is that its layer has it, and of how many keys it is: the code that applies one of 100,000
is that of one of 1,024. So windows beyond LARGEST_WINDOW are compared at that, in both models of a comparison
(attention by hand takes T x T of memory), and their own number is read in the stock class's config.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from ctxext.errors import CheckFailed
from ctxext.machine.memory import memory
from ctxext.model.families import FAMILIES, Config, first_layers, model_shape
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind
from ctxext.model.shards import tensor_reader
from ctxext.model.stock import built_config, stock_config
from ctxext.model.walk import walk
from ctxext.ops.cost import parameter_count

LARGEST_WINDOW = 1024  # keys; the walk takes time in the square of it, and in fp64
# Times the walk's own fp32 rounding, since stock kernels add in another order. Measured (195 tokens, window 128): stock
# was off by 0.8 and 1.1 times that (stories260K, SmolLM2-135M); a window off by one on one layer by 600 times and more.
ALLOWANCE = 8
BLIND = 1e-2  # of the largest logit: with more rounding than this, the comparison would show nothing


@dataclass(frozen=True)
class GateReport:
    """Differences are max |logit - logit|; `hybrid_tolerance` is ALLOWANCE times the rounding of fp32. `layers` of
    `num_layers` were compared, on `tokens` random tokens.

    `window_stand_in` is the window that stood in for larger ones, in keys; None: every window was as it is.
    """

    identity_max_diff: float
    hybrid_max_diff: float
    hybrid_tolerance: float
    tokens: int
    layers: int
    num_layers: int
    window_stand_in: int | None = None

    @property
    def passed(self) -> bool:
        return self.identity_max_diff == 0.0 and self.hybrid_max_diff <= self.hybrid_tolerance

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def run_gate(
    source: Path,
    source_config: Config,
    out: Path,
    kinds: Sequence[LayerKind],
    source_kinds: Sequence[LayerKind],
    *,
    dtype: torch.dtype | None,
    target: str | None = None,
    biases: bool = False,
    between: Callable[[], None] = lambda: None,
) -> GateReport:
    """Run both comparisons in fp32. Raises CheckFailed when one fails.

    `target` and `biases` as in `hybrid_config`. `between` is called after the first comparison: it may change weights
    of `out` on purpose, such as sinks, which the second comparison then has.

    Runs past every window by 67 tokens, a window beyond LARGEST_WINDOW counting as that. A model too large to hold in
    fp32 is cut to its first layers; the report says to how many. With `dtype` the source's weights are rounded to it
    first, as the conversion's were.
    """
    layers = _affordable_layers(source_config)
    tested, tested_source = _bounded(kinds), _bounded(source_kinds)
    windows = [kind.sliding_window for kind in [*tested, *tested_source] if kind.sliding_window is not None]
    tokens = max(128, max(windows, default=0) + 67)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source_config["vocab_size"], (1, tokens), generator=generator)

    config = stock_config(source)
    theirs = _window_of(config)
    if theirs not in {kind.sliding_window for kind in source_kinds}:
        raise CheckFailed(f"transformers reads a window of {theirs} from the source's config.json, ctxext another")
    if theirs is not None:
        config.sliding_window = min(theirs, LARGEST_WINDOW)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    truth = _logits(source, config, ids, dtype, target)
    identity = first_layers(hybrid_config(source_config, tested_source, target, biases=biases), layers)
    identity_diff = _difference(_logits(out, built_config(identity), ids, None, target), truth)
    between()

    if tested != tuple(kinds):
        _check_number(hybrid_config(source_config, kinds, target, biases=biases), kinds)
    hybrid = first_layers(hybrid_config(source_config, tested, target, biases=biases), layers)
    by_hand, tolerance = _truth_by_hand(out, hybrid, tested[:layers], ids)
    hybrid_diff = _difference(_logits(out, built_config(hybrid), ids, None, target), by_hand)
    stand_in = LARGEST_WINDOW if (tested, tested_source) != (tuple(kinds), tuple(source_kinds)) else None
    every = source_config["num_hidden_layers"]
    report = GateReport(identity_diff, hybrid_diff, tolerance, tokens, layers, every, stand_in)
    if not report.passed:
        raise CheckFailed(
            f"the conversion does not compute what it should: identity layout off by {identity_diff:.3g} (must be 0), "
            f"hybrid layout off by {hybrid_diff:.3g} (at most {tolerance:.2g})",
            hint="nothing was written; please report this with the source's config.json and your transformers version",
        )
    return report


def _truth_by_hand(out: Path, config: Config, kinds: Sequence[LayerKind], ids: Tensor) -> tuple[Tensor, float]:
    """Logits [1, T, V] of the walk in fp64, and by how much a right model in fp32 may differ from them.

    Raises CheckFailed where rounding alone is as large as what the comparison looks for.
    """
    read = tensor_reader(out)
    with torch.no_grad():
        exact = walk(read, config, kinds, ids, torch.float64)
        rounding = _difference(walk(read, config, kinds, ids), exact)
    largest = max(1.0, exact.abs().max().item())
    tolerance = ALLOWANCE * max(rounding, torch.finfo(torch.float32).eps * largest)
    if not tolerance <= BLIND * largest:
        raise CheckFailed(
            f"fp32 alone moves this model's logits by {rounding:.3g} (the largest is {largest:.3g}): the hybrid layout "
            "cannot be proved in fp32",
            hint="nothing was written; --no-gate converts without the proof",
        )
    return exact, tolerance


def _bounded(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """A layout with LARGEST_WINDOW for every larger window."""
    return tuple(
        kind if kind.sliding_window is None else replace(kind, sliding_window=min(kind.sliding_window, LARGEST_WINDOW))
        for kind in kinds
    )


def _window_of(config: Any) -> int | None:
    """The window that a stock class has by its config, None where it uses none."""
    used = getattr(config, "use_sliding_window", True)
    if getattr(config, "layer_types", None):
        used = used and "sliding_attention" in config.layer_types
    return getattr(config, "sliding_window", None) if used else None


def _check_number(config: Config, kinds: Sequence[LayerKind]) -> None:
    """A window too large to be compared by what it computes is at least the number that the stock class reads."""
    read = _window_of(built_config(config))
    if read not in {kind.sliding_window for kind in kinds} - {None}:
        raise CheckFailed(f"the converted config.json gives transformers a window of {read}, the layout has another")


def _logits(
    directory: Path, config: Any, ids: Tensor, rounded_to: torch.dtype | None, target: str | None = None
) -> Tensor:
    """Logits [1, T, V] of a stock model in fp32; its weights optionally rounded to another dtype on the way.

    Both models of a comparison use one implementation of attention: sdpa, but eager where the `target` class has sinks,
    which transformers computes there alone.
    """
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager" if target is not None and FAMILIES[target].sinks else "sdpa",
        generation_config=GenerationConfig(),  # transformers would read config.json for one, and `out` has none yet
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    with torch.no_grad():
        if rounded_to is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(rounded_to))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    del model
    gc.collect()
    return logits


def _difference(a: Tensor, b: Tensor) -> float:
    """max |a - b|; NaN anywhere is a difference without bound."""
    worst = (a - b).abs().max().item()
    return worst if worst == worst else float("inf")


def _affordable_layers(config: Config) -> int:
    """How many layers fit in memory in fp32, with half of what is free left alone; at least one."""
    layers, shape = config["num_hidden_layers"], model_shape(config)
    whole = 4 * parameter_count(shape)
    outside = 4 * config["vocab_size"] * config["hidden_size"] * (1 if shape.tied else 2)
    free = memory().available / 2
    return max(1, min(layers, int((free - outside) / max(1, (whole - outside) / layers))))
