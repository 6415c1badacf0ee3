"""Whether a model hangs on its first token, and what S²-Attn costs it before it has trained.

Many pretrained models put much of each head's attention on the first token, an "attention sink" (StreamingLLM, arXiv
2309.17453, section 3). Groups hide that token from all but the first group. Then training starts from a model that is
much worse than the one that was loaded: 1.2 nats a token for SmolLM2-135M with groups of 256, of which one visible
first token takes away 83% (docs/features.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctxext.data.corpus import stdlib_documents
from ctxext.data.packing import Packed
from ctxext.model.load import hidden_states, load_tokenizer
from ctxext.ops.attention import attention_rows
from ctxext.ops.masks import Pattern
from ctxext.train.engine import Engine
from ctxext.train.loss import IGNORED
from ctxext.train.plan import RunPlan

HANGS = 0.05  # mean share of attention on the first token; ours. Measured: SmolLM2-135M 0.30, `tiny` 0.0007
MEASURED = 512  # tokens of the row that is looked at
EVERY = 8  # one query of so many, in the second half of the row
COSTLY = 0.3  # nats a token that a training attention costs untrained, above which a run warns; ours
SINK_TOKENS = 1  # that `auto` takes: with four visible tokens SmolLM2-135M's loss is the same to 0.001 nats


def measured_row(tokenizer: Any, longest: int) -> Tensor:
    """Embedded held-out text for `first_token_shares`: ids [1, T], T at most 512 and at most `longest`."""
    text = "".join(document.text for document in stdlib_documents("held-out"))[: 32 * MEASURED]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([ids[: min(MEASURED, longest)]])


def first_token_shares(model: Any, ids: Tensor) -> list[float]:
    """The share of attention that each full layer puts on the first token of ids [1, T]: one number a layer.

    It is averaged over heads and over queries in the second half of the row. Attention is dense, without gradients. A
    model that spreads its attention evenly has shares near 1.4 / T. Layers with a window are left out.
    """
    row = ids.to(next(model.parameters()).device)
    shares: list[float] = []

    def watch(module: Any, query: Tensor, key: Tensor, pattern: Pattern, scaling: float | None) -> None:
        if pattern.sliding_window is None:
            T = key.shape[2]
            at = torch.arange(T // 2, T, EVERY, device=query.device)  # [R]
            learned = getattr(module, "sinks", None)
            weights = attention_rows(query[:, :, at], key, at[None], scale=scaling, sink_logits=learned)  # [1,H,R,T]
            shares.append(weights[..., 0].mean().item())

    training = model.training
    with torch.no_grad():
        hidden_states(model.eval(), row, watch=watch)
    model.train(training)
    return shares


def measured_sinks(shares: Sequence[float]) -> int:
    """How many first tokens S²-Attn keeps visible for a model with these shares: 1, or 0 as published."""
    return SINK_TOKENS if shares and sum(shares) / len(shares) >= HANGS else 0


def sinks_of(plan: RunPlan, model: Any, say: Callable[[str], None]) -> int:
    """The number of first tokens that S²-Attn keeps visible in a run; `auto` is measured on the model, and said.

    `model` is the base with a fresh adapter, also in a run that resumes: the answer is that of the model before
    training, so that a run resumes with what it started with.
    """
    if plan.sink_tokens is not None:
        if plan.group_size and plan.spec.attention.sinks == "auto":
            say("attention.sinks: 0 with memory.tiles, whose tiles do not hold the first token of a document")
        return plan.sink_tokens
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        # ZeRO 3 has divided the weights, and gathers them only once its engine runs the model.
        say("warning: attention.sinks: auto is not measured under ZeRO 3, and is 0; set attention.sinks=1 to keep one")
        return 0
    shares = first_token_shares(model, measured_row(load_tokenizer(plan.source.directory), plan.spec.ctx))
    sinks = measured_sinks(shares)
    share = sum(shares) / len(shares)
    why = ", so every query of S²-Attn sees it" if sinks else ""
    say(f"attention.sinks: {sinks}; {share:.1%} of the attention is on the first token{why}")
    return sinks


def untrained_cost(engine: Engine, row: Packed, plan: RunPlan) -> str | None:
    """What the training attention costs before training, as a line to say; None where a run starts dense.

    The loss of one row of training text [T] under the attention of the plan's first step and under dense attention,
    in nats a token, without gradients. Every rank computes it, on the same row.
    """
    group_size, shift = plan.attention_at(plan.first)
    if group_size is None:
        return None
    starts = row.document_starts[None] if plan.spec.data.document_mask else None
    ids, labels = (x[None].to(engine.device) for x in (row.tokens, row.labels))
    scored = max(1, int((row.labels != IGNORED).sum()))
    shared: dict[str, Any] = {"document_starts": starts, "backend": plan.spec.attention.backend, "each": True}
    groups = {"group_size": group_size, "shift": shift, "sink_tokens": plan.sink_tokens or 0}
    training = engine.model.training
    engine.model.eval()
    with torch.no_grad():
        s2, dense = (engine.loss(ids, labels, **shared, **how)[0].sum().item() / scored for how in (groups, {}))
    engine.model.train(training)
    line = f"training attention, untrained: {s2:.3f} nats a token on one row, dense {dense:.3f} ({s2 - dense:+.3f})"
    if s2 - dense <= COSTLY:
        return line
    return (
        f"warning: {line}: training starts from a worse model than the one that was loaded; "
        "try attention.sinks=1, a larger attention.group_size, or attention.train=dense"
    )
