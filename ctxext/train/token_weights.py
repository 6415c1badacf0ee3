"""Weights of tokens in the loss of training: more weight for tokens that can learn from a long context.

The loss of a step is the weighted mean over the scored tokens of all ranks, sum(w loss) / sum(w): its unit stays nats a
token. Two kinds of weights (`TokenWeights` of finetune_spec.py):

    prefix   Tokens that see at least `least` tokens of their own document share an extra weight of `extra` times the
             number of scored tokens. Each doubling of the visible length gets an equal part of it, so that rare lengths
             weigh more. After EXACT (Effective-context Exposure Balancing, arXiv 2605.10544, abstract only: fixed extra
             weight, inverse frequency in the long tail). The bucket widths, the counting within a step and the limit
             are ours.
    longce   min(exp(loss with a short context - loss with the whole context), limit) of the model that trains (LongCE,
             arXiv 2410.23771). A token's short context are the last `short`/2 to `short` tokens, from two passes over
             pieces of `short` tokens that are shifted by half of a piece. Tokens within the first `short` tokens of
             their document see the same in both and have the weight 1. LongCE does not divide by the sum of weights;
             that is ours.

Shapes: b sequences of a micro-batch, T tokens. No gradient is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxext.train.finetune_spec import FinetuneSpec, TokenWeights, long_prefix, short_length
from ctxext.train.loss import IGNORED

if TYPE_CHECKING:  # the engine brings PEFT
    from ctxext.train.engine import Engine


def visible_lengths(starts: Tensor) -> Tensor:
    """Returns how many tokens of its document each token sees, itself included: int64 [b,T] from starts [b,T]."""
    return torch.arange(1, starts.shape[1] + 1, device=starts.device) - starts


def step_weights(
    spec: FinetuneSpec, engine: Engine, micros: Sequence[tuple[Tensor, ...]], attention: dict[str, Any]
) -> list[Tensor | None]:
    """Returns the weights fp32 [b,T] of this rank's micro-batches (tokens, document starts, labels) of a step.

    All are None if every token counts the same. Every rank calls it; for longce, with the same number of micro-batches.
    """
    weights, device = spec.token_weights, engine.device
    if weights.kind == "prefix":
        return list(prefix_weights(weights, spec.ctx, [(starts, labels) for _, starts, labels in micros], engine))
    # A row that fits in the short context has nothing to compare.
    if weights.kind == "equal" or short_length(weights, spec.ctx) >= spec.ctx:
        return [None] * len(micros)
    return [
        longce_weights(weights, tokens.to(device), labels.to(device), starts, engine, **attention)
        for tokens, starts, labels in micros
    ]


def prefix_weights(
    spec: TokenWeights, ctx: int, micros: Sequence[tuple[Tensor, Tensor]], engine: Engine
) -> list[Tensor]:
    """Returns the weights fp32 [b,T] of each micro-batch (document starts [b,T], labels [b,T]) of this rank's step.

    Every rank calls it once a step, because the counts are summed over the ranks.
    """
    least = long_prefix(spec, ctx)
    # Bucket b holds the lengths from least 2^b to least 2^(b+1); -1: shorter ones, which have the weight 1.
    buckets = [
        (visible_lengths(starts).clamp(min=1) / least).log2().floor().long().clamp(min=-1) for starts, _ in micros
    ]
    count = max(1, (max(1, ctx // least)).bit_length())
    scored = [labels != IGNORED for _, labels in micros]
    counts = [
        sum(int(((bucket == b) & valid).sum()) for bucket, valid in zip(buckets, scored, strict=True))
        for b in range(-1, count)
    ]
    _, *tail = totals = engine.total(*counts)
    filled = sum(number > 0 for number in tail)
    # Each bucket with tokens gets extra * all / filled, divided equally among its tokens.
    weights = [1.0] + [
        min(1 + spec.extra * sum(totals) / filled / number, spec.limit) if number else 1.0 for number in tail
    ]
    table = torch.tensor(weights, dtype=torch.float32)
    return [table[bucket.cpu() + 1] for bucket in buckets]


@torch.no_grad()
def longce_weights(
    spec: TokenWeights, ids: Tensor, labels: Tensor, starts: Tensor, engine: Engine, **attention: Any
) -> Tensor:
    """Returns the weights fp32 [b,T] of a micro-batch ids, labels [b,T], document starts [b,T] on the CPU.

    `attention` are the training attention's arguments without document starts. Every rank makes the same three forward
    passes.
    """
    short = short_length(spec, ids.shape[1])
    before = visible_lengths(starts) - 1  # tokens of the document before each token
    half = short // 2

    def losses(pieces: Tensor) -> Tensor:
        return engine.loss(ids, labels, each=True, document_starts=pieces, **attention)[0].cpu()  # [b,T]

    whole = losses(starts)
    # Pieces of `short` tokens from the document's start; the second time they begin half a piece earlier.
    first = before % short
    second = torch.where(before < half, before, (before + short - half) % short)
    contexts = [losses(starts + before - inside) for inside in (first, second)]
    # Of the two passes, each token uses the one in which it sees more.
    loss = torch.where(first >= second, *contexts)
    return torch.where(before < short, 0.0, loss - whole).exp().clamp(max=spec.limit)
