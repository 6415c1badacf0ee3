"""The rank of a process that torchrun, accelerate launch, deepspeed, srun or mpirun started. No torch at import.

`ctxext finetune` under such a program is one rank of a run (train/shared_run.py). Otherwise train/launch.py starts the
ranks.

Not done: watching the ranks. What happens after one of them dies is decided by the program that started them: torchrun
ends the others; srun does so with --kill-on-bad-exit=1.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

from ctxext.errors import InputError

PORT = 29500  # of the host of rank 0, where the starter names none
COLLECTIVE_TIMEOUT = timedelta(hours=12)  # of a collective: rank 0 may be tokenising


@dataclass(frozen=True)
class StartedRank:
    """The rank of this process in a group that `starter` started, as `starter` gives it in the environment."""

    starter: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int

    def variables(self, gpus: int) -> dict[str, str]:
        """Returns the variables that torch and DeepSpeed read. `gpus` is the number that this process sees."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": "0" if self.has_own_gpu(gpus) else str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }

    def has_own_gpu(self, gpus: int) -> bool:
        """Whether the starter shows each process its own GPU alone, as srun does with --gpus-per-task=1."""
        return self.starter in ("srun", "mpirun") and gpus == 1


@cache
def started_rank() -> StartedRank | None:
    """Returns the rank of this process by its environment at the first call: train/shared_run.py adds variables."""
    return read_rank(os.environ, terminal=sys.stdin is not None and sys.stdin.isatty())


def read_rank(environ: Mapping[str, str], *, terminal: bool = False) -> StartedRank | None:
    """Returns the rank that the variables give; None for a process that is alone.

    `terminal`: stdin is one, as in a shell of `srun --pty`. Raises InputError where the variables contradict each other
    or are incomplete, and for FSDP of accelerate.
    """
    if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise InputError(
            "accelerate launch with FSDP: ranks are divided by DeepSpeed ZeRO", hint="leave --use_fsdp out"
        )
    found = None
    # srun and mpirun come last: torchrun may itself have been started by one of them, once a host.
    for starter, find in (("torchrun", _of_torchrun), ("srun", _of_slurm), ("mpirun", _of_mpi)):
        try:
            found = found or find(environ)
        except KeyError as error:
            raise InputError(f"the variables of {starter} are incomplete: {error} is not set") from None
        except ValueError as error:
            raise InputError(f"the variables of {starter} cannot be read: {error}") from error
    # A shell of `srun --pty` is one process, although its variables count all tasks of the step. They are inherited by
    # the tasks of a step that is started in this shell: those have no terminal.
    if found is None or (terminal and "SLURM_PTY_PORT" in environ):
        return None
    if not 0 <= found.rank < found.world:
        raise InputError(f"{found.starter} gives rank {found.rank} of {found.world}: allowed is 0 to {found.world - 1}")
    return found if found.world > 1 else None


def _of_torchrun(environ: Mapping[str, str]) -> StartedRank | None:
    # accelerate launch and deepspeed set the same variables as torchrun.
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if world == 1:
        return StartedRank("torchrun", rank, 1, 0, 1, "127.0.0.1", PORT)
    return StartedRank(
        starter="torchrun",
        rank=rank,
        world=world,
        local_rank=int(environ["LOCAL_RANK"]),
        # deepspeed names it LOCAL_SIZE.
        local_world=int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world),
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
    )


def _of_slurm(environ: Mapping[str, str]) -> StartedRank | None:
    # A batch script has SLURM_PROCID, too. Only processes of srun have the number of tasks of their step.
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    world = int(environ["SLURM_STEP_NUM_TASKS"])
    # Jobs on one host must not share a port. Every task of a job computes the same one.
    port = PORT + int(environ.get("SLURM_JOB_ID", 0)) % 1000
    return StartedRank(
        starter="srun",
        rank=int(environ["SLURM_PROCID"]),
        world=world,
        local_rank=int(environ["SLURM_LOCALID"]),
        local_world=_tasks_of_first_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world))),
        address=environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        port=int(environ.get("MASTER_PORT", port)),
    )


def _of_mpi(environ: Mapping[str, str]) -> StartedRank | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    world, local_world = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    one_host = world == local_world
    return StartedRank(
        starter="mpirun",
        rank=int(environ["OMPI_COMM_WORLD_RANK"]),
        world=world,
        local_rank=int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),
        local_world=local_world,
        # mpirun does not say which host has rank 0.
        address=environ.get("MASTER_ADDR", "127.0.0.1") if one_host else environ["MASTER_ADDR"],
        port=int(environ.get("MASTER_PORT", PORT)),
    )


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list: "gpu[003-005,9],cpu1" gives "gpu003"."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodelist!r}")
    return f"{match[1]}{match[2] or ''}{match[3]}"


def _tasks_of_first_node(text: str) -> int:
    # "8(x2),4" is eight tasks on each of two nodes, then four.
    return int(re.split(r"[(,]", text)[0])


def leave() -> None:
    """Waits for all ranks, then ends the process group.

    A thread of gloo that still runs at the exit sometimes aborts its process.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
