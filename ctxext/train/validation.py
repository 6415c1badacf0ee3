"""Held-out loss while a model trains, always under the attention of inference: dense, or sliding in sliding layers.

Training under S²-Attn can lower the training loss and raise this one. The tokens are held out of training and are the
same every time. `by_position` has the loss by position in the sequence, `short` is the loss at the model's original
length, and `passkey` is the result of train/passkey.py, where the spec requests it.

Shapes: T tokens of a sequence, E model width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ctxext.data.haystack import HaystackCase
from ctxext.data.mixture import Sequences
from ctxext.data.packing import Packed
from ctxext.errors import CheckFailed
from ctxext.train.checkpoint import TrainingState
from ctxext.train.engine import Engine
from ctxext.train.loss import IGNORED
from ctxext.train.passkey import measure
from ctxext.train.run_plan import RunPlan

FIRST_BUCKET = 64  # positions 0..63; each bucket after it is as wide as all before
WORSE_NATS = 0.02  # nats a token above the start that count as worse: well above rounding, and still a small rise


@dataclass(frozen=True)
class HeldOut:
    """The data of a validation: sequences of ctx tokens, and the cases of a passkey grid."""

    sequences: Sequences
    cases: tuple[HaystackCase, ...] = ()


@dataclass(frozen=True)
class Validation:
    """The result of a validation after `step` steps at `ctx`; losses in nats a token.

    `by_position` maps a bucket's first position to its loss. `short` is the loss of the first tokens of each sequence,
    as many as the original length, at most ctx.
    """

    step: int
    ctx: int
    loss: float
    short: float | None
    by_position: dict[str, float]
    passkey: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data, as in validation.jsonl and in checkpoints."""
        return asdict(self)


def validate(engine: Engine, held_out: HeldOut, plan: RunPlan, step: int) -> Validation:
    """Measures the held-out loss; every rank runs its share of the sequences and cases, one at a time."""
    sequences = held_out.sequences
    T, short = plan.spec.ctx, min(plan.positions.original_length or plan.spec.ctx, plan.spec.ctx)
    # Bucket edges 0, 64, 128, 256, ...: the last one is at or beyond T.
    edges = [0, FIRST_BUCKET]
    while edges[-1] < T:
        edges.append(2 * edges[-1])
    training = engine.model.training
    engine.model.eval()
    sums = torch.zeros(len(edges), 2, dtype=torch.float64)  # (nats, tokens) by bucket; the last row is `short`
    for first in range(0, len(sequences), engine.world):
        i = first + engine.rank
        # Forward passes are collective under ZeRO-3, so every rank runs equally many. A rank without a sequence left
        # runs one whose labels do not count.
        if i >= len(sequences):
            packed = sequences.sequence(first)
            packed = packed._replace(labels=torch.full_like(packed.labels, IGNORED))
        else:
            packed = sequences.sequence(i)
        losses = _losses(engine, packed, plan)  # [T]
        scored = packed.labels != IGNORED
        bucket = torch.bucketize(torch.arange(T), torch.tensor(edges[1:]), right=True)
        sums[:-1, 0].index_add_(0, bucket, losses)
        sums[:-1, 1].index_add_(0, bucket, scored.double())
        if short < T:  # measured on the first tokens as a separate row, in a second forward pass
            head = Packed(packed.tokens[:short], packed.document_starts[:short], packed.labels[:short])
            sums[-1] += torch.stack((_losses(engine, head, plan).sum(), scored[:short].sum().double()))
    passkey = measure(engine, held_out.cases, plan.spec.attention.backend) if held_out.cases else None
    engine.model.train(training)
    # Sum over the ranks before dividing, so that every token weighs the same.
    flat = torch.tensor(engine.total(*sums.flatten().tolist()), dtype=sums.dtype).view(-1, 2)  # [buckets + 1, 2]
    means = {str(start): _mean(row) for start, row in zip(edges, flat[:-1], strict=False) if row[1] > 0}
    loss = _mean(flat[:-1].sum(0))
    short_loss = loss if short == T else _mean(flat[-1]) if flat[-1, 1] > 0 else None
    return Validation(step, T, loss, short_loss, means, passkey)


def complaint(first: Validation, now: Validation, progress: TrainingState) -> str | None:
    """Returns a warning where the held-out loss rose while the training loss fell; else None."""
    first_loss, loss = progress.first_loss, progress.loss_mean
    if now.loss <= first.loss + WORSE_NATS or loss >= first_loss:
        return None
    return (
        f"warning: step {now.step}: with the attention of inference, the held-out loss is {now.loss:.3f} and was "
        f"{first.loss:.3f} at the start, while the training loss fell from {first_loss:.3f} to {loss:.3f}: this "
        "training does not help at inference; try attention.train=dense, attention.dense_last, or a lower rate"
    )


def check_short(first: float | None, last: float | None, most: float | None) -> None:
    """Raises CheckFailed where perplexity at the original length rose by more than the share `most`.

    `first` and `last` are losses before and after the run, in nats a token.
    """
    if most is None or first is None or last is None:
        return
    rise = math.exp(last - first) - 1
    if rise > most:
        raise CheckFailed(
            f"perplexity at the original length rose by {rise:.1%}, from {math.exp(first):.2f} to "
            f"{math.exp(last):.2f}; validation.max_short_ppl_increase allows {most:.1%}. No result was written",
            hint="the checkpoints are kept; to write the result anyway, resume with a higher limit: --set, --force",
        )


@torch.no_grad()
def _losses(engine: Engine, packed: Packed, plan: RunPlan) -> torch.Tensor:
    """The loss of every token of one sequence, fp64 [T] on the CPU, 0 where no label is scored."""
    starts = packed.document_starts[None] if plan.spec.data.document_mask else None
    ids, labels = (x[None].to(engine.device) for x in (packed.tokens, packed.labels))
    backend = plan.spec.attention.backend
    return engine.loss(ids, labels, each=True, document_starts=starts, backend=backend)[0, 0].double().cpu()


def _mean(row: torch.Tensor) -> float:
    return float(row[0] / row[1])
