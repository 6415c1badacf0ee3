"""What moves the weights: one interface, so that the loop reads the same on one process and on many.

`Engine` is what the loop needs; `LocalEngine` is one process without DeepSpeed, the simple default, `ZeroEngine`
(train/zero.py) many with it. Ranks share one step: each runs some of its sequences, gradients are summed over all of
them, and what is saved does not depend on how many there were.

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
from ctxext.train.loss import linear_cross_entropy, token_scores
from ctxext.train.optimizer import MASTER, MasterAdamW, RelativeClip
from ctxext.train.spec import Objective, OptimizerSpec


class Engine(Protocol):
    """`model` is the LM, of which `rank` 0 to `world` - 1 has a part or a copy; `clip` is remembered.

    All methods are collective: every rank calls them, in the same order and equally often. `model` itself is called
    by nobody: under ZeRO-3 it has no weights outside `loss`.
    """

    model: Any
    clip: RelativeClip
    rank: int
    world: int

    @property
    def device(self) -> torch.device: ...

    def total(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""

    def loss(
        self, ids: Tensor, labels: Tensor, *, each: bool = False, objective: Objective | None = None, **attention: Any
    ) -> Tensor:
        """Cross entropy of ids, labels (b, T), in nats, summed over the labels that count; with `each` and without
        gradients, the scores of every token (2, b, T): its loss, and 1 where its label is the most probable one.
        With `objective` (of a run with a teacher) the errors that it names. `attention` goes to hidden_states."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the step's loss; the shares of all ranks sum to the loss."""

    def step(self, rate_factor: float) -> tuple[float, float]:
        """Update at `rate_factor` times the learning rates: (norm before clipping, factor the gradients were given).

        A norm that is not finite says that the step was no step: the weights are then to be loaded again.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments in full on rank 0, by `<kind>/<name>`; nothing on the others."""

    def masters(self) -> dict[str, Tensor]:
        """The fp32 values of everything that trains, by name, in full on rank 0; nothing on the others."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back; every rank is given all of them."""

    def close(self) -> None:
        """Let go of the memory; nothing else is to be called after this."""


class LossModel(nn.Module):
    """An LM whose forward pass ends in the loss, so that one forward is all that uses its weights.

    DeepSpeed gathers a module's weights around that module's forward. The head's weight is used without calling the
    head (train/loss.py), so it is `head` here for which it is gathered, and its gradient arrives as any other does.
    """

    def __init__(self, model: Any, teacher: TeacherModel | None = None):
        super().__init__()
        self.model, self.head = model, LossHead(model)
        self.teacher, self.lesson = teacher, None if teacher is None else DistilledHead(model, teacher)

    def forward(
        self, ids: Tensor, labels: Tensor, each: bool = False, objective: Objective | None = None, **attention: Any
    ) -> Tensor:
        if objective is not None:
            assert self.teacher is not None
            return distilled_loss(self.model, self.lesson, self.teacher, objective, ids, labels, **attention)
        hidden = hidden_states(self.model, ids, **attention)  # (b, T, E)
        losses: Tensor = self.head(hidden.flatten(0, 1), labels.flatten(), each)
        return losses.view(2, *labels.shape) if each else losses


class LossHead(nn.Module):
    """The loss of hidden states by a model's own head, whose weight stays the model's: this module has none."""

    def __init__(self, model: Any):
        super().__init__()
        self.weight = partial(output_weight, model)

    def forward(self, hidden: Tensor, labels: Tensor, each: bool) -> Tensor:
        weight = self.weight()
        return token_scores(hidden, weight, labels) if each else linear_cross_entropy(hidden, weight, labels)[0]


class LocalEngine:
    """One process: fp32 masters and AdamW in torch."""

    rank, world = 0, 1

    def __init__(self, model: Any, spec: OptimizerSpec, teacher: TeacherModel | None = None):
        self.model, self.loss = model, LossModel(model, teacher)
        self.optimizer = MasterAdamW(trainable(model), spec)
        self.clip = RelativeClip(spec.clip)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def total(self, *values: float) -> list[float]:
        return list(values)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate_factor: float) -> tuple[float, float]:
        norm = self.optimizer.gradient_norm()
        if norm != norm or norm == float("inf"):
            self.optimizer.adamw.zero_grad(set_to_none=True)
            return norm, 0.0
        scale = self.clip.scale(norm)
        self.optimizer.step(rate_factor, scale)
        return norm, scale

    def tensors(self) -> dict[str, Tensor]:
        return self.optimizer.tensors()

    def masters(self) -> dict[str, Tensor]:
        return {name.removeprefix(f"{MASTER}/"): x for name, x in self.tensors().items() if name.startswith(MASTER)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.optimizer.adamw.zero_grad(set_to_none=True)
        self.optimizer.load(tensors)

    def close(self) -> None:
        self.optimizer.adamw.state.clear()
