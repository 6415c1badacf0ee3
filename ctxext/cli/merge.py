"""ctxext merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ctxext.cli import console
from ctxext.cli.options import AsJson, Force, out_option, takes
from ctxext.requests import MergeRequest

EXAMPLES = """Examples:\n
  ctxext merge\n
  ctxext merge runs/20260101T000000.000000Z-finetune-tiny --out ./long-model --dtype bfloat16\n
  ctxext merge --alpha-multiplier auto --nope-scale auto --length 32k --data ./books\n
  ctxext merge --alpha-multiplier 0.8"""


@takes(MergeRequest)
def merge(
    request: MergeRequest,
    out: Annotated[Path | None, out_option("merge-<name>")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter, in fp32, into an ordinary Hugging Face directory, and verify that nothing was lost.

    --restore is applied first, then --alpha-multiplier; --nope-scale is chosen for the result.
    """
    from ctxext import api

    console.quiet_libraries()
    report = api.merge(request, out=out, force=force, say=console.say)
    if as_json:
        console.emit(report.as_dict())
    else:
        console.pairs([*report.rows(), ("written to", report.out), ("seconds", f"{report.seconds:.1f}")])
