"""The gate: proves a conversion with two comparisons of logits.

identity  compares the converted weights in the target class, with the SOURCE's own layout (mostly full attention and
          RoPE everywhere), with the source itself. The difference in fp32 must be 0; otherwise a config field is
          missing
hybrid    compares stock transformers with the new layout with a hand-written forward pass of the same model in fp64
          (model/walk.py). Only rounding may differ; otherwise a window or a missing RoPE is on the wrong layer, or a
          window is off by one

Rounding grows with depth and with the row length, so the gate measures the allowed difference on the model itself. It
runs the hand-written pass in fp32 as well; the difference from fp64 is the rounding of fp32 in this model on these
tokens.

For a window the gate proves that the right layer has it and that its number of keys is right. The same code applies a
window of 100,000 and one of 1,024. The hand-written attention takes T x T memory, so both models of a comparison use
LARGEST_WINDOW in place of a larger window, and the gate checks the real number in the stock class's config.
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
from ctxext.model.families import FAMILIES
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind
from ctxext.model.model_config import ModelConfig
from ctxext.model.shards import tensor_reader
from ctxext.model.stock import built_config, stock_config
from ctxext.model.walk import walk
from ctxext.ops.cost import parameter_count

LARGEST_WINDOW = 1024  # keys; the time of the fp64 walk grows with the square of this
# Allowed multiple of the walk's own fp32 rounding; stock kernels add in another order. Measured with 195 tokens and a
# window of 128: stock differs by 0.8 and 1.1 times that rounding (stories260K, SmolLM2-135M), and a window that is off
# by one on one layer differs by 600 times or more.
TOLERANCE_FACTOR = 8
MAX_TOLERANCE = 1e-2  # as a part of the largest logit; with a larger tolerance the comparison would detect nothing


@dataclass(frozen=True)
class GateReport:
    """The two differences of the gate and the conditions they were measured under.

    identity_max_diff   max |logit - logit| of the first comparison
    hybrid_max_diff     the same of the second comparison
    hybrid_tolerance    TOLERANCE_FACTOR times the rounding of fp32
    tokens              number of random tokens compared
    layers, num_layers  layers compared, and layers of the model
    window_stand_in     the window used in place of larger ones, in keys; None: every window kept its size
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
        """Returns whether the first difference is exactly 0 and the second within the tolerance."""
        return self.identity_max_diff == 0.0 and self.hybrid_max_diff <= self.hybrid_tolerance

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields for JSON, and `passed`."""
        return asdict(self) | {"passed": self.passed}


def run_gate(
    source: Path,
    source_config: ModelConfig,
    out: Path,
    kinds: Sequence[LayerKind],
    source_kinds: Sequence[LayerKind],
    *,
    dtype: torch.dtype | None,
    target: str | None = None,
    biases: bool = False,
    between: Callable[[], None] = lambda: None,
) -> GateReport:
    """Runs both comparisons in fp32. Raises CheckFailed when one fails.

    `target` and `biases` are as in `hybrid_config`. `between` is called after the first comparison. It may change
    weights of `out`, for example write sinks, and the second comparison then includes the change.

    The row is 67 tokens longer than the largest window (LARGEST_WINDOW at most), and at least 128 tokens. A model that
    is too large to hold in fp32 is cut to its first layers; the report says to how many. With `dtype` the source's
    weights are rounded to it first, as the conversion's weights are.
    """
    # Seeded, so that a repeated gate gives the same numbers. The row must be longer than every window: a shorter one
    # would not show a wrong window.
    layers = _affordable_layers(source_config)
    tested, tested_source = _bounded(kinds), _bounded(source_kinds)
    windows = [kind.sliding_window for kind in [*tested, *tested_source] if kind.sliding_window is not None]
    tokens = max(128, max(windows, default=0) + 67)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source_config.shape.vocab_size, (1, tokens), generator=generator)

    # First comparison, identity. The truth is the source as transformers reads it, with the same cuts (window, number
    # of layers) as our config.
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
    identity = hybrid_config(source_config, tested_source, target, biases=biases).first_layers(layers)
    identity_diff = _difference(_logits(out, built_config(identity), ids, None, target), truth)
    between()

    # Second comparison, hybrid. A window that is compared at LARGEST_WINDOW gets its real number checked in the config.
    if tested != tuple(kinds):
        _check_number(hybrid_config(source_config, kinds, target, biases=biases), kinds)
    hybrid = hybrid_config(source_config, tested, target, biases=biases).first_layers(layers)
    by_hand, tolerance = _truth_by_hand(out, hybrid, tested[:layers], ids)
    hybrid_diff = _difference(_logits(out, built_config(hybrid), ids, None, target), by_hand)

    # `stand_in` records whether any window of either layout was reduced.
    stand_in = LARGEST_WINDOW if (tested, tested_source) != (tuple(kinds), tuple(source_kinds)) else None
    every = source_config.shape.num_layers
    report = GateReport(identity_diff, hybrid_diff, tolerance, tokens, layers, every, stand_in)
    if not report.passed:
        raise CheckFailed(
            f"the converted model computes other logits: identity layout off by {identity_diff:.3g} (must be 0), "
            f"hybrid layout off by {hybrid_diff:.3g} (at most {tolerance:.2g})",
            hint="nothing was written; please report this with the source's config.json and your transformers version",
        )
    return report


def _truth_by_hand(out: Path, config: ModelConfig, kinds: Sequence[LayerKind], ids: Tensor) -> tuple[Tensor, float]:
    """Returns logits [1, T, V] of the walk in fp64, and the difference that a correct fp32 model may have from them.

    Raises CheckFailed where rounding alone is so large that the comparison would detect nothing.
    """
    read = tensor_reader(out)
    with torch.no_grad():
        exact = walk(read, config, kinds, ids, torch.float64)
        rounding = _difference(walk(read, config, kinds, ids), exact)
    largest = max(1.0, exact.abs().max().item())
    # At least one fp32 rounding step of the largest logit: a very small model may measure a rounding of zero.
    tolerance = TOLERANCE_FACTOR * max(rounding, torch.finfo(torch.float32).eps * largest)
    # `not <=` also fails for NaN.
    if not tolerance <= MAX_TOLERANCE * largest:
        raise CheckFailed(
            f"fp32 rounding changes these logits by {rounding:.3g} (the largest is {largest:.3g}): the hybrid layout "
            "cannot be compared in fp32",
            hint="nothing was written; --no-gate converts without the comparison",
        )
    return exact, tolerance


def _bounded(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """Returns the layout with LARGEST_WINDOW in place of every larger window."""
    return tuple(
        kind if kind.sliding_window is None else replace(kind, sliding_window=min(kind.sliding_window, LARGEST_WINDOW))
        for kind in kinds
    )


def _window_of(config: Any) -> int | None:
    """Returns the window that a stock class reads from its config, or None where it uses none."""
    used = getattr(config, "use_sliding_window", True)
    if getattr(config, "layer_types", None):
        used = used and "sliding_attention" in config.layer_types
    return getattr(config, "sliding_window", None) if used else None


def _check_number(config: ModelConfig, kinds: Sequence[LayerKind]) -> None:
    """Checks that the stock class reads the layout's window, where the window is too large to compare by logits."""
    read = _window_of(built_config(config))
    if read not in {kind.sliding_window for kind in kinds} - {None}:
        raise CheckFailed(f"the converted config.json gives transformers a window of {read}, not the layout's")


def _logits(
    directory: Path, config: Any, ids: Tensor, rounded_to: torch.dtype | None, target: str | None = None
) -> Tensor:
    """Returns logits [1, T, V] of a stock model in fp32, with weights optionally rounded to another dtype first.

    Both models of a comparison use the same attention implementation: sdpa, or eager where the `target` class has
    sinks, because transformers computes sinks only in eager.
    """
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager" if target is not None and FAMILIES[target].sinks else "sdpa",
        generation_config=GenerationConfig(),  # else transformers reads config.json, which `out` does not have yet
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    with torch.no_grad():
        if rounded_to is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(rounded_to))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    # Free the weights now: `_affordable_layers` counts on one fp32 model in memory at a time.
    del model
    gc.collect()
    return logits


def _difference(a: Tensor, b: Tensor) -> float:
    """Returns max |a - b|; infinity where any element is NaN."""
    worst = (a - b).abs().max().item()
    return worst if worst == worst else float("inf")


def _affordable_layers(config: ModelConfig) -> int:
    """Returns how many layers fit in fp32 into half of the free memory; at least one."""
    # `outside` is what every cut keeps: the embeddings, and the head where it is not tied. All in bytes.
    layers, shape = config.shape.num_layers, config.shape
    whole = 4 * parameter_count(shape)
    outside = 4 * config.shape.vocab_size * config.shape.hidden_size * (1 if shape.tied else 2)
    free = memory().available / 2
    return max(1, min(layers, int((free - outside) / max(1, (whole - outside) / layers))))
