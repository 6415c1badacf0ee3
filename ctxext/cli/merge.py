"""ctxext merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext merge\n
  ctxext merge runs/20260101T000000.000000Z-finetune-tiny --out ./long-model --dtype bfloat16"""


def merge(
    run: Annotated[str | None, typer.Argument(help="A finetune run [default: the newest]")] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-merge-<name>]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: the base's]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Merge an adapter, in fp32, into an ordinary Hugging Face directory, and prove that nothing was lost."""
    from ctxext.config import manifest as manifests

    if run is None:
        run = str(manifests.newest(manifests.RUNS, ("finetune",)))
        console.say(f"no RUN given: taking the newest, {run}")
    from ctxext.pipeline import merge_run, plan_merge

    plan = plan_merge(run, out, dtype, force)
    console.quiet_libraries()
    report = merge_run(plan)
    if as_json:
        console.emit(report.as_dict())
    else:
        console.pairs([*report.rows(), ("written to", report.out), ("seconds", f"{report.seconds:.1f}")])
