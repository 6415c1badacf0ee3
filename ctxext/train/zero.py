"""DeepSpeed ZeRO behind the Engine protocol. Tensors are partitioned in memory and whole in everything that is saved.

Gradients: a rank's loss is its share of the step's loss. DeepSpeed averages over ranks, so each loss is multiplied by
`world`. The sum over micro-batches and ranks is then the gradient of the step's loss, as on one process. Learning
rates, groups, clip and batch come from the spec; the file of --zero only says how to partition (train/launch.py).

Tensors of a checkpoint are gathered one parameter at a time, in fp32, under the names that one process uses. So a run
can resume under any stage, on any number of processes, or without DeepSpeed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from ctxext.model.adapters import trainable
from ctxext.model.frequencies import check_realised
from ctxext.model.load import causal_lm, output_weight
from ctxext.train.distill import TeacherModel
from ctxext.train.engine import LossModel
from ctxext.train.finetune_spec import Objective
from ctxext.train.optimizer import MASTER, RelativeClip, by_parameter, parameter_groups
from ctxext.train.parallel import BUCKET
from ctxext.train.ranks import COLLECTIVE_TIMEOUT
from ctxext.train.run_plan import RunPlan

MOMENTS = ("exp_avg", "exp_avg_sq")


def join(zero: Mapping[str, Any], plan: RunPlan, dtype: torch.dtype) -> Ranks:
    """Joins the process group of the run's ranks. Under stage 3, models are partitioned as they load from here on."""
    import deepspeed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # DeepSpeed's shared-memory communication takes a minute to compile, and only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return Ranks(zero, plan, dtype)


class Ranks:
    """The place of this process among the ranks, and DeepSpeed's configuration for a plan.

    Keep the object while the model is in use: it holds the configuration that transformers references weakly.
    """

    def __init__(self, zero: Mapping[str, Any], plan: RunPlan, dtype: torch.dtype):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Micro-batches of a step on each rank: train/parallel.py checks that all ranks get equally many sequences.
        self.accumulation = -(-plan.global_batch_size // (self.world * plan.spec.micro_batch_size))
        self.config: dict[str, Any] = {
            **zero,
            "zero_optimization": dict(zero["zero_optimization"]),
            "train_micro_batch_size_per_gpu": plan.spec.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        self.stage: int = zero["zero_optimization"]["stage"]
        self.loading: Any = None
        if self.stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            self.loading = HfDeepSpeedConfig(self.config)  # transformers keeps only a weak reference

    @contextmanager
    def one_a_host_first(self) -> Iterator[None]:
        """Runs the block on one rank of each host, then on its others, which find the result in the host's cache."""
        # Every rank passes one barrier: the first of a host after the block, the others before it.
        waits = int(os.environ["LOCAL_RANK"]) > 0
        if waits:
            dist.barrier()
        yield
        if not waits:
            dist.barrier()


class ZeroEngine:
    """The engine of one of several processes under ZeRO stage 1, 2 or 3."""

    def __init__(self, model: Any, plan: RunPlan, ranks: Ranks, teacher: TeacherModel | None = None):
        import deepspeed

        self.ranks, self.rank, self.world = ranks, ranks.rank, ranks.world
        self.model, self.clip = model, RelativeClip(plan.spec.optimizer.clip)
        self.parameters = trainable(model)
        self.waiting = 0  # backward passes since the last step
        groups = parameter_groups(self.parameters, plan.spec.optimizer)
        betas = (plan.spec.optimizer.beta1, plan.spec.optimizer.beta2)
        losses = LossModel(model, teacher)
        if ranks.stage == 3 and ranks.config["bf16"]["enabled"]:
            # Stage 3 partitions tensors of one dtype only. Stages 1 and 2 themselves round what PEFT made in fp32.
            for parameter in self.parameters.values():
                parameter.data = parameter.data.bfloat16()
        partition = ranks.config["zero_optimization"]
        entries = sum(getattr(weight, "ds_numel", weight.numel()) for weight in self.parameters.values())
        # A bucket is allocated whole, before the first gradient: limit it to the number of trained entries.
        partition["reduce_bucket_size"] = min(int(partition.get("reduce_bucket_size", BUCKET)), entries)
        optimizer: torch.optim.Optimizer
        if "offload_optimizer" in partition:
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, betas=betas, adamw_mode=True)
        else:
            optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.engine, self.zero, *_ = deepspeed.initialize(model=losses, optimizer=optimizer, config=ranks.config)
        # The loss reads the heads' weights without their modules (train/engine.py). Registered as external parameters,
        # they are gathered around the loss modules.
        if ranks.stage == 3:
            deepspeed.zero.register_external_parameter(losses.head, output_weight(model))
            for weight in losses.distilled_head.weights if losses.distilled_head else ():
                deepspeed.zero.register_external_parameter(losses.distilled_head, weight())
        # Check the RoPE frequencies again: a DeepSpeed that rounds buffers would make long positions wrong.
        check_realised(causal_lm(model), plan.config)
        self._set_step(0)
        if ranks.stage < 3:
            # DeepSpeed does this in its first step, for the first group only. The parameters of the other groups would
            # never be linked to their moments.
            self.zero._lazy_init_hp_params_optimizer_state()

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        device: torch.device = self.engine.device
        return device

    def total(self, *values: float) -> list[float]:
        """Returns each value summed over the ranks in fp64; without values it is a barrier."""
        summed = torch.tensor([0.0, *values], dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed[1:]]

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
        """Returns the loss of this rank's rows, with the weights gathered by DeepSpeed."""
        losses: Tensor = self.engine(
            ids, labels, each=each, objective=objective, token_weights=token_weights, **attention
        )
        return losses

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss; the last micro-batch of a step reduces the gradients over the ranks."""
        self.waiting += 1
        # Ranks reduce gradients and may step only after the last micro-batch of the step.
        self.engine.set_gradient_accumulation_boundary(self.waiting == self.ranks.accumulation)
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, rate_factor: float) -> tuple[float, float]:
        """Updates the weights; returns (gradient norm before clipping, factor of clipping)."""
        for group in self.zero.param_groups:
            group["lr"] = group["rate"] * rate_factor
        # DeepSpeed clips inside its step, so the limit is set before the norm is known. 0 means no clipping.
        self.zero.clip_grad = self.clip.allowed if math.isfinite(self.clip.allowed) else 0.0
        self.engine.step()
        self.waiting = 0
        norm = float(self.engine.get_global_grad_norm())
        if not 0 <= norm < math.inf:  # DeepSpeed returns -1 for NaN
            return math.inf, 0.0
        return norm, self.clip.scale(norm)  # the same factor as DeepSpeed's; this call updates the running mean

    def tensors(self) -> dict[str, Tensor]:
        """Returns masters and moments in full on rank 0, by `<kind>/<name>`; nothing on the others."""
        from deepspeed.utils import safe_get_full_optimizer_state

        # Gathering is collective: every rank calls it for every parameter, only rank 0 keeps the result.
        found = {f"{MASTER}/{name}": master for name, master in self.masters().items()}
        step = next(float(state["step"]) for state in self.zero.optimizer.state.values())
        for name, parameter in self.parameters.items():
            for kind in MOMENTS:
                self._keep(found, f"{kind}/{name}", safe_get_full_optimizer_state(parameter, kind))
            self._keep(found, f"step/{name}", torch.tensor(step))
        return found

    def masters(self) -> dict[str, Tensor]:
        """Returns what trains, in fp32 and in full on rank 0, by name; nothing on the others."""
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self._keep(found, name, safe_get_full_fp32_param(parameter))
        return found

    def _keep(self, found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if self.rank == 0:
            found[name] = tensor.detach().to("cpu", torch.float32, copy=True)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the result of `tensors`: every rank gets whole tensors and keeps its own part."""
        held = by_parameter(tensors, self.parameters)
        # A step clears the gradients that a rollback discards. The code below overwrites all that this step changes.
        if self.waiting:
            self.engine.step()
            self.waiting = 0
        # Moments must exist before they are set, so the step count and zero moments come first.
        self._set_step(next(iter(held.values()))["step"].item())
        for name, parameter in self.parameters.items():
            for kind, tensor in held[name].items():
                if kind != "step":
                    self._put(parameter, kind, tensor)
            self._put_weight(parameter, held[name][MASTER])

    def close(self) -> None:
        """Frees the memory of DeepSpeed and of the model."""
        from deepspeed.runtime.zero import parameter_offload

        self.engine.destroy()
        # Hooks of stage 3 keep references to the model. Replace all its tensors by empty ones, so that memory is freed.
        if self.ranks.stage == 3:
            parameter_offload.FWD_MODULE_STACK.clear()
            parameters = list(self.engine.module.parameters())
            parts = [parameter.ds_tensor for parameter in parameters]
            for tensor in tree_leaves((parameters, parts, vars(self.zero), [*self.zero.optimizer.state.values()])):
                if isinstance(tensor, Tensor):
                    tensor.data = tensor.new_empty(0)

    def _set_step(self, step: float) -> None:
        """Sets AdamW's step count, and moments of zero where it has none yet."""
        # The flat masters of this rank have another name in each optimizer of DeepSpeed.
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        flat = next(getattr(self.zero, name) for name in names if hasattr(self.zero, name))  # stage 3; 1 and 2; 1, bf16
        for part in flat:
            state = self.zero.optimizer.state[part]
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(part))
            in_torch = isinstance(self.zero.optimizer, torch.optim.AdamW)
            state["step"] = torch.tensor(step, dtype=torch.float32, device=part.device) if in_torch else int(step)

    def _put(self, parameter: Tensor, kind: str, tensor: Tensor) -> None:
        """Sets this rank's part of a parameter's master or moment from the whole `tensor`."""
        from deepspeed import utils

        if self.ranks.stage < 3:
            if kind == MASTER:
                utils.safe_set_full_fp32_param(parameter, tensor)
            else:
                utils.safe_set_full_optimizer_state(parameter, tensor, kind)
            return
        # Stage 3 divides a flat parameter into `world` parts of equal size; the last one is padded with zeros.
        size = parameter.ds_tensor.numel()
        whole = pad(tensor.flatten(), (0, size * self.world - tensor.numel()))
        part = whole[self.rank * size : (self.rank + 1) * size]
        if kind == MASTER:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)

    def _put_weight(self, parameter: Tensor, master: Tensor) -> None:
        """Writes a master into the model's own weight, in the dtype that the model computes in."""
        import deepspeed

        if self.ranks.stage < 3:
            parameter.copy_(master)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.rank == 0:
                parameter.copy_(master)
