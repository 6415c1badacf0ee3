"""ctxext convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext convert llama2-7b --hybrid swa128-nope\n
  ctxext convert ./my-model --hybrid swa128-nope --full-layers 3,7,11\n
  ctxext convert qwen3-8b --hybrid SSSN --sliding-window 512 --dtype bfloat16"""


def convert(
    model: Annotated[str, typer.Argument(help="A local directory, a preset name, or a hub id")],
    hybrid: Annotated[str, typer.Option(help="A layout preset, a YAML file, or a pattern of S, N, F such as SSSN")],
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-convert-<name>]")] = None,
    full_layers: Annotated[
        str | None,
        typer.Option(help="odd, even, last, or layers from 0 such as 3,7,11: these are full, all others sliding"),
    ] = None,
    sliding_window: Annotated[int | None, typer.Option(help="Window in tokens, instead of the preset's")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as stored]")] = None,
    gate: Annotated[bool, typer.Option(help="Prove that the conversion computes what it should")] = True,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Accept pytorch_model.bin weights")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Turn most layers into small sliding windows and leave a few full, without touching the weights."""
    from ctxext.model.convert import plan_conversion, run_conversion

    plan = plan_conversion(
        model,
        hybrid,
        out=out,
        full_layers=full_layers,
        sliding_window=sliding_window,
        dtype=dtype,
        allow_pickle=allow_pickle,
        force=force,
    )
    console.say(f"converting {plan.source.name} to {plan.out}")
    console.quiet_libraries()
    with console.progress() as display:
        task = display.add_task("copying weights", total=None, note="")
        report = run_conversion(
            plan,
            gate=gate,
            force=force,
            progress=lambda done, total: display.update(
                task, completed=done, total=total, description="proving" if done == total else "copying weights"
            ),
        )
    if as_json:
        console.emit(report.as_dict())
    else:
        console.pairs([*report.rows(), ("written to", report.out), ("seconds", f"{report.seconds:.1f}")])
