"""Everything a run needs to go on as if it had never stopped: masters, AdamW's moments, clip, step, RNG.

One directory a checkpoint, `checkpoints/step-000050/`, written beside and renamed, tensors as safetensors and the rest
as JSON; nothing is pickled. The data cursor is the step itself: sequence i is a pure function of i (data/packing.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctxext.errors import InputError, ModelError
from ctxext.train.optimizer import MasterAdamW, RelativeClip

KEEP = 2
STATE = "state.json"


def save_checkpoint(run: Path, step: int, optimizer: MasterAdamW, clip: RelativeClip) -> Path:
    """Write the state after `step` optimizer steps; the newest two checkpoints are kept."""
    root = run / "checkpoints"
    target = root / f"step-{step:06d}"
    partial = root / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for name, master in optimizer.masters.items():
        tensors[f"master/{name}"] = master.detach()
        for key, value in optimizer.adamw.state.get(master, {}).items():
            tensors[f"{key}/{name}"] = value
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial / "tensors.safetensors")
    state = {"step": step, "clip_mean": clip.mean, "clip_seen": clip.seen, "names": list(optimizer.masters)}
    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in sorted(root.glob("step-*"), key=_step)[:-KEEP]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run. Raises InputError when there is none."""
    found = sorted((path.parent for path in run.glob(f"checkpoints/step-*/{STATE}")), key=_step)
    if not found:
        raise InputError(f"{run}: no checkpoint to resume from", hint="start it anew, without --resume")
    return found[-1]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(checkpoint: Path, optimizer: MasterAdamW, clip: RelativeClip) -> int:
    """Put a checkpoint's state into place; returns the number of steps done.

    Raises ModelError when the checkpoint is of another trainable set.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text("utf-8"))
    if state["names"] != list(optimizer.masters):
        raise ModelError(
            f"{checkpoint}: holds {len(state['names'])} trained tensors, this run has "
            f"{len(optimizer.masters)}, or under other names"
        )
    tensors = load_file(checkpoint / "tensors.safetensors")
    with torch.no_grad():
        for name, master in optimizer.masters.items():
            master.copy_(tensors[f"master/{name}"])
            moments = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors
            }
            optimizer.adamw.state[master] = {k: v if k == "step" else v.to(master.device) for k, v in moments.items()}
    optimizer.write_back()
    torch.set_rng_state(tensors["rng"])
    clip.mean, clip.seen = state["clip_mean"], state["clip_seen"]
    return int(state["step"])
