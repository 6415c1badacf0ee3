"""ctxext eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ctxext.cli import console
from ctxext.cli.options import AsJson, Force, out_option, takes
from ctxext.requests import EvalRequest

if TYPE_CHECKING:
    from ctxext.evals.suite import EvalReport

EXAMPLES = """Examples:\n
  ctxext eval --suite perplexity\n
  ctxext eval --suite smoke tiny\n
  ctxext eval ./converted ./merged --against tiny --suite passkey,niah --lengths 512,1k,2k --extrapolate\n
  ctxext eval ./my-model --suite perplexity --protocol longlora --lengths 8k,32k --data book.txt --json\n
  ctxext eval ./my-model --suite ruler --lengths 4k,8k --limit 260 --set ruler.seed=1"""


@takes(EvalRequest)
def evaluate(
    request: EvalRequest,
    out: Annotated[Path | None, out_option("eval-<suite>")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models side by side: every number is reported with its protocol, length and text."""
    from ctxext import api

    console.quiet_libraries()
    with console.progress("loading") as progress:
        report = api.evaluate(request, out=out, force=force, say=console.say, progress=progress)
    if as_json:
        console.emit(report.to_dict())
    else:
        _show(report)


def _show(report: EvalReport) -> None:
    for caption, header, rows in report.tables():
        console.say(f"\n{caption}")
        console.table(header, rows)
    if report.differences:
        console.say("\ndifferences, paired by item, with 95% bootstrap intervals")
        columns = report.differences[0].COLUMNS
        console.table(columns, [difference.cells() for difference in report.differences if not difference.task])
