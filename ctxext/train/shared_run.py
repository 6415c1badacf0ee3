"""A run on ranks that another program started: rank 0 has the run, and the other ranks follow it.

Rank 0 plans the run and creates its directory. It then shares the directory with the other ranks through the key-value
store of torch.distributed at MASTER_ADDR:MASTER_PORT, and every rank trains in its own process. Nothing heavy is
imported before the first connection.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.errors import EnvironmentFault
from ctxext.machine.gpu import visible_gpus
from ctxext.train.launch import LAUNCH, port_in_use
from ctxext.train.parallel import Launch
from ctxext.train.ranks import COLLECTIVE_TIMEOUT, StartedRank

if TYPE_CHECKING:
    from ctxext.train.finetune import FinetuneReport

CONNECT_TIMEOUT = timedelta(minutes=10)  # until all ranks have started
DIRECTORY_TIMEOUT, TICK = 60.0, 0.1  # seconds: until a shared file system shows the run to every host; polling
LEAVE_DELAY = 3.0  # seconds that the other ranks wait for rank 0 to end with its error
LEAVE_TIMEOUT = 10.0  # seconds that rank 0 waits for the others to read that there is no run


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
