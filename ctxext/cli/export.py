"""ctxext export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext export ./merged\n
  ctxext export ./merged --target vllm --out ./for-vllm\n
  ctxext export ./merged --target gguf --check-only --json"""


def export(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_DIR", help="A merged run, a conversion, a model directory")],
    target: Annotated[str, typer.Option(help="hf, vllm, gguf or ollama")] = "hf",
    out: Annotated[
        Path | None, typer.Option(help="Output directory [default: ./runs/<time>-export-<target>-<name>]")
    ] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Print whether the target supports the model; write nothing")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict and what was written as JSON")] = False,
) -> None:
    """Export a model for a program that supports its exact windows and NoPE layers; exit code 1 if it does not."""
    from ctxext.errors import InputError
    from ctxext.export import write

    if check_only and (out is not None or force):
        raise InputError(
            "--check-only writes nothing, so --out and --force have no effect",
            hint="leave out --check-only, or --out and --force",
        )
    # Where the target does not support the model, the verdict is printed and write.refuse raises CheckFailed.
    plan = write.plan_export(model, target, None if check_only else out, force)
    if check_only or not plan.verdict.honoured:
        if as_json:
            console.emit(plan.verdict.as_dict())
        else:
            console.pairs(plan.verdict.rows(), to_stderr=not check_only)
        write.refuse(plan.verdict)
        return
    done = write.export(plan)
    if as_json:
        console.emit(done.as_dict())
    else:
        console.pairs(write.rows(done))
