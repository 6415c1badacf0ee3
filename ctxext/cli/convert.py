"""ctxext convert"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.cli import console
from ctxext.cli.options import AsJson, Force, out_option, takes
from ctxext.errors import InputError
from ctxext.requests import AUTO, RETRIEVAL, ConvertRequest

if TYPE_CHECKING:
    from ctxext.retrofit.planner import LayerPlan

EXAMPLES = """Examples:\n
  ctxext convert llama2-7b --hybrid swa128-nope\n
  ctxext convert ./my-model --hybrid swa128-nope --full-layers 3,7,11\n
  ctxext convert ./my-model --hybrid swa128-nope --full-layers auto --budget 25% --length 100k\n
  ctxext convert ./my-model --hybrid swa128 --full-layers retrieval --budget 8\n
  ctxext convert qwen3-8b --hybrid SSSN --sliding-window 512 --dtype bfloat16"""


@takes(ConvertRequest)
def convert(
    request: ConvertRequest,
    out: Annotated[Path | None, out_option("convert-<name>")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="auto, retrieval: print what was measured of each layer")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Accept pytorch_model.bin weights")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert most layers to small sliding windows and keep a few full, without changing the weights."""
    from ctxext import api

    if explain and request.full_layers not in (AUTO, RETRIEVAL):
        raise InputError("--explain needs --full-layers auto or retrieval", hint="add --full-layers auto")
    console.quiet_libraries()
    with console.progress("starting") as progress:
        report = api.convert(
            request, out=out, allow_pickle=allow_pickle, force=force, say=console.say, progress=progress
        )
    if as_json:
        console.emit(report.as_dict() | ({} if report.planner is None else {"planner": report.planner.as_dict()}))
        return
    if report.planner is not None:
        _print_choice(report.planner, explain)
    console.pairs([*report.rows(), ("written to", report.out), ("seconds", f"{report.seconds:.1f}")])


def _print_choice(chosen: LayerPlan, explain: bool) -> None:
    if explain:
        console.table(chosen.EXPLAIN, chosen.explain())
        print()
    console.table(chosen.HEADER, chosen.rows())
    print()
    for line in chosen.notes():
        console.say(line)
