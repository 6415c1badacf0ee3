"""Ranks that another program started: torchrun, accelerate launch, deepspeed, srun or mpirun. No torch at import.

`ctxext finetune` under such a program is one rank of a run. Rank 0 plans the run and creates its directory. It then
shares the directory with the other ranks through the key-value store of torch.distributed at MASTER_ADDR:MASTER_PORT,
and every rank trains in its own process. Without such a program train/launch.py starts the ranks.

Not done here: watching the ranks. What happens after one of them dies is decided by the program that started them:
torchrun ends the others; srun does so with --kill-on-bad-exit=1.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.errors import EnvironmentFault, InputError

if TYPE_CHECKING:
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.parallel import Launch

PORT = 29500  # of the host of rank 0, where the starter names none
CONNECT_TIMEOUT = timedelta(minutes=10)  # until all ranks have started
COLLECTIVE_TIMEOUT = timedelta(hours=12)  # of a collective: rank 0 may be tokenising
DIRECTORY_TIMEOUT, TICK = 60.0, 0.1  # seconds: until a shared file system shows the run to every host; polling
LEAVE_DELAY = 3.0  # seconds that the other ranks wait for rank 0 to end with its error
LEAVE_TIMEOUT = 10.0  # seconds that rank 0 waits for the others to read that there is no run


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
    """Returns the rank of this process as its environment gave it first: `_store` sets more variables later."""
    return read_rank(os.environ)


def read_rank(environ: Mapping[str, str]) -> StartedRank | None:
    """Returns the rank that the variables give; None for a process that is alone.

    Raises InputError where the variables contradict each other or are incomplete.
    """
    found = None
    # srun and mpirun come last: torchrun may itself have been started by one of them, once a host.
    for starter, find in (("torchrun", _of_torchrun), ("srun", _of_slurm), ("mpirun", _of_mpi)):
        try:
            found = found or find(environ)
        except KeyError as error:
            raise InputError(f"the variables of {starter} are incomplete: {error} is not set") from None
        except ValueError as error:
            raise InputError(f"the variables of {starter} cannot be read: {error}") from error
    if found is None:
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
        local_world=int(environ.get("LOCAL_WORLD_SIZE", world)),
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
    )


def _of_slurm(environ: Mapping[str, str]) -> StartedRank | None:
    # A batch script has SLURM_PROCID, too. Only processes of srun have the number of tasks of their step. A shell of
    # `srun --pty` runs on one task, whatever the number of tasks is.
    if "SLURM_STEP_NUM_TASKS" not in environ or "SLURM_PTY_PORT" in environ:
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


@contextmanager
def leading(started: StartedRank | None) -> Iterator[None]:
    """Runs the block as rank 0. If it fails before `share_run`, the other ranks end as well.

    Without other ranks it only runs the block.
    """
    if started is None:
        yield
        return
    store = _store(started)
    try:
        yield
    except BaseException as error:
        try:
            # This has no effect after `share_run`: each rank reads the key once.
            store.set("run", json.dumps({"exit_code": getattr(error, "exit_code", 1)}))
            until = time.monotonic() + LEAVE_TIMEOUT
            # The store may live in this process, which must not end before the others have read the key.
            while store.add("read", 0) < started.world - 1 and time.monotonic() < until:
                time.sleep(TICK)
        except RuntimeError:
            pass  # the store is gone, and the other ranks with it; the error of the block is what matters
        raise


def share_run(started: StartedRank, run: Path, launch: Launch) -> None:
    """Writes launch.json beside the spec.yaml of a run, tells the other ranks its directory, and joins them."""
    from ctxext.train.launch import LAUNCH

    (run / LAUNCH).write_text(launch.dump(), "utf-8")
    _store(started).set("run", json.dumps({"run": str(run.absolute())}))
    _join(started)


def follow(started: StartedRank) -> FinetuneReport | int:
    """Trains as a rank other than 0. Returns the report, or the exit code of rank 0 where that has no run."""
    store = _store(started)
    try:
        store.wait(["run"], COLLECTIVE_TIMEOUT)
        shared = json.loads(store.get("run"))
        store.add("read", 1)
    except RuntimeError as error:
        raise EnvironmentFault(f"rank 0 ended before it had a run: {error}", hint="see the output of rank 0") from error
    if "exit_code" in shared:
        # torchrun reports the process that ends first, so that rank 0 has to end before this one.
        time.sleep(LEAVE_DELAY)
        code: int = shared["exit_code"]
        return code
    run = Path(shared["run"])
    _wait_for_directory(run)
    _join(started)
    from ctxext.train.worker import train_rank

    return train_rank(run)


def _wait_for_directory(run: Path) -> None:
    from ctxext.train.launch import LAUNCH

    # Network file systems show a new file to other hosts after a delay.
    until = time.monotonic() + DIRECTORY_TIMEOUT
    while not (run / LAUNCH).is_file():
        if time.monotonic() > until:
            raise EnvironmentFault(
                f"this host does not see {run}, which rank 0 created",
                hint="all hosts must see the run's directory under the same path; give --out on a shared file system",
            )
        time.sleep(TICK)


@cache
def _store(started: StartedRank) -> Any:
    """Connects to the store of the ranks. Waits until all ranks have connected."""
    from torch import distributed

    from ctxext.machine.gpu import visible_gpus
    from ctxext.train.launch import port_in_use

    os.environ.update(started.variables(visible_gpus()))
    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=CONNECT_TIMEOUT))
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise port_in_use(started.address, started.port) from error
        raise EnvironmentFault(
            f"rank {started.rank} of {started.world} found no other ranks at {started.address}:{started.port} "
            f"within {CONNECT_TIMEOUT.seconds // 60} minutes",
            hint=f"{started.starter} has to start {started.world} processes; without other processes unset WORLD_SIZE",
        ) from error
    return distributed.PrefixStore("ctxext", store)


def _join(started: StartedRank) -> None:
    """Creates the process group over the store that is already connected. DeepSpeed uses the group that it finds."""
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import of DeepSpeed, which would choose by itself
    if not distributed.is_initialized():
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=distributed.PrefixStore("group", _store(started)),
            rank=started.rank,
            world_size=started.world,
            timeout=COLLECTIVE_TIMEOUT,
        )


def leave() -> None:
    """Ends the communication of all ranks together.

    Threads of gloo that still run when a process ends sometimes abort it.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
