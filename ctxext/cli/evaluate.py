"""ctxext eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext eval --suite perplexity\n
  ctxext eval tiny runs/20260101T000000.000000Z-convert-tiny --suite passkey --lengths 512,1k,2k\n
  ctxext eval ./my-model --suite perplexity --lengths 8k,32k --data book.txt --json"""


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Directories, presets or hub ids [default: the newest output]"),
    ] = None,
    suite: Annotated[str, typer.Option(help="perplexity or passkey")] = "perplexity",
    lengths: Annotated[
        str | None, typer.Option(help="Lengths in tokens, such as 2k,4k,8k [default: the usable length]")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Text to measure on [default: the embedded corpus's held-out files]")
    ] = "embedded",
    text_field: Annotated[str, typer.Option(help="The field with the text, of JSONL and Parquet rows")] = "text",
    protocol: Annotated[str, typer.Option(help="perplexity: hf-stride, longlora or truncate")] = "hf-stride",
    limit: Annotated[
        int | None, typer.Option(help="perplexity: tokens of text; passkey: cases for each length and depth")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the passkey cases")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-eval-<suite>]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Measure models side by side: every number with its protocol, length and text."""
    from ctxext.config import manifest as manifests
    from ctxext.pipeline import eval_models, plan_eval

    if not models:
        newest = manifests.newest(manifests.RUNS, ("conversion", "model", "finetune", "merge"))
        console.say(f"no MODEL given: taking the newest, {newest}")
        models = [str(newest)]
    plan = plan_eval(
        models,
        suite,
        lengths,
        data=data,
        text_field=text_field,
        protocol=protocol,
        limit=limit,
        seed=seed,
        dtype=dtype,
        out=out,
        force=force,
    )
    console.quiet_libraries()
    with console.progress() as display:
        task = display.add_task("loading", total=None, note="")
        report = eval_models(
            plan,
            force=force,
            progress=lambda what, done, total: display.update(task, description=what, completed=done, total=total),
        )
    if as_json:
        console.emit(report.to_dict())
        return
    console.say(plan.caption)
    console.table(*plan.table(report))
    console.say(f"written to {plan.out}")
