"""Saves and loads everything that an exact resume needs: masters, moments, clip, loss mean, step, RNG.

Each checkpoint is one directory, `checkpoints/step-000050/`: tensors as safetensors, the rest as JSON with the sha256
of the tensors. It is written under a temporary name in the same directory, synced to the disk and renamed, and the new
name is synced before older checkpoints are removed. Nothing is pickled. The data position is the step itself, since
sequence i is a pure function of i (data/packing.py). Tensors are whole and in fp32, even where DeepSpeed partitions
them, so a run can resume on another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctxext.config.output import environment_fault, sync, sync_tree
from ctxext.errors import EnvironmentFault
from ctxext.model.shards import open_shard
from ctxext.train.engine import Engine
from ctxext.train.optimizer import MASTER

STATE, TENSORS, RNG = "state.json", "tensors.safetensors", "rng"
DAMAGE = (OSError, ValueError, KeyError, EnvironmentFault)  # errors from reading a damaged checkpoint


@dataclass
class TrainingState:
    """The progress of a run after `done` steps.

    rate                   factor on the learning rates, halved by each rollback
    rollbacks              the reason of each rollback
    loss_mean, loss_seen   the running mean of the loss, for detecting spikes, in nats a token, and its number of steps
    first_loss             of the first step at this ctx and with this objective
    validation             the one before the first step at this ctx (`Validation.as_dict`); None where there is none
    best_step, best_loss   the best validation at this ctx; its checkpoint is kept; step None: the start is the best
    short_first            held-out loss at the original length before the run
    """

    done: int = 0
    rate: float = 1.0
    loss_mean: float = 0.0
    loss_seen: int = 0
    rollbacks: tuple[str, ...] = ()
    first_loss: float = 0.0
    validation: dict[str, Any] | None = None
    best_step: int | None = None
    best_loss: float | None = None
    short_first: float | None = None

    def at_next_objective(self) -> TrainingState:
        """Returns the state for a new objective, whose losses are not comparable with those so far."""
        return replace(self, loss_mean=0.0, loss_seen=0)

    def at_next_ctx(self) -> TrainingState:
        """Returns the state for a longer context, whose losses are not comparable with those so far."""
        return replace(self, loss_mean=0.0, loss_seen=0, validation=None, best_step=None, best_loss=None)


def save_checkpoint(
    run: Path,
    progress: TrainingState,
    engine: Engine,
    *,
    keep: int,
    say: Callable[[str], None],
    before: Callable[[], None] = lambda: None,
) -> str | None:
    """Writes a checkpoint and removes all but the newest `keep` and the best.

    Returns None, or the reason why the checkpoint was not written, which is also logged as a warning. On a full disk
    the earlier checkpoints stay whole. `before` writes the log lines of the steps so far to disk: a run that resumes
    from the checkpoint needs them. Every rank calls this function, rank 0 writes, and all ranks get the result.
    """
    tensors = engine.tensors()
    failed = _write(run, progress, engine, tensors, keep, say, before) if engine.rank == 0 else None
    # All-reduce, so that all ranks act on the failure together.
    (failures,) = engine.total(float(failed is not None))
    return failed or ("rank 0 could not write it" if failures else None)


def _write(
    run: Path,
    progress: TrainingState,
    engine: Engine,
    tensors: Mapping[str, Tensor],
    keep: int,
    say: Callable[[str], None],
    before: Callable[[], None],
) -> str | None:
    root = run / "checkpoints"
    target = root / f"step-{progress.done:06d}"
    partial = root / f".{target.name}.partial"
    try:
        # One process at a time trains a run (train/run_directory.py, `alone`): a partial checkpoint is from one that
        # died.
        for stale in root.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        before()
        partial.mkdir(parents=True)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole | {RNG: torch.get_rng_state()}, partial / TENSORS)
        # The hash shows at loading whether the tensors are complete.
        state = asdict(progress) | {"clip_mean": engine.clip.mean, "clip_seen": engine.clip.seen}
        state["sha256"] = _sha256(partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
        # On the disk before the rename: after a power loss, a checkpoint under its final name has its contents.
        sync_tree(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        # The new name must be on the disk before the older checkpoints are removed. `root` may be new as well.
        sync(root)
        sync(run)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # A fault of the disk is a warning; any other error is a defect and is raised.
        fault = error if isinstance(error, EnvironmentFault) else environment_fault(error, run)
        if fault is None and not isinstance(error, OSError):
            raise
        why = str(error) if fault is None else fault.message
        say(f"warning: the checkpoint after step {progress.done} was not written ({why}); the earlier ones are kept")
        return why
    for old in _checkpoints(run)[:-keep]:
        if _step(old) != progress.best_step:
            shutil.rmtree(old, ignore_errors=True)
    return None


def load_newest(
    run: Path, engine: Engine, say: Callable[[str], None], *, step: int | None = None
) -> TrainingState | None:
    """Loads the newest whole checkpoint into the engine and returns its state; None where there is none.

    A damaged checkpoint is logged and skipped. `step`: only the checkpoint of this step. Raises ModelError where the
    checkpoint has another set of trained tensors.
    """
    for checkpoint in reversed(_checkpoints(run)):
        if step is not None and _step(checkpoint) != step:
            continue
        try:
            state, tensors = _read(checkpoint)
        except DAMAGE as error:
            say(f"warning: {checkpoint} is damaged ({error}); trying the checkpoint before it")
            continue
        # Nothing is changed before the whole checkpoint is read and its hash is checked.
        torch.set_rng_state(tensors.pop(RNG))
        engine.load(tensors)
        engine.clip.mean, engine.clip.seen = state.pop("clip_mean"), state.pop("clip_seen")
        return TrainingState(**(state | {"rollbacks": tuple(state["rollbacks"])}))
    return None


def kept(run: Path, say: Callable[[str], None]) -> list[tuple[int, Callable[[str], Tensor | None]]]:
    """Returns the whole checkpoints of a run, oldest first: (step, a reader of the trained tensors).

    The reader returns the fp32 value of a parameter by its name in the model, None for one that did not train; it reads
    the file at each call. A damaged checkpoint is logged and skipped.
    """
    found = list[tuple[int, Callable[[str], Tensor | None]]]()
    for checkpoint in _checkpoints(run):
        try:
            _state(checkpoint)
        except DAMAGE as error:
            say(f"{checkpoint} is damaged ({error}); it is skipped")
            continue
        found.append((_step(checkpoint), partial(_master, checkpoint / TENSORS)))
    return found


def newest_step(run: Path) -> int:
    """Returns the step of the newest checkpoint, whole or damaged; 0 where there is none."""
    return max((_step(checkpoint) for checkpoint in _checkpoints(run)), default=0)


def discard_after(run: Path, step: int) -> None:
    """Removes the checkpoints of steps after `step`, which a rollback or a resume has discarded."""
    for checkpoint in _checkpoints(run):
        if _step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def _read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return _state(checkpoint), load_file(checkpoint / TENSORS)


def _state(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint, after its tensors are checked against the sha256. Raises an error of DAMAGE."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text("utf-8"))
    if _sha256(checkpoint / TENSORS) != state.pop("sha256"):
        raise EnvironmentFault(f"{TENSORS} is damaged: its sha256 differs from the recorded one")
    return state


def _master(path: Path, name: str) -> Tensor | None:
    with open_shard(path) as (names, get):
        return get(f"{MASTER}/{name}") if f"{MASTER}/{name}" in names else None


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
