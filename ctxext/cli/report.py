"""ctxext report"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext report runs/20260101T000000.000000Z-eval-perplexity\n
  ctxext report runs/*-eval-* runs/*-finetune-* --out ./report --title "tiny, before and after" """


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Outputs of eval, finetune and probe; of any other output only the manifest is shown"
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-report-<name>]")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page [default: the first model's name]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON")] = False,
) -> None:
    """Write evaluations, probes and training runs into one HTML file with tables and pictures, readable offline."""
    from ctxext.report.page import plan_report, write_report

    plan = plan_report(runs, out=out, title=title, force=force)
    written = write_report(plan)
    if as_json:
        console.emit(asdict(written))
    else:
        console.pairs(
            [
                ("page", written.page),
                ("pictures", str(len(written.pictures))),
                ("models", ", ".join(written.models) or "none"),
                ("runs", ", ".join(written.runs)),
            ]
        )
