"""Measures whether a model relies on its first token, and what S²-Attn costs the model before training.

Many pretrained models put much of each head's attention on the first token, an "attention sink" (StreamingLLM, arXiv
2309.17453, section 3). S²-Attn groups hide that token from all groups but the first. Training then starts from a model
that is much worse than the loaded one: 1.2 nats a token for SmolLM2-135M with groups of 256. One visible first token
removes 83% of this loss (docs/features.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxext.data.corpus import stdlib_documents
from ctxext.data.packing import Packed
from ctxext.model.load import hidden_states, load_tokenizer
from ctxext.ops.masks import Pattern
from ctxext.ops.naive_attention import attention_rows
from ctxext.train.loss import IGNORED
from ctxext.train.run_plan import RunPlan

if TYPE_CHECKING:  # the engine brings PEFT, which convert does not need
    from ctxext.train.engine import Engine

SINK_SHARE = 0.05  # mean share of attention on the first token; ours. Measured: SmolLM2-135M 0.30, `tiny` 0.0007
MEASURED_TOKENS = 512  # tokens of the measured row
QUERY_STRIDE = 8  # every eighth query in the second half of the row is measured
COST_WARNING = 0.3  # nats a token: a run warns if the training attention costs more before training; ours
SINK_TOKENS = 1  # used by `auto`: with four visible tokens SmolLM2-135M's loss is the same to 0.001 nats


def measured_row(tokenizer: Any, longest: int) -> Tensor:
    """Returns embedded held-out text for `first_token_shares`: ids [1, T], T at most 512 and at most `longest`."""
    text = "".join(document.text for document in stdlib_documents("held-out"))[: 32 * MEASURED_TOKENS]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([ids[: min(MEASURED_TOKENS, longest)]])


def first_token_shares(model: Any, ids: Tensor) -> list[float]:
    """Returns the share of attention that each full layer puts on the first token of ids [1, T], one number per layer.

    The share is averaged over heads and over queries in the second half of the row. Attention is dense, without
    gradients. A model with uniform attention has shares near 1.4 / T. Layers with a window are left out.
    """
    shares: list[float] = []
    # Measure in eval mode, then restore the mode of the caller.
    training = model.training
    with torch.no_grad():
        hidden_states(model.eval(), ids.to(next(model.parameters()).device), watch=partial(_watch, shares))
    model.train(training)
    return shares


def _watch(
    shares: list[float], module: Any, query: Tensor, key: Tensor, pattern: Pattern, scaling: float | None
) -> None:
    """Appends the share of a full layer to `shares`; a `watch` callback of model/attention.py, after `shares`."""
    if pattern.sliding_window is None:
        T = key.shape[2]
        # A few late queries are enough, and the full T x T attention is never computed.
        at = torch.arange(T // 2, T, QUERY_STRIDE, device=query.device)  # [R]
        learned = getattr(module, "sinks", None)
        weights = attention_rows(query[:, :, at], key, at[None], scale=scaling, sink_logits=learned)  # [1,H,R,T]
        shares.append(weights[..., 0].mean().item())


def measured_sinks(shares: Sequence[float]) -> int:
    """Returns how many first tokens S²-Attn keeps visible for a model with these shares: 1, or 0 as published."""
    return SINK_TOKENS if shares and sum(shares) / len(shares) >= SINK_SHARE else 0


def sinks_of(plan: RunPlan, engine: Engine, say: Callable[[str], None]) -> int:
    """Returns how many first tokens S²-Attn keeps visible in a run. `auto` is measured on the model and reported.

    The model of `engine` is the base with a fresh adapter, also in a resumed run. The result therefore is that of the
    model before training, and a resumed run uses the same number as at its start. Every rank calls this function and
    gets the same number.
    """
    if plan.sink_tokens is not None:
        if plan.group_size and plan.spec.attention.sinks == "auto":
            say("attention.sinks: 0, because memory.tiles is set: tiles do not hold a document's first token")
        return plan.sink_tokens
    # One forward pass over held-out text, before the first step. It goes through the engine, which gathers the weights
    # under ZeRO 3.
    row = measured_row(load_tokenizer(plan.source.directory), plan.spec.ctx).to(engine.device)
    shares, training = list[float](), engine.model.training
    engine.model.eval()
    with torch.no_grad():
        engine.loss(row, row, each=True, watch=partial(_watch, shares))
    engine.model.train(training)
    # The mean over the ranks, so that rounding cannot let them decide differently.
    (total,) = engine.total(sum(shares) / len(shares))
    share = total / engine.world
    sinks = measured_sinks([share])
    why = ", so every query of S²-Attn sees it" if sinks else ""
    say(f"attention.sinks: {sinks}; {share:.1%} of the attention is on the first token{why}")
    return sinks


def untrained_cost(engine: Engine, row: Packed, plan: RunPlan) -> str | None:
    """Measures what the training attention costs before training, as a line of text; None for a dense start.

    The loss of one row of training text [T] under the attention of the plan's first step and under dense attention, in
    nats a token, without gradients. Every rank computes it, on the same row.
    """
    group_size, shift = plan.attention_at(plan.first)
    if group_size is None:
        return None
    starts = row.document_starts[None] if plan.spec.data.document_mask else None
    ids, labels = (x[None].to(engine.device) for x in (row.tokens, row.labels))
    # Labels of prompts and of padding are not scored.
    scored = max(1, int((row.labels != IGNORED).sum()))
    shared: dict[str, Any] = {"document_starts": starts, "backend": plan.spec.attention.backend, "each": True}
    groups = {"group_size": group_size, "shift": shift, "sink_tokens": plan.sink_tokens or 0}
    training = engine.model.training
    engine.model.eval()
    with torch.no_grad():
        # An empty dict of options is dense attention.
        s2, dense = (engine.loss(ids, labels, **shared, **how)[0].sum().item() / scored for how in (groups, {}))
    engine.model.train(training)
    line = f"training attention, untrained: {s2:.3f} nats a token on one row, dense {dense:.3f} ({s2 - dense:+.3f})"
    if s2 - dense <= COST_WARNING:
        return line
    return (
        f"warning: {line}: training starts with a higher loss than the loaded model has; "
        "try attention.sinks=1, a larger attention.group_size, or attention.train=dense"
    )
