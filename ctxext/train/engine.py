"""What moves the weights: one interface, so that the loop reads the same on one process and on many.

`Engine` is what the loop needs; `LocalEngine` is one process without DeepSpeed, the simple default. Ranks share one
step: each runs some of its sequences, gradients are summed over all of them, and what is saved does not depend on how
many there were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ctxext.model.adapters import trainable
from ctxext.train.optimizer import MASTER, MasterAdamW, RelativeClip
from ctxext.train.spec import OptimizerSpec


class Engine(Protocol):
    """`model` is what is called forward, of which `rank` 0 to `world` - 1 has a part or a copy; `clip` is remembered.

    All methods but `backward` are collective: every rank calls them, in the same order.
    """

    model: Any
    clip: RelativeClip
    rank: int
    world: int

    @property
    def device(self) -> torch.device: ...

    def total(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""

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


class LocalEngine:
    """One process: fp32 masters and AdamW in torch."""

    rank, world = 0, 1

    def __init__(self, model: Any, spec: OptimizerSpec):
        self.model = model
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
