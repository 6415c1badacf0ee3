"""Cross entropy directly from the last hidden states; it never holds the logits of the whole batch.

Shapes: N tokens, E model width, V vocabulary, c tokens of one chunk (ops/logits.py).

The gradient is computed in the forward pass, where a chunk's probabilities are available: softmax minus the one-hot
label, times W for the hidden states, and times the hidden states for the head's weight W. Nothing is recomputed. The
backward pass only scales and returns what is stored: the gradient of the hidden states [N,E] and, if the head trains,
that of W [V,E], summed in fp32.

Not supported: logit scaling, soft-capping, a bias, label smoothing. A model that has one needs its own loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ctxext.errors import InputError
from ctxext.ops.logits import loss_chunk

IGNORED = -100  # the label of a token that is not scored
SCALED = 1 << 22  # entries of a gradient that are scaled in fp32 at a time: 16 MiB


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None, *, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the sum of -log softmax(hidden weightᵀ)[label] over the labels that count, and their number.

    hidden [N,E] in any floating dtype, weight [V,E] (frozen or not, tied or not; used in hidden's dtype), labels [N]
    with IGNORED where nothing is scored. With `token_weights` [N], each term of the sum is multiplied by its token's
    weight. Returns (fp32 sum, int64 count), both scalars on the device: divide by the count of the whole step, over
    accumulation and ranks, so that every token weighs the same. Softmax is fp32. The result can be differentiated once,
    in one backward pass. Raises InputError for shapes that do not match.
    """
    _check(hidden, weight, labels)
    if token_weights is not None and token_weights.shape != labels.shape:
        raise InputError(f"token_weights {list(token_weights.shape)}, labels {list(labels.shape)}: expected one shape")
    # Apply autocast's dtype here and switch it off inside, since the operation chooses its own dtypes.
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        loss = _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, chunk or chunk_of(weight))
    return loss, (labels != IGNORED).sum()


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Returns -log softmax(hidden weightᵀ)[label] of every token, fp32 [N], 0 for an IGNORED label; no gradient."""
    return token_scores(hidden, weight, labels, chunk)[0]


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Returns `token_losses`, and 1 where a token's label is the most probable, else 0: fp32 [2,N]; no gradient."""
    _check(hidden, weight, labels)
    scores = torch.zeros(2, *labels.shape, dtype=torch.float32, device=hidden.device)
    matrix = weight.to(hidden.dtype)
    for rows in _rows(hidden, chunk or chunk_of(weight)):
        logits = (hidden[rows] @ matrix.t()).float()  # [c,V]
        scores[0, rows] = cross_entropy(logits, labels[rows], ignore_index=IGNORED, reduction="none")
        scores[1, rows] = (logits.argmax(-1) == labels[rows]).float()
    return scores


def chunk_of(weight: Tensor) -> int:
    """Returns the tokens of a chunk for a head [V, E], which depend on its device."""
    return loss_chunk(weight.shape[0], gpu=weight.device.type != "cpu")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, chunk: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for rows in _rows(hidden, chunk):
            p = (hidden[rows] @ matrix.t()).float()  # [c,V] logits, then probabilities, then their gradient: one buffer
            scored = (labels[rows] != IGNORED)[:, None]  # [c,1]
            label = labels[rows, None].where(scored, 0)  # [c,1]
            # log-sum-exp, with the maximum subtracted first, so that exp does not overflow.
            p -= p.amax(dim=-1, keepdim=True)
            of_label = p.gather(-1, label)
            total = p.exp_().sum(dim=-1, keepdim=True)  # [c,1]
            nats = (total.log() - of_label).where(scored, 0)  # [c,1]
            if token_weights is not None:
                nats = nats * token_weights[rows, None]
            loss += nats.sum()
            if dhidden is None and dweight is None:
                continue
            # Softmax minus the one-hot label; rows without a label get no gradient.
            p.div_(total).scatter_add_(-1, label, -torch.ones_like(total)).masked_fill_(~scored, 0)
            if token_weights is not None:
                p.mul_(token_weights[rows, None])
            dlogits = p.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, matrix, out=dhidden[rows])
            # Accumulate in fp32. addmm_ needs equal dtypes: for others compute the product first, then add it.
            if dweight is not None and hidden.dtype == torch.float32:
                dweight.addmm_(dlogits.t(), hidden[rows])
            elif dweight is not None:
                dweight += dlogits.t() @ hidden[rows]
            del p, dlogits  # free them before the next chunk allocates its own
        ctx.gradients = dhidden, None if dweight is None else dweight.to(weight.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        return *stored_gradients(ctx, grad), None, None, None


def stored_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients that the forward pass stored in `ctx`, times `grad`, in place, without a second copy.

    The product is computed in fp32 and rounded once. `grad` is about 1 / labels; rounded to bf16, it would be off by
    up to 0.2%, and so would every gradient, in the same direction.

    Raises RuntimeError at a second call (a graph that was kept for a second backward pass).
    """
    if ctx.gradients is None:
        raise RuntimeError("this loss gives its gradients once: compute it again for a second backward pass")
    (dhidden, dweight), ctx.gradients = ctx.gradients, None
    for gradient in (dhidden, dweight):
        if gradient is not None:
            # In parts, so that the fp32 copy stays small.
            rows = max(1, SCALED // gradient.shape[1])
            for part in gradient.split(rows):
                part.copy_(part.float().mul_(grad))
    return dhidden, dweight


def _rows(hidden: Tensor, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, hidden.shape[0], chunk))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or labels.shape != hidden.shape[:1]:
        raise InputError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}: "
            "expected [N,E], [V,E] and [N]"
        )
