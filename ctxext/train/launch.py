"""Starts, watches and stops one run on many processes, and reports its result. No torch in the launching process.

Not used where another program has started the processes: see train/shared_run.py.

Each process gets its rank from torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and
everything else from the run's directory, which all hosts see under the same path. torchrun's own agent is not used: it
kills 30 seconds after a signal, before a long step can finish and be saved, and it does not report to its parent which
process died.

run/launch.json           the ZeRO configuration and the hosts
run/logs/rank-0.log       the output of a process, with its traceback
run/logs/events.jsonl     what rank 0 reports, one event per line
run/logs/report.json      what rank 0 returns
run/logs/error-0.json     the error of a process, with a message and a hint
run/logs/died.json        with several hosts: the process that ended first, so that the other hosts stop theirs
run/logs/stop             created when the run has to save and end

run/logs is removed unless it holds something that the user needs to read.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from ctxext.errors import CheckFailed, CtxextError, DataError, EnvironmentFault, InputError, ModelError
from ctxext.machine.cgroups import cores
from ctxext.machine.gpu import visible_gpus
from ctxext.train.parallel import Launch, plan_launch
from ctxext.train.ranks import PORT, started_rank
from ctxext.train.run_plan import RunPlan, divided

LAUNCH, LOGS = "launch.json", "logs"
EVENTS, REPORT, DIED, STOP = "events.jsonl", "report.json", "died.json", "stop"  # file names in LOGS
GRACE, KILL_AFTER, TICK = 5.0, 3.0, 0.1  # seconds: other processes may end by themselves; wait after SIGTERM; polling
# Prefixes of the variables that go to hosts reached by ssh. Tokens do not, since `ps` would show them, and neither does
# the choice of GPUs.
PASSED_ON = (
    "NCCL_",
    "GLOO_",
    "MASTER_",
    "OMP_",
    "TORCH_",
    "PYTORCH_",
    "TRITON_",
    "CUDA_DEVICE_",
    "DS_",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
)
# Prefixes of variables with which torchrun and accelerate describe the group of this process.
STARTERS = ("TORCHELASTIC_", "GROUP_", "ROLE_", "ACCELERATE_")
# Process names of a compilation in progress.
BUILD_PROCESSES = {"ninja", "cc1plus", "g++", "c++", "nvcc", "cicc"}
STALE_LOCK_SECONDS = 60.0  # a younger lock may belong to a build that is starting
KINDS = {kind.__name__: kind for kind in (InputError, ModelError, DataError, EnvironmentFault, CheckFailed)}


@dataclass(frozen=True)
class Death:
    """The process that ended first. `code` is its exit code, or a negative signal number."""

    name: str
    code: int

    def words(self) -> str:
        """Returns what happened, for an error message."""
        how = f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name
        return f"{self.name} failed ({how})"


def launched(
    plan: RunPlan,
    zero: str | None,
    nproc: int | None,
    hostfile: Path | None,
    *,
    resume: bool = False,
    repeats: Path | None = None,
) -> tuple[RunPlan, Launch | None]:
    """Decides how many processes run a plan, and returns the plan with the memory of one process.

    `repeats`: an earlier run whose processes are used again. The Launch is None for one process without DeepSpeed.
    Where another program has started the processes (train/ranks.py), these are the processes of the run.
    """
    before = Launch.read(repeats / LAUNCH) if repeats and (repeats / LAUNCH).is_file() else None
    launch = plan_launch(plan, zero, nproc, hostfile, resume=resume, repeats=before, started=started_rank())
    return (divided(plan, launch.partition) if launch else plan), launch


def launch_run(run: Path, launch: Launch, say: Callable[[str], None], on_step: Callable[[Any], None]) -> dict[str, Any]:
    """Executes run/spec.yaml on all processes and returns the fields of the FinetuneReport.

    The first Ctrl-C or SIGTERM lets the run save and end; the second one kills it. Raises the error of rank 0, or of
    the process that failed first, and EnvironmentFault for a process that died.
    """
    check_environment(launch)
    check_port(launch)
    logs = run.absolute() / LOGS
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    (run / LAUNCH).write_text(launch.dump(), "utf-8")
    # The tail reads events.jsonl step by step; watch() advances it in each round.
    tail = _events(logs / EVENTS, say, on_step)
    processes = {}
    with _stopping(logs / STOP) as stopping:
        try:
            # Whatever happens here, no process may survive this function.
            processes = _start(run.absolute(), launch)
            death = watch(processes, lambda: next(tail))
        except KeyboardInterrupt:
            shutil.rmtree(logs)
            raise
        finally:
            kill(processes)
        next(tail)
    if (logs / DIED).exists():
        death = Death(**json.loads((logs / DIED).read_text("utf-8")))
    if death is not None:
        if stopping() and death.code == -signal.SIGTERM:  # before the first step; nothing to save
            shutil.rmtree(logs)
            raise KeyboardInterrupt
        # _fault keeps the logs where a traceback has to be read.
        raise _fault(logs, death)
    # Success: all processes ended with code 0, and rank 0 wrote its report.
    report: dict[str, Any] = json.loads((logs / REPORT).read_text("utf-8"))
    shutil.rmtree(logs)
    return report | {"out": str(run)}


def check_environment(launch: Launch) -> None:
    """Raises EnvironmentFault if the run cannot start here: no DeepSpeed, no compiler or a stale lock."""
    if find_spec("deepspeed") is None:
        raise EnvironmentFault("DeepSpeed is not installed", hint="pip install deepspeed, or leave --zero out")
    # An offloaded optimizer is compiled by DeepSpeed when it first runs.
    if launch.compiles:
        needed = (os.environ.get("CXX", "c++"), "ninja")
        missing = [name for name in needed if shutil.which(name, path=rank_environment(launch)["PATH"]) is None]
        if missing:
            raise EnvironmentFault(
                f"{' and '.join(missing)} not found: DeepSpeed compiles its CPU optimizer when it first runs",
                hint="install a C++ compiler and ninja, or use a ZeRO configuration without offload_optimizer",
            )
        _check_locks()


def check_port(launch: Launch) -> None:
    """Raises EnvironmentFault if another process uses the port at which several hosts connect to this one."""
    first = launch.hosts[0]
    if len(launch.hosts) > 1 and first.local:
        # Test the port now: if another run uses it, the ranks would fail later and less clearly.
        port = int(os.environ.get("MASTER_PORT", PORT))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise port_in_use(first.name, port) from error


def port_in_use(host: str, port: int | str) -> EnvironmentFault:
    """Returns the error for a port that another process uses."""
    return EnvironmentFault(
        f"port {port} of {host}, which the processes need to connect, is in use",
        hint="another run may be using it: end that run, or choose another port with MASTER_PORT=29501",
    )


def _check_locks() -> None:
    """Raises for a stale lock: a killed build leaves one, and every later run waits for it without a message."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache)
    old = [lock for lock in sorted(root.glob("**/lock")) if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS]
    if old and not any(process.info["name"] in BUILD_PROCESSES for process in psutil.process_iter(["name"])):
        raise EnvironmentFault(
            f"{old[0]} was left by a build that was killed; DeepSpeed would wait for this lock without end",
            hint=f"remove it: rm {shlex.quote(str(old[0]))}",
        )


def _start(run: Path, launch: Launch) -> dict[str, subprocess.Popen[bytes]]:
    """Starts the ranks if all are on this host; otherwise one process per host, which starts its own ranks."""
    if len(launch.hosts) == 1 and launch.hosts[0].local:
        return start_ranks(run, launch, 0, "127.0.0.1", _free_port())
    processes = {}
    for node, host in enumerate(launch.hosts):
        command = [sys.executable, "-m", "ctxext.train.worker", str(run), str(node)]
        if not host.local:
            # ssh passes no variables on; set the needed ones with `env`, in the same directory.
            known = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(PASSED_ON)]
            remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *known, *command])}"
            command = ["ssh", "-o", "BatchMode=yes", host.name, remote]
        with (run / LOGS / f"host-{node}.log").open("wb") as log:
            processes[f"host {host.name}"] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
    return processes


def start_ranks(run: Path, launch: Launch, node: int, address: str, port: int) -> dict[str, subprocess.Popen[bytes]]:
    """Starts the ranks of one host. Their output goes to run/logs. Ctrl-C in a terminal does not reach them."""
    # Ranks are numbered host by host, in the order of the hostfile.
    first = sum(host.slots for host in launch.hosts[:node])
    slots, processes = launch.hosts[node].slots, {}
    for local in range(slots):
        rank = first + local
        place = {
            "RANK": rank,
            "LOCAL_RANK": local,
            "WORLD_SIZE": launch.world,
            "LOCAL_WORLD_SIZE": slots,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        environment = rank_environment(launch, slots) | {key: str(value) for key, value in place.items()}
        with (run / LOGS / f"rank-{rank}.log").open("wb") as log:
            processes[f"rank {rank}"] = subprocess.Popen(
                [sys.executable, "-m", "ctxext.train.worker", str(run)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    return processes


def rank_environment(launch: Launch, slots: int = 1) -> dict[str, str]:
    """Returns this process's variables plus those that a rank needs. Variables that are already set are not changed."""
    known = {
        "OMP_NUM_THREADS": str(max(1, cores() // slots)),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if visible_gpus() == 0:
        known["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would choose by itself
    if launch.stage == 3:
        known["MALLOC_MMAP_THRESHOLD_"] = str(1024**2)  # or glibc keeps the memory of other ranks' weights
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"  # pip installs ninja beside python
    # torch would look for the store of a torchrun that started this process, and not for that of the ranks.
    own = {name: value for name, value in os.environ.items() if not name.startswith(STARTERS)}
    return known | own | {"PATH": path}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def watch(processes: Mapping[str, subprocess.Popen[bytes]], look: Callable[[], object]) -> Death | None:
    """Waits until all processes have ended. Returns the first that failed, or None if all succeeded.

    After a failure the others get GRACE seconds to write their own errors. `look` is called in every round; an
    exception from `look` ends the wait.
    """
    while True:
        look()
        codes = {name: process.poll() for name, process in processes.items()}
        bad = [Death(name, code) for name, code in codes.items() if code]
        if bad:
            death = min(bad, key=lambda death: death.code)  # signals are negative: a killed rank is the cause
            until = time.monotonic() + GRACE
            while time.monotonic() < until and any(process.poll() is None for process in processes.values()):
                time.sleep(TICK)
            return death
        if all(code == 0 for code in codes.values()):
            return None
        time.sleep(TICK)


def kill(processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Ends all processes that still run.

    Without the other ranks a rank cannot save and would wait for ever. The process of a host ends its own ranks.
    """
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + KILL_AFTER
    for process in processes.values():
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _fault(logs: Path, death: Death) -> CtxextError:
    """The error of a failed run: the one that a process wrote, or which process died and where its traceback is."""
    refusals = sorted(logs.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if refusals:
        data = json.loads(refusals[0].read_text("utf-8"))
        shutil.rmtree(logs)
        refusal: CtxextError = KINDS[data["type"]](data["message"], hint=data["hint"])
        return refusal
    log = logs / f"{death.name.replace(' ', '-')}.log"
    # No process wrote an error. Quote the last line of the log, unless a signal ended the process.
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip() and death.code > 0), None)
    return EnvironmentFault(
        f"{death.words()}; the others were stopped" + (f": {last.strip()[:200]}" if last else ""),
        hint="it was killed from outside, often because the machine ran out of memory (see dmesg)"
        if death.code == -signal.SIGKILL
        else f"the traceback is in {log}",
    )


@contextmanager
def _stopping(flag: Path) -> Iterator[Callable[[], bool]]:
    """Creates the file `flag`, which rank 0 polls, at the first SIGINT or SIGTERM. The next acts as usual."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        flag.touch()
        # Restore the old handlers at once, so that a second signal ends this process.
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield flag.exists
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _events(path: Path, say: Callable[[str], None], on_step: Callable[[Any], None]) -> Iterator[None]:
    """Each `next` reports the events that rank 0 wrote since the last one."""
    done = 0
    while True:
        if path.exists():
            with path.open("rb") as file:
                file.seek(done)
                for line in file:
                    # Rank 0 is still writing this line; read it in the next round.
                    if not line.endswith(b"\n"):
                        break
                    done += len(line)
                    event = json.loads(line)
                    on_step(SimpleNamespace(**event["step"])) if "step" in event else say(event["say"])
        yield
