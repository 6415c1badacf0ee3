"""Everything a run needs to go on as if it had never stopped: masters, moments, clip, loss mean, step, RNG.

One directory a checkpoint, `checkpoints/step-000050/`: tensors as safetensors, the rest as JSON with the sha256 of the
tensors; written beside, flushed to the disk, renamed. Nothing is pickled. The data cursor is the step itself, since
sequence i is a pure function of i (data/packing.py). Tensors are whole and in fp32 whatever DeepSpeed did with them, so
a run may be resumed on another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctxext.errors import EnvironmentFault
from ctxext.train.engine import Engine

STATE, TENSORS, RNG = "state.json", "tensors.safetensors", "rng"


@dataclass
class Progress:
    """Where a run is. `done` steps; `rate` is what rollbacks left of the learning rates; `rollbacks` says why.

    loss_mean, loss_seen   the running mean of the loss that a spike is judged by, in nats a token, and its steps
    """

    done: int = 0
    rate: float = 1.0
    loss_mean: float = 0.0
    loss_seen: int = 0
    rollbacks: tuple[str, ...] = ()


def save_checkpoint(run: Path, progress: Progress, engine: Engine, *, keep: int, say: Callable[[str], None]) -> bool:
    """Write a checkpoint, keep the newest `keep`; False, with a warning, when the disk is full.

    What was written before stays whole then. Every rank calls it, rank 0 writes.
    """
    tensors = engine.tensors()
    if engine.rank > 0:
        return True
    root = run / "checkpoints"
    target = root / f"step-{progress.done:06d}"
    partial = root / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole | {RNG: torch.get_rng_state()}, partial / TENSORS)
        state = asdict(progress) | {"clip_mean": engine.clip.mean, "clip_seen": engine.clip.seen}
        state["sha256"] = _sha256(partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
        for path in partial.iterdir():
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        say(f"warning: the checkpoint after step {progress.done} was not written ({error}); the one before it stays")
        return False
    for old in _checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return True


def load_newest(run: Path, engine: Engine, say: Callable[[str], None]) -> Progress | None:
    """Put the newest whole checkpoint into place; None when there is none. A damaged one is said and passed over.

    Raises ModelError when it is of another set of trained tensors.
    """
    for checkpoint in reversed(_checkpoints(run)):
        try:
            state, tensors = _read(checkpoint)
        except (OSError, ValueError, KeyError, EnvironmentFault) as error:
            say(f"warning: {checkpoint} is damaged ({error}); trying the one before")
            continue
        torch.set_rng_state(tensors.pop(RNG))
        engine.load(tensors)
        engine.clip.mean, engine.clip.seen = state.pop("clip_mean"), state.pop("clip_seen")
        return Progress(**(state | {"rollbacks": tuple(state["rollbacks"])}))
    return None


def discard_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps: what a rollback went back behind."""
    for checkpoint in _checkpoints(run):
        if _step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def _read(checkpoint: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    state = json.loads((checkpoint / STATE).read_text("utf-8"))
    if _sha256(checkpoint / TENSORS) != state.pop("sha256"):
        raise EnvironmentFault(f"{TENSORS} is not what was written: its sha256 differs")
    return state, load_file(checkpoint / TENSORS)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
