"""The command line: parse, load specs, call one function, print. stdout is data, stderr is talk."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path


def main() -> None:
    """The `ctxext` command. Exit codes: 0, 1 a check failed, 2 bad input, 3 environment, 130 interrupted."""
    from ctxext.cli import console
    from ctxext.cli.app import app
    from ctxext.errors import CtxextError

    try:
        app(prog_name="ctxext")
    except CtxextError as error:
        if console.debug:
            traceback.print_exc()
        console.fail(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.say("interrupted")
        sys.exit(130)
    except Exception as error:
        from ctxext.config.output import environment_fault

        fault = environment_fault(error, Path.cwd() / "runs")
        if fault is None or console.debug:
            raise
        console.fail(fault)
        sys.exit(fault.exit_code)
