"""A run on ranks that another program started: rank 0 has the run, and the other ranks follow it.

Rank 0 plans the run and creates its directory. It then shares the directory and its launch with the other ranks
through a key-value store of torch.distributed at MASTER_ADDR:MASTER_PORT, and every rank trains in its own process.
The functions wait in short steps, so that SIGTERM and Ctrl-C reach a waiting rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.errors import EnvironmentFault, NoSharedRun
from ctxext.machine.gpu import visible_gpus
from ctxext.train.launch import LAUNCH, port_in_use, rank_environment
from ctxext.train.parallel import Launch
from ctxext.train.ranks import COLLECTIVE_TIMEOUT, StartedRank
from ctxext.train.run_directory import SPEC_FILE

if TYPE_CHECKING:
    from ctxext.train.finetune import FinetuneReport

CONNECT_SECONDS = 600.0  # until all ranks have started
CONNECT_SLICE = timedelta(seconds=2)  # one attempt to connect; signals arrive between two attempts
NOTICE_SECONDS = 10.0  # after which rank 0 says what it waits for
DIRECTORY_SECONDS = 60.0  # until a shared file system shows the run to every host
LEAVE_DELAY = 3.0  # seconds that the other ranks wait for rank 0 to end with its error
LEAVE_SECONDS = 10.0  # seconds that rank 0 waits for the others to read that there is no run
TICK = 0.1  # seconds between two looks


class SharedStore:
    """The store that all ranks are connected to. The keys of a run contain its number: a process may train several."""

    def __init__(self, store: Any, started: StartedRank):
        self.store, self.started, self.runs = store, started, 0

    def begin(self) -> None:
        """Starts the next run of this process. Every rank calls it equally often."""
        self.runs += 1

    def key(self, name: str) -> str:
        """Returns the key of `name` in the current run."""
        return f"{name}/{self.runs}"

    def wait_for(self, name: str) -> Any:
        """Waits until a rank has set `name`, and returns the value. Raises RuntimeError where the store has gone."""
        while not self.store.check([self.key(name)]):
            time.sleep(TICK)
        return json.loads(self.store.get(self.key(name)))

    def wait_for_count(self, name: str, count: int, seconds: float) -> bool:
        """Returns whether the counter `name` reaches `count` in time."""
        until = time.monotonic() + seconds
        while self.store.add(self.key(name), 0) < count:
            if time.monotonic() > until:
                return False
            time.sleep(TICK)
        return True


@contextmanager
def leading(started: StartedRank | None, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Runs the block as rank 0. If it fails before `share_run`, the other ranks end as well.

    Without other ranks it only runs the block. `say` logs what is waited for.
    """
    if started is None:
        yield
        return
    shared = _connected(started)
    shared.begin()
    _wait_for_ranks(shared, say)
    try:
        yield
    except BaseException as error:
        try:
            # After `share_run` this has no effect: every rank has read the key and is counted.
            shared.store.set(shared.key("run"), json.dumps({"exit_code": exit_code(error)}))
            # The store may live in this process, which must not end before the others have read the key.
            shared.wait_for_count("read", started.world - 1, LEAVE_SECONDS)
        except RuntimeError:
            pass  # the store is gone, and the other ranks with it; the error of the block is what matters
        raise


def exit_code(error: BaseException) -> int:
    """Returns the exit code with which the command line ends after an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        return EnvironmentFault.exit_code
    code: int = getattr(error, "exit_code", 1)  # CtxextError and typer.Exit have one
    return code


def _wait_for_ranks(shared: SharedStore, say: Callable[[str], None]) -> None:
    started = shared.started
    shared.store.add(shared.key("ready"), 1)
    if shared.wait_for_count("ready", started.world, NOTICE_SECONDS):
        return
    where = f"{started.address}:{started.port}"
    say(f"waiting for {started.world} processes of {started.starter} to connect to {where}")
    if not shared.wait_for_count("ready", started.world, CONNECT_SECONDS - NOTICE_SECONDS):
        raise _lonely(started)


def share_run(started: StartedRank, run: Path, launch: Launch) -> None:
    """Writes launch.json beside the spec.yaml of a run, tells the other ranks about the run, and joins them."""
    (run / LAUNCH).write_text(launch.dump(), "utf-8")
    spec = hashlib.sha256((run / SPEC_FILE).read_bytes()).hexdigest()
    shared = _connected(started)
    facts = {"run": str(run.absolute()), "spec": spec, "launch": launch.dump()}
    shared.store.set(shared.key("run"), json.dumps(facts))
    _join(shared, launch)


def follow(started: StartedRank) -> FinetuneReport:
    """Trains as a rank other than 0 and returns the report. Raises NoSharedRun where rank 0 has no run."""
    shared = _connected(started)
    shared.begin()
    try:
        shared.store.add(shared.key("ready"), 1)
        found = shared.wait_for("run")
        shared.store.add(shared.key("read"), 1)
    except RuntimeError as error:
        raise EnvironmentFault(f"rank 0 ended before it had a run: {error}", hint="see the output of rank 0") from error
    if "exit_code" in found:
        # torchrun reports the process that ends first, so that rank 0 has to end before this one.
        time.sleep(LEAVE_DELAY)
        raise NoSharedRun(found["exit_code"])
    run, launch = Path(found["run"]), Launch.parse(found["launch"])
    _wait_for_spec(run, found["spec"])
    _join(shared, launch)
    from ctxext.train.worker import train_rank

    return train_rank(run, launch=launch)


def _wait_for_spec(run: Path, sha256: str) -> None:
    # Network file systems show a new or changed file to other hosts after a delay.
    until = time.monotonic() + DIRECTORY_SECONDS
    while True:
        try:
            if hashlib.sha256((run / SPEC_FILE).read_bytes()).hexdigest() == sha256:
                return
        except OSError:
            pass  # not there yet
        if time.monotonic() > until:
            raise EnvironmentFault(
                f"this host does not see {run}, which rank 0 created",
                hint="all hosts must see the run's directory under the same path; give --out on a shared file system",
            )
        time.sleep(TICK)


def _lonely(started: StartedRank) -> EnvironmentFault:
    return EnvironmentFault(
        f"rank {started.rank} of {started.world} found no other ranks at {started.address}:{started.port} within "
        f"{CONNECT_SECONDS / 60:.0f} minutes",
        hint=f"{started.starter} has to start {started.world} processes; for one process unset its variables",
    )


@cache
def _connected(started: StartedRank) -> SharedStore:
    """Connects this process to the store. Rank 0 provides it, unless torchrun does.

    Raises EnvironmentFault where the port is in use, and where no store appears within CONNECT_SECONDS.
    """
    from torch import distributed

    os.environ.update(started.variables(visible_gpus()))
    provided = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    until = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            store: Any = distributed.TCPStore(
                started.address,
                started.port,
                is_master=started.rank == 0 and not provided,
                wait_for_workers=False,
                multi_tenant=True,  # a script may have a store of its own at this port
                timeout=CONNECT_SLICE,
            )
            break
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):
                raise port_in_use(started.address, started.port) from error
            if time.monotonic() > until:
                raise _lonely(started) from error
            time.sleep(TICK)
    # The process group reads this timeout: ranks wait in the store while another one tokenises.
    store.set_timeout(COLLECTIVE_TIMEOUT)
    # torchrun starts all ranks again after a failure, with the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return SharedStore(distributed.PrefixStore(f"ctxext/{attempt}", store), started)


def _join(shared: SharedStore, launch: Launch) -> None:
    """Creates the process group over the store that is already connected. DeepSpeed uses the group that it finds."""
    import torch
    from torch import distributed

    started = shared.started
    # PATH leads to the compiler of DeepSpeed's kernels.
    os.environ.update(rank_environment(launch, started.local_world))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        _check_devices(shared, str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    if not distributed.is_initialized():
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=distributed.PrefixStore(shared.key("group"), shared.store),
            rank=started.rank,
            world_size=started.world,
            timeout=COLLECTIVE_TIMEOUT,
        )
    assert distributed.get_world_size() == launch.world, "the launch is of another number of processes"


def _check_devices(shared: SharedStore, uuid: str) -> None:
    started = shared.started
    shared.store.set(shared.key(f"device {started.rank}"), json.dumps(f"{socket.gethostname()} {uuid}"))
    require_own_gpu([shared.wait_for(f"device {rank}") for rank in range(started.world)])


def require_own_gpu(devices: Sequence[str]) -> None:
    """Raises EnvironmentFault where two ranks have the same GPU. `devices`: host and UUID by rank."""
    for rank, device in enumerate(devices):
        if (first := devices.index(device)) < rank:
            raise EnvironmentFault(
                f"ranks {first} and {rank} use the same GPU ({device})",
                hint="start one process for each GPU; with srun for example --gpus-per-task=1",
            )
