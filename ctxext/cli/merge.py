"""ctxext merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext merge\n
  ctxext merge runs/20260101T000000.000000Z-finetune-tiny --out ./long-model --dtype bfloat16\n
  ctxext merge --alpha-multiplier auto --nope-scale auto --length 32k --data ./books\n
  ctxext merge --alpha-multiplier 0.8"""


def merge(
    run: Annotated[str | None, typer.Argument(help="A finetune run [default: the newest]")] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-merge-<name>]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: the base's]")] = None,
    alpha_multiplier: Annotated[
        str | None,
        typer.Option(
            metavar="auto|X", help="Multiply the change of all trained tensors (LoRA, embeddings, norms) by X"
        ),
    ] = None,
    nope_scale: Annotated[
        str | None,
        typer.Option(metavar="auto|X", help="Multiply the queries of layers without positions by X, in the weights"),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(help="--nope-scale auto: the length to calibrate for, such as 32k [default: the usable length]"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="auto: text to choose and report on [default: the embedded corpus's held-out files]"),
    ] = None,
    restore: Annotated[
        str | None,
        typer.Option(metavar="qk", help="qk: take the projections of queries and keys from the base, untrained"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Merge an adapter, in fp32, into an ordinary Hugging Face directory, and verify that nothing was lost.

    --restore is applied first, then --alpha-multiplier; --nope-scale is chosen for the result.
    """
    from ctxext.config import manifest as manifests

    if run is None:
        run = str(manifests.newest(manifests.RUNS, ("finetune",)))
        console.say(f"no RUN given; using the newest, {run}")
    from ctxext.eval_and_merge import merge_run, plan_merge

    given = {"alpha_multiplier": alpha_multiplier, "nope_scale": nope_scale, "length": length, "data": data,
             "restore": restore}  # fmt: skip
    plan = plan_merge(run, out, dtype, force, **{name: value for name, value in given.items() if value is not None})
    console.quiet_libraries()
    report = merge_run(plan, notice=console.say)
    if as_json:
        console.emit(report.as_dict())
    else:
        console.pairs([*report.rows(), ("written to", report.out), ("seconds", f"{report.seconds:.1f}")])
