"""ctxext verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ctxext.cli import console
from ctxext.cli.options import Force, json_option, out_option, takes
from ctxext.errors import CheckFailed
from ctxext.requests import VerifyRequest

EXAMPLES = """Examples:\n
  ctxext verify tiny\n
  ctxext verify runs/20260101T000000.000000Z-finetune-tiny --attention training\n
  ctxext verify ./my-model --attention training --ctx 32k --json"""


@takes(VerifyRequest)
def verify(
    request: VerifyRequest,
    out: Annotated[Path | None, out_option("verify-<name>")] = None,
    force: Force = False,
    as_json: Annotated[bool, json_option("the certificate")] = False,
) -> None:
    """Measure which tokens a model's attention sees, layer by layer, as it runs; exit code 1 if a check fails."""
    from ctxext import api

    console.quiet_libraries()
    with console.progress("loading") as progress:
        found = api.verify(request, out=out, force=force, say=console.say, progress=progress)
    if as_json:
        console.emit(found.as_dict())
    else:
        console.say(f"{found.model}, {found.notes[0]}")
        console.table(found.HEADER, found.rows())
        for line in found.notes[1:]:
            console.say(line)
    if found.failed:
        raise CheckFailed(f"{len(found.failed)} of {len(found.checks)} checks failed", hint=f"see {found.out}")
