"""Reads the weights of a finetune run at every step still on disk: its start, its checkpoints, its result.

A run removes its checkpoints when it ends, unless faults.keep_at_end is set. This module reads fp32 masters by
parameter name (train/checkpoint.py); for a run that trains adapters, these are A, B and the modules trained whole. All
steps are measured under the result's config, with its positions and layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxext.config import manifest as manifests
from ctxext.errors import InputError, ModelError
from ctxext.model.shards import open_shard, tensor_reader
from ctxext.model.source import ModelSource
from ctxext.model.weights import ADAPTER_FILE
from ctxext.probes.plan_probes import is_run, result_step
from ctxext.train.checkpoint import kept

PEFT, LORA, WHOLE = "base_model.model.", ".lora_", ".modules_to_save.default"


@dataclass(frozen=True)
class State:
    """The trained parameters at one step: `read` returns a parameter by its name in the model in memory."""

    step: int
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class History:
    """A run's `states`, oldest first: the weights at its start (step 0), its checkpoints, its `result`.

    weights       reads the start weights by their names in an ordinary checkpoint
    checkpoints   number of checkpoints, without the one of the result's step
    """

    states: tuple[State, ...]
    result: State
    weights: Callable[[str], Tensor]
    checkpoints: int

    @property
    def start(self) -> State:
        """Returns the state at the start of the run."""
        return self.states[0]


def history(source: ModelSource, say: Callable[[str], None]) -> History:
    """Returns the history of a finished finetune run; `say` gets a line for each damaged checkpoint, which is skipped.

    Raises InputError where the model is no such run, ModelError where the model it started from has changed.
    """
    if source.manifest is None or not is_run(source):
        raise InputError(f"{source.name} is not a finetune run", hint="name the directory of a finetune run")
    run, adapters, last = source.directory, source.base is not None, result_step(source)
    weights = _required(
        tensor_reader(source.base.directory if source.base else _began_from(source)), "the model before training"
    )
    result = State(last, _adapter(run) if adapters else _required(tensor_reader(run), str(run)))

    def untrained(name: str) -> Tensor:
        if LORA in name:
            return torch.zeros_like(result.read(name))  # B is zero at the start, so A does not matter
        return weights(name.removeprefix(PEFT).replace(WHOLE, ""))

    # The result is read from its own files, so the checkpoint of the same step is not needed.
    found = [State(step, _required(read, f"step {step}")) for step, read in kept(run, say) if step != last]
    states = sorted([State(0, untrained), *found, result], key=lambda state: state.step)
    return History(tuple(states), result, weights, len(found))


@torch.no_grad()
def put(model: Any, state: State) -> None:
    """Copies the weights of a state into the model of its run, in memory. Raises ModelError where they do not fit."""
    adapters = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        # With adapters only A, B and the modules trained whole differ between states; the base stays.
        if not adapters or LORA in name or WHOLE in name:
            tensor = state.read(name)
            if tensor.shape != parameter.shape:
                raise ModelError(f"step {state.step}: {name} is {list(tensor.shape)}, not {list(parameter.shape)}")
            parameter.copy_(tensor)


def projection(history: History, state: State, source: ModelSource, name: str) -> Tensor:
    """Returns the weight fp32 [out,in] of a linear layer at a state, with its adapter folded in: W + scale B A.

    `name` is such as model.layers.0.self_attn.q_proj. Only this weight is read.
    """
    if source.base is None:
        return state.read(f"{name}.weight").float()
    weight = history.weights(f"{name}.weight").float()
    # Scales are stored by the module's own name, such as q_proj. None means that this module has no adapter.
    scale = lora_scales(source.directory).get(name.rpartition(".")[2])
    if scale is None:
        return weight
    a, b = (state.read(f"{PEFT}{name}{LORA}{side}.default.weight").float() for side in "AB")
    return weight + scale * (b @ a)


def lora_scales(run: Path) -> dict[str, float]:
    """Returns alpha / rank of each module that has an adapter, by module name."""
    config = json.loads((run / "adapter_config.json").read_text("utf-8"))
    return {
        name: (config.get("alpha_pattern") or {}).get(name, config["lora_alpha"]) / config["r"]
        for name in config["target_modules"]
    }


def _began_from(source: ModelSource) -> Path:
    """Returns the model that a run with `tuning: full` started from. Raises ModelError if it is gone or has changed."""
    assert source.manifest is not None
    parent = source.manifest.parents["source"]
    path = Path(parent["path"])
    if not path.is_dir() or manifests.weight_hashes(path) != parent["weights"]:
        raise ModelError(
            f"{source.name}: the model it was trained from, {path}, is missing or has other weights",
            hint="put it back: the weights of the run's first step come from it",
        )
    return path


def _adapter(run: Path) -> Callable[[str], Tensor]:
    path = run / ADAPTER_FILE

    def read(name: str) -> Tensor | None:
        stored = name.replace(WHOLE, "").replace(".default", "")
        with open_shard(path) as (names, get):
            return get(stored) if stored in names else None

    return _required(read, str(path))


def _required(read: Callable[[str], Tensor | None], where: str) -> Callable[[str], Tensor]:
    def reading(name: str) -> Tensor:
        tensor = read(name)
        if tensor is None:
            raise ModelError(
                f"{where} has no tensor {name}",
                hint="the checkpoint belongs to another run: remove it, or probe that run",
            )
        return tensor

    return reading
