"""ctxext report"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from ctxext.cli import console
from ctxext.cli.options import Force, json_option, out_option, takes
from ctxext.requests import ReportRequest

EXAMPLES = """Examples:\n
  ctxext report runs/20260101T000000.000000Z-eval-perplexity\n
  ctxext report runs/*-eval-* runs/*-finetune-* --out ./report --title "tiny, before and after" """


@takes(ReportRequest)
def report(
    request: ReportRequest,
    out: Annotated[Path | None, out_option("report-<name>")] = None,
    force: Force = False,
    as_json: Annotated[bool, json_option("what was written")] = False,
) -> None:
    """Write evaluations, probes and training runs into one HTML file with tables and pictures, readable offline."""
    from ctxext import api

    written = api.write_report(request, out=out, force=force)
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
