"""AdamW on fp32 master weights, with a clip relative to the running mean of the gradient norm.

A norm weight of 1.0 in bf16 never changes under updates of 2e-5 (the next bf16 number is 0.004 away), so every trained
parameter has an fp32 master. The optimizer updates only masters, gradients are summed in fp32, and after a step the
masters are rounded into the model. A parameter that is already fp32 is its own master.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctxext.errors import EnvironmentFault, ModelError
from ctxext.model.adapter_plan import is_fitted
from ctxext.model.adapters import full_shape
from ctxext.train.finetune_spec import OptimizerSpec

LORA_MARK, MASTER = ".lora_", "master"
WSD_DECAY = 0.2  # share of the steps


class MasterAdamW:
    """AdamW (decoupled weight decay) over the masters of `trainable`, a mapping name -> parameter.

    LoRA matrices, and everything under full tuning, train at `learning_rate`; with an adapter, modules trained whole
    train at `whole_learning_rate`, and fitted sinks and biases at `sinks_learning_rate`.
    """

    def __init__(self, trainable: Mapping[str, Tensor], spec: OptimizerSpec):
        self.parameters = dict(trainable)
        self.masters = {name: _master(parameter) for name, parameter in self.parameters.items()}
        options = parameter_groups(self.masters, spec)
        self.adamw = _adamw(spec.name, options, (spec.beta1, spec.beta2))

    def gradient_norm(self) -> float:
        """Returns the 2-norm of all gradients together, before any clipping."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def step(self, rate_factor: float, gradient_scale: float) -> None:
        """Updates with gradients times `gradient_scale` at `rate_factor` times the learning rates; clears gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = group["rate"] * rate_factor
        if gradient_scale != 1.0:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.mul_(gradient_scale)
        # An objective may not reach a parameter. It still takes the step, as under ZeRO, with a gradient of zero.
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.write_back()

    def tensors(self) -> dict[str, Tensor]:
        """Returns masters and moments for saving: `master/<name>`, `exp_avg/<name>` and other optimizer state."""
        found = {f"{MASTER}/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                found[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the result of `tensors`. Raises ModelError where it belongs to another set of parameters."""
        moments = by_parameter(tensors, self.masters)
        for name, master in self.masters.items():
            master.copy_(moments[name].pop(MASTER))
            state = {key: value.to(master.device) for key, value in moments[name].items()}
            # torch's fused kernel reads `step` as a tensor on the weights' device; bitsandbytes counts in an int.
            if not isinstance(self.adamw, torch.optim.AdamW):
                state["step"] = int(state["step"])
            self.adamw.state[master] = state
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters into the model's own parameters."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)


def by_parameter(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns a checkpoint's tensors as {parameter: {kind: tensor}}.

    Raises ModelError where the parameters differ from `own` in name or shape.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        found.setdefault(name, {})[kind] = tensor
    # The names must agree in both directions. Under ZeRO-3 `full_shape` is the shape of the whole parameter.
    strange = sorted(found.keys() ^ own.keys())
    if strange:
        raise ModelError(
            f"the checkpoint holds {len(found)} trained tensors, this run {len(own)}; first difference: {strange[0]}"
        )
    for name, parameter in own.items():
        stored, wanted = tuple(found[name][MASTER].shape), tuple(full_shape(parameter))
        if stored != wanted:
            raise ModelError(
                f"the checkpoint holds {name} as {list(stored)}, this run trains {list(wanted)}",
                hint="this change needs a new run: start one, or leave the change out",
            )
    return found


def parameter_groups(tensors: Mapping[str, Tensor], spec: OptimizerSpec) -> list[dict[str, Any]]:
    """Returns the optimizer's groups by learning rate and weight decay; `rate` is the rate before the schedule."""
    adapter = any(LORA_MARK in name for name in tensors)
    whole_rate = spec.whole_learning_rate or spec.learning_rate
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in tensors.items():
        rate = spec.learning_rate
        # With an adapter, the tensors that are not LoRA matrices have rates of their own.
        if adapter and LORA_MARK not in name:
            rate = spec.sinks_learning_rate if is_fitted(name) else whole_rate
        decay = spec.weight_decay if len(full_shape(tensor)) > 1 else 0.0  # norms and biases are not decayed
        groups.setdefault((rate, decay), []).append(tensor)
    return [
        {"params": params, "lr": rate, "rate": rate, "weight_decay": decay} for (rate, decay), params in groups.items()
    ]


def _adamw(name: str, options: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The optimizer that the spec names. Raises EnvironmentFault where bitsandbytes is needed and missing."""
    if name == "adamw":
        return torch.optim.AdamW(options, betas=betas, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise EnvironmentFault(
            f"optimizer.name: {name} needs bitsandbytes, which is not installed ({error})",
            hint="install bitsandbytes, or train with optimizer.name=adamw",
        ) from error
    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    optimizer: torch.optim.Optimizer = kinds[name](options, betas=betas)
    return optimizer


def _master(parameter: Tensor) -> Tensor:
    """The fp32 master of a parameter; a hook moves each gradient to it.

    A bf16 gradient is freed in the backward pass that made it.
    """
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float().requires_grad_(True)

    def collect(source: Tensor) -> None:
        assert source.grad is not None
        gradient = source.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        source.grad = None

    parameter.register_post_accumulate_grad_hook(collect)
    return master


def rate_factor(step: int, steps: int, spec: OptimizerSpec) -> float:
    """Returns the factor on the learning rates at `step` (from 0).

    Linear warm-up, then constant, a cosine down to 0.1, or WSD (warm-up, stable, decay): constant until the last fifth,
    then linear to 0.
    """
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    if spec.schedule == "constant":
        return 1.0
    if spec.schedule == "wsd":
        return min(1.0, (steps - step) / (WSD_DECAY * steps))
    progress = (step - spec.warmup_steps) / max(1, steps - spec.warmup_steps)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class RelativeClip:
    """Scales down a gradient whose norm is more than `limit` times the running mean of the norms before it.

    Gradients of an adapter contain its scale alpha / rank (norms of 20 are normal at alpha 724), so a fixed clip of 1
    would act at every step, as a second learning rate. The mean is exponential (0.95) over the clipped norms. The first
    5 steps only fill it; nothing is clipped in them.
    """

    WARM_STEPS = 5
    DECAY = 0.95

    def __init__(self, limit: float, mean: float = 0.0, seen: int = 0):
        self.limit, self.mean, self.seen = limit, mean, seen

    @property
    def allowed(self) -> float:
        """The largest norm that the next gradient may have; infinite in the first WARM_STEPS steps."""
        return math.inf if self.seen < self.WARM_STEPS else self.limit * self.mean

    def scale(self, norm: float) -> float:
        """Returns the factor for a gradient of this norm, 1.0 for an ordinary one, and adds the norm to the mean.

        The caller must handle a norm that is NaN.
        """
        # The plain mean of the norms at first, then exponential.
        clipped = min(norm, self.allowed)
        weight = max(1 - self.DECAY, 1 / (self.seen + 1))
        self.mean += weight * (clipped - self.mean)
        self.seen += 1
        return clipped / norm if norm > 0 else 1.0
