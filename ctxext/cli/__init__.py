"""The command line: parses options, loads specs, calls one function, prints. stdout: data; stderr: messages."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM ended, as shells report it


def main() -> None:
    """Runs the `ctxext` command. Exit codes: 0, 1 a check failed, 2 bad input, 3 environment, 130 interrupted."""
    from ctxext.cli import console
    from ctxext.cli.app import app
    from ctxext.errors import CtxextError

    # SIGTERM raises an exception, as Ctrl-C does, so that unfinished outputs are removed. Training has its own handler.
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="ctxext")
    except CtxextError as error:
        if console.debug:
            traceback.print_exc()
        console.fail(error, rank=_rank())
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.say("interrupted")
        sys.exit(130)
    except Exception as error:
        from ctxext.config.output import environment_fault

        # A full disk or missing permission is reported as an error of the environment; anything else is a bug.
        fault = environment_fault(error, Path.cwd() / "runs")
        if fault is None or console.debug:
            raise
        console.fail(fault)
        sys.exit(fault.exit_code)
    finally:
        signal.signal(signal.SIGTERM, before)


def _rank() -> int:
    """The rank of this process; 0 for a process that is alone, and where the variables of a starter are wrong."""
    from ctxext.errors import InputError
    from ctxext.train.ranks import started_rank

    try:
        started = started_rank()
    except InputError:
        return 0
    return 0 if started is None else started.rank


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
