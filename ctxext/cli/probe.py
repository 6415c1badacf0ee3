"""ctxext probe"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from ctxext.cli import console
from ctxext.cli.options import Force, json_option, out_option, takes
from ctxext.requests import ProbeRequest

EXAMPLES = """Examples:\n
  ctxext probe tiny positions\n
  ctxext probe tiny retrieval-heads --ablate 2 --preset smoke\n
  ctxext probe ./converted all --compare tiny --preset smoke --out ./inside\n
  ctxext probe runs/20260101T000000.000000Z-finetune-tiny retrieval-trace qk-distance\n
  ctxext probe llama3.1-8b layer-niah --preset paper --dtype bfloat16 """


@takes(ProbeRequest)
def probe(
    request: ProbeRequest,
    out: Annotated[Path | None, out_option("probe-<name>")] = None,
    force: Force = False,
    as_json: Annotated[bool, json_option("what was found")] = False,
) -> None:
    """Probe the layers and heads of a model: what they attend to, what they retrieve, how far they reach."""
    from ctxext import api

    console.quiet_libraries()
    with console.progress("loading") as progress:
        report = api.probe(request, out=out, force=force, say=console.say, progress=progress)
    if as_json:
        console.emit(asdict(report))
        return
    for result in report.results:
        for model, finding in zip(report.models, result.findings, strict=True):
            for table in finding.tables:
                console.say(f"\n{model}, {result.probe}: {table.caption}")
                console.table(table.header, table.rows)
