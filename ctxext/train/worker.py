"""The processes that train/launch.py starts: `python -m ctxext.train.worker RUN` a rank, `... RUN NODE` a host."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config.output import environment_fault, write_whole
from ctxext.errors import CtxextError, EnvironmentFault, InputError, SpecError
from ctxext.train.launch import DIED, EVENTS, LAUNCH, LOGS, REPORT, STOP, TICK, kill, port_in_use, start_ranks, watch
from ctxext.train.parallel import Launch
from ctxext.train.ranks import PORT, leave

if TYPE_CHECKING:
    from ctxext.train.finetune import FinetuneReport
    from ctxext.train.loop import Events


def run_rank(run: Path) -> None:
    """Trains as the rank that the environment names. Rank 0 writes its events and its report to the run's directory."""
    from ctxext.train.loop import Events

    logs = run / LOGS
    # Only rank 0 reports events and watches for a stop; the loop passes its decision to the other ranks.
    events = Events()
    if os.environ["RANK"] == "0":
        tell = _event_writer(logs / EVENTS)
        events = Events(lambda line: tell(say=line), lambda metrics: tell(step=metrics.as_dict()))
        threading.Thread(target=_poll_stop, args=(logs / STOP, os.getppid()), daemon=True).start()
    report = train_rank(run, events)
    if os.environ["RANK"] == "0":
        write_whole(logs / REPORT, json.dumps(report.as_dict()))
    leave()


def train_rank(run: Path, events: Events | None = None, launch: Launch | None = None) -> FinetuneReport:
    """Trains the run of a directory with a spec.yaml as one rank of it. Without `launch`, launch.json is read."""
    from ctxext.train.finetune import run_finetune
    from ctxext.train.run_directory import plan_resumed
    from ctxext.train.run_plan import divided

    launch = launch or Launch.read(run / LAUNCH)
    # The plan comes from run/spec.yaml, with the memory of one rank.
    plan = divided(plan_resumed(run), launch.partition)
    return run_finetune(plan, run, resume=launch.resume, events=events, zero=launch.zero)


def run_host(run: Path, node: int) -> int:
    """Starts and watches the ranks of one of several hosts, and stops them when another host has lost a rank."""
    launch, died = Launch.read(run / LAUNCH), run / LOGS / DIED
    port, parent = int(os.environ.get("MASTER_PORT", PORT)), os.getppid()

    def look() -> None:
        if died.exists() or os.getppid() != parent:
            raise SystemExit(1)

    # SIGTERM raises SystemExit, so that `finally` below ends the ranks.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    processes = start_ranks(run, launch, node, launch.hosts[0].name, port)
    try:
        death = watch(processes, look)
    finally:
        kill(processes)
    # Report the failure to the launcher and the other hosts, unless an earlier one is reported: that one caused this.
    if death is not None and not died.exists():
        write_whole(died, json.dumps(asdict(death)))
    return 0 if death is None else 1


def _event_writer(path: Path) -> Callable[..., None]:
    def tell(**event: Any) -> None:
        # These lines are only progress output: if the disk is full they are lost, and the run continues. The file has
        # to end in a whole line, since the launcher parses each line as JSON.
        line = json.dumps(event).encode() + b"\n"
        try:
            with path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(line) < len(line):
                    file.truncate(before)
        except OSError:
            return

    return tell


def _poll_stop(flag: Path, parent: int) -> None:
    """Sends SIGTERM to this process when the run has to stop, or when the launching process is gone.

    The training loop then saves, and all ranks end.
    """
    while not flag.exists() and os.getppid() == parent:
        time.sleep(TICK)
    os.kill(os.getpid(), signal.SIGTERM)


def _refusal(error: BaseException, run: Path) -> CtxextError | None:
    """The error to show to the user for an exception; None for an unexpected one, whose traceback is needed."""
    if isinstance(error, SpecError):
        return InputError(error.message, hint=error.hint)
    if "EADDRINUSE" in str(error):
        return port_in_use(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    return error if isinstance(error, CtxextError) else environment_fault(error, run)


def main(arguments: list[str]) -> int:
    """Runs one rank of a run, or with a host number all ranks of that host; returns the exit code."""
    run = Path(arguments[0])
    if len(arguments) > 1:
        return run_host(run, int(arguments[1]))
    try:
        run_rank(run)
    except Exception as error:
        refusal = _refusal(error, run)
        if refusal is None:
            raise
        data = {"type": type(refusal).__name__, "message": refusal.message, "hint": refusal.hint}
        try:
            write_whole(run / LOGS / f"error-{os.environ['RANK']}.json", json.dumps(data))
        except EnvironmentFault:
            # Without this file, the launcher shows the last line of the rank's log.
            sys.stderr.write(f"{refusal.message}\n")
        return refusal.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
