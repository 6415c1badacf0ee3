"""ctxext export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console
from ctxext.cli.options import Force, json_option, out_option, takes
from ctxext.errors import InputError
from ctxext.requests import ExportRequest

EXAMPLES = """Examples:\n
  ctxext export ./merged\n
  ctxext export ./merged --target vllm --out ./for-vllm\n
  ctxext export ./merged --target gguf --check-only --json"""


@takes(ExportRequest)
def export(
    request: ExportRequest,
    out: Annotated[Path | None, out_option("export-<target>-<name>")] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Print whether the target supports the model; write nothing")
    ] = False,
    force: Force = False,
    as_json: Annotated[bool, json_option("the verdict and what was written")] = False,
) -> None:
    """Export a model for a program that supports its exact windows and NoPE layers; exit code 1 if it does not."""
    from ctxext import api

    if check_only and (out is not None or force):
        raise InputError(
            "--check-only writes nothing, so --out and --force have no effect",
            hint="leave out --check-only, or --out and --force",
        )
    verdict = api.check_export(request, out=out, force=force)
    # Where the target does not support the model, its verdict is printed and the command fails.
    if check_only or not verdict.honoured:
        if as_json:
            console.emit(verdict.as_dict())
        else:
            console.pairs(verdict.rows(), to_stderr=not check_only)
        verdict.refuse()
        return
    done = api.export_model(request, out=out, force=force)
    if as_json:
        console.emit(done.as_dict())
    else:
        console.pairs(done.rows())
