"""ctxext doctor"""

from __future__ import annotations

from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext doctor\n
  ctxext doctor tiny\n
  ctxext doctor runs/20260101T000000.000000Z-finetune-tiny --json"""


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL_OR_RUN]", help="A local directory or preset")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON")] = False,
) -> None:
    """Check the environment, and a model or run, and name remedies for what is wrong; exit code 1 if a check fails."""
    from ctxext import api
    from ctxext.doctor.finding import require_health

    if model is not None:
        console.quiet_libraries()
    parts = api.doctor(model)
    if as_json:
        console.emit({part: [finding.as_dict() for finding in found] for part, found in parts.items()})
    else:
        for part, found in parts.items():
            console.say(f"\n{part}")
            for finding in found:
                print(f"{finding.status.ljust(7)}  {finding.name}: {finding.found}")
                if finding.remedy:
                    print(f"         -> {finding.remedy}")
    require_health(finding for found in parts.values() for finding in found)
