"""The softmax scale of layers without positions, for a length: one constant c on their queries.

A NoPE layer's softmax spreads over more keys the longer the text; sharper scores bring it back (Wang et al., "Length
Generalization of Causal Transformers without Position Encoding", arXiv 2404.12224, section 3: one scale for all heads).
A constant can be folded into weights that any engine runs: into q_proj and its bias, or, where an RMSNorm stands behind
q_proj and would undo that, into the norm's weight.

`choose` calibrates c at the target length on one half of held-out text (halves.py) and reports by length on the other.
Not done: a c for each head (2404.12224, section 4, trains them), and log n, which no stock class has (model/load.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ctxext.errors import InputError
from ctxext.evals.compare import Difference, differences
from ctxext.evals.engine import Ledger, Outcome, mean, run_job
from ctxext.evals.passkey import job as passkey_job
from ctxext.evals.spec import Passkey
from ctxext.model.load import LoadedModel, causal_lm
from ctxext.model.source import ModelSource
from ctxext.retrofit.dial import difference_row
from ctxext.retrofit.halves import Half, Notice, by_length, losses, told_better
from ctxext.units import format_tokens

GRID = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)
REFINE = 0.05  # on both sides of the best of GRID
WINDOWS = 16  # of the target length to choose by: one length has to decide alone
PASSKEYS = 4  # for each length and each of five depths


def nope_layers(source: ModelSource) -> list[int]:
    """The full layers without positions."""
    return [i for i, kind in enumerate(source.kinds) if kind.letter == "N"]


def query_module(model: Any, layer: int) -> nn.Module:
    """The last module with weights that a layer's queries go through: q_norm where there is one, or q_proj."""
    attention: Any = causal_lm(model).get_decoder().layers[layer].self_attn
    found: nn.Module = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
    return found


def hold(model: Any, layers: Sequence[int], c: float) -> list[RemovableHandle]:
    """Multiply the queries of `layers` by c as they are computed; no weight changes. Removing the handles ends it."""
    multiply = partial(_times, c)
    return [query_module(model, layer).register_forward_hook(multiply) for layer in layers]


def _times(c: float, module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return out * c


@contextmanager
def held(model: Any, layers: Sequence[int], c: float) -> Iterator[None]:
    """`hold` for as long as the block lasts."""
    handles = hold(model, layers, c)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fold(model: Any, layers: Sequence[int], c: float) -> None:
    """Multiply the weights that make the queries of `layers` by c: for good. `model` is merged, its weights fp32."""
    for layer in layers:
        for parameter in query_module(model, layer).parameters():
            parameter.mul_(c)


@dataclass(frozen=True)
class NopeScale:
    """What `choose` found. `tried` maps c to nats a token at `target` tokens on the half to choose by; `losses` (of
    c = 1 and of the best, by length), `passkey` (share found, the same way) and `differences` are of the other half.
    """

    data: str
    target: int
    layers: tuple[int, ...]
    chosen: float
    why: str
    tokens: tuple[int, int]
    tried: dict[float, float]
    losses: dict[str, dict[int, float]]
    passkey: dict[str, dict[int, float | None]]
    differences: tuple[Difference, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """As (name, value) lines."""
        layers = ", ".join(map(str, self.layers))
        rows = [
            ("NoPE scale", f"{self.chosen:g} on the queries of layers {layers}; {self.why}"),
            ("chosen by", f"the loss at {format_tokens(self.target)}, {self.tokens[0]:,} tokens of {self.data}"),
        ]
        for name, found in self.losses.items():
            shown = ", ".join(f"{loss:.4f} at {format_tokens(n)}" for n, loss in found.items())
            rows.append((f"  {name}, other half", f"{shown} (nats a token)"))
        for name, shares in self.passkey.items():
            shown = ", ".join(f"{share:.0%} at {format_tokens(n)}" for n, share in shares.items() if share is not None)
            rows.append((f"  {name}, passkey", f"{shown} ({5 * PASSKEYS} cases a length)"))
        return rows + [difference_row(difference) for difference in self.differences]


def reported_lengths(original: int, target: int) -> list[int]:
    """The original length, twice that, and so on below the target, and the target."""
    lengths = [min(original, target)]
    while 2 * lengths[-1] < target:
        lengths.append(2 * lengths[-1])
    return [*lengths, target] if lengths[-1] < target else lengths


def choose(
    loaded: LoadedModel, data: str, lengths: Sequence[int], both: tuple[Half, Half], notice: Notice = lambda _: None
) -> NopeScale:
    """Calibrate c at the last of `lengths` and report at all; the model is left as it came.

    `both` are the halves for `lengths`. c is 1 unless the paired test tells another from it; the best of the sweep is
    reported either way, for who looks at more than the loss.
    """
    layers, target = nope_layers(loaded.source), max(lengths)
    choosing = Half(both[0].texts, [window for window in both[0].windows if window.length == target])
    tried: dict[float, list[Outcome]] = {}

    def measure(c: float) -> float:
        if c not in tried:
            with held(loaded.model, layers, c):
                tried[c] = losses(loaded, choosing)
            notice(f"NoPE scale {c:g}: {by_length(tried[c])[target]:.4f} nats a token at {format_tokens(target)}")
        return by_length(tried[c])[target]

    around = min(GRID, key=measure)
    best = min((around, round(around - REFINE, 4), round(around + REFINE, 4)), key=measure)
    better, figures = told_better(tried[best], tried[1.0], len(tried))
    chosen = best if better else 1.0
    why = f"{figures} against 1" if better else f"1 is kept: {best:g} was not told from it ({figures})"
    why = "1 is kept: nothing on the grid was better" if best == 1.0 else why
    names = ["c = 1"] if best == 1.0 else ["c = 1", f"c = {best:g}"]
    texts: dict[str, list[Outcome]] = {}
    keys: dict[str, list[Outcome]] = {}
    for name, c in zip(names, (1.0, best), strict=False):
        notice(f"NoPE scale: {name} on the other half, at {', '.join(map(format_tokens, lengths))} tokens")
        with held(loaded.model, layers, c):
            texts[name] = losses(loaded, both[1])
            if (c == 1.0 and _finds_passkeys(loaded, lengths[0], notice)) or keys:
                keys[name] = _passkeys(loaded, lengths)
    compared: list[Difference] = []
    for suite, found in (("perplexity", texts), ("passkey", keys)):
        if len(found) == 2:
            compared += differences(suite, names[1], found[names[1]], names[0], found[names[0]])
    return NopeScale(
        data,
        target,
        tuple(layers),
        chosen,
        why,
        (choosing.tokens, both[1].tokens),
        {c: by_length(outcomes)[target] for c, outcomes in sorted(tried.items())},
        {name: by_length(outcomes) for name, outcomes in texts.items()},
        {name: {n: mean([o for o in outcomes if o.length == n]) for n in lengths} for name, outcomes in keys.items()},
        tuple(compared),
    )


def _finds_passkeys(loaded: LoadedModel, length: int, notice: Notice) -> bool:
    """Whether the model can do it at all."""
    try:
        share = mean(_passkeys(loaded, [length]))
    except InputError as error:  # too short for needle and question
        notice(f"passkey is not measured: {error.message}")
        return False
    if not share:
        notice(f"passkey is not measured: the model finds none at {format_tokens(length)}")
    return bool(share)


def _passkeys(loaded: LoadedModel, lengths: Sequence[int]) -> list[Outcome]:
    """Passkeys hidden in the embedded corpus's held-out files."""
    asked = passkey_job(loaded, Passkey(lengths=tuple(lengths), cases=PASSKEYS), Path())
    ledger = Ledger()
    run_job(asked, ledger, 16_384, lambda *_: None)
    return [ledger.outcomes[item.id] for item in asked.items]
