"""Engines compute gradients and update the weights. One interface serves the loop on one process and on many.

`Engine` is the interface that the loop needs. `LocalEngine` is one process without DeepSpeed, the simple default;
`ZeroEngine` (train/zero.py) is many processes with DeepSpeed. Ranks share one step: each runs some of its sequences,
gradients are summed over all ranks, and what is saved does not depend on the number of ranks.

Shapes: b sequences of a micro-batch, T tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ctxext.model.adapters import trainable
from ctxext.model.load import hidden_states, output_weight
from ctxext.train.distill import DistilledHead, TeacherModel, distilled_loss
from ctxext.train.finetune_spec import Objective, OptimizerSpec
from ctxext.train.loss import linear_cross_entropy, token_scores
from ctxext.train.optimizer import MASTER, MasterAdamW, RelativeClip


class Engine(Protocol):
    """The interface of an engine. Each `rank` from 0 to `world` - 1 has a part or a copy of the LM `model`.

    The state of `clip` is saved in checkpoints. All methods are collective: every rank makes the same calls in the same
    order. Call `loss`, never the forward of `model`: under ZeRO-3 only `loss` gathers the weights.
    """

    model: Any
    clip: RelativeClip
    rank: int
    world: int

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""

    def total(self, *values: float) -> list[float]:
        """Returns each value summed over the ranks; without values it is a barrier."""

    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        *,
        each: bool = False,
        objective: Objective | None = None,
        token_weights: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """Returns the cross entropy of ids, labels (b, T), in nats, summed over the labels that count.

        With `each`, and without gradients, returns the scores of every token (2, b, T): its loss, and 1 where its label
        is the most probable one. With `objective` (of a run with a teacher), returns the errors that it names.
        `token_weights` (b, T) multiply the terms of the sum, but not what `each` returns. `attention` goes to
        hidden_states.
        """

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's share of the step's loss; the shares of all ranks sum to the loss."""

    def step(self, rate_factor: float) -> tuple[float, float]:
        """Updates the weights at `rate_factor` times the learning rates.

        Returns (gradient norm before clipping, factor that clipping applied to the gradients). If the norm is not
        finite, the step is not valid and the caller must load the weights again.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Returns masters and moments in full on rank 0, by `<kind>/<name>`; nothing on the others."""

    def masters(self) -> dict[str, Tensor]:
        """Returns the fp32 values of everything that trains, by name, in full on rank 0; nothing on the others."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned on rank 0. Every rank passes all of it."""

    def close(self) -> None:
        """Frees the memory. The engine must not be used after this."""


class LossModel(nn.Module):
    """An LM whose forward pass returns the loss, so that only this forward pass uses its weights.

    DeepSpeed gathers a module's weights around that module's forward. The loss uses the head's weight without calling
    the head module (train/loss.py), so the weight is gathered around `head` here. Autograd adds its gradient as usual.
    """

    def __init__(self, model: Any, teacher: TeacherModel | None = None):
        super().__init__()
        self.model, self.head = model, LossHead(model)
        self.teacher, self.distilled_head = teacher, None if teacher is None else DistilledHead(model, teacher)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        each: bool = False,
        objective: Objective | None = None,
        token_weights: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """Returns the loss as `Engine.loss` does."""
        if objective is not None:
            assert self.teacher is not None
            return distilled_loss(
                self.model, self.distilled_head, self.teacher, objective, ids, labels, token_weights, **attention
            )
        hidden = hidden_states(self.model, ids, **attention)  # (b, T, E)
        flat = None if token_weights is None else token_weights.flatten()
        losses: Tensor = self.head(hidden.flatten(0, 1), labels.flatten(), each, flat)
        return losses.view(2, *labels.shape) if each else losses


class LossHead(nn.Module):
    """The loss of hidden states under the model's own head. The weight stays in the model; this module has none."""

    def __init__(self, model: Any):
        super().__init__()
        self.weight = partial(output_weight, model)

    def forward(self, hidden: Tensor, labels: Tensor, each: bool, token_weights: Tensor | None = None) -> Tensor:
        """Returns the summed cross entropy of hidden [N,E], labels [N]; with `each`, `token_scores` [2,N]."""
        weight = self.weight()
        if each:
            return token_scores(hidden, weight, labels)
        return linear_cross_entropy(hidden, weight, labels, token_weights=token_weights)[0]


class LocalEngine:
    """The engine of one process: fp32 masters and AdamW, without DeepSpeed."""

    rank, world = 0, 1

    def __init__(self, model: Any, spec: OptimizerSpec, teacher: TeacherModel | None = None):
        self.model, self.loss = model, LossModel(model, teacher)
        self.optimizer = MasterAdamW(trainable(model), spec)
        self.clip = RelativeClip(spec.clip)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def total(self, *values: float) -> list[float]:
        """Returns the values themselves, because there is one rank."""
        return list(values)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss."""
        loss.backward()

    def step(self, rate_factor: float) -> tuple[float, float]:
        """Updates the weights; a norm that is not finite drops the gradients and changes nothing else."""
        norm = self.optimizer.gradient_norm()
        # Return before the clip and the update: such a norm must not enter the running mean, nor the weights.
        if norm != norm or norm == float("inf"):
            self.optimizer.adamw.zero_grad(set_to_none=True)
            return norm, 0.0
        scale = self.clip.scale(norm)
        self.optimizer.step(rate_factor, scale)
        return norm, scale

    def tensors(self) -> dict[str, Tensor]:
        """Returns masters and moments by `<kind>/<name>`."""
        return self.optimizer.tensors()

    def masters(self) -> dict[str, Tensor]:
        """Returns the fp32 values of everything that trains, by name."""
        return {name.removeprefix(f"{MASTER}/"): x for name, x in self.tensors().items() if name.startswith(MASTER)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the result of `tensors` and discards accumulated gradients."""
        self.optimizer.adamw.zero_grad(set_to_none=True)
        self.optimizer.load(tensors)

    def close(self) -> None:
        """Frees the moments of the optimizer."""
        self.optimizer.adamw.state.clear()
