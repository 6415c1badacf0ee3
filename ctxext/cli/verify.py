"""ctxext verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxext.cli import console

EXAMPLES = """Examples:\n
  ctxext verify tiny\n
  ctxext verify runs/20260101T000000.000000Z-finetune-tiny --attention training\n
  ctxext verify ./my-model --attention training --ctx 32k --json"""


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A directory, a run, a preset or a hub id")],
    ctx: Annotated[str | None, typer.Option(help="Tokens [default: the run's ctx, or the usable length]")] = None,
    attention: Annotated[
        str | None, typer.Option(help="training or inference [default: training for a run, else inference]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-verify-<name>]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON")] = False,
) -> None:
    """Measure which tokens a model's attention sees, layer by layer, as it runs; exit code 1 if a check fails."""
    from ctxext.config.manifest import default_out
    from ctxext.config.output import check_free
    from ctxext.errors import CheckFailed
    from ctxext.evals import verify as checks
    from ctxext.units import parse_tokens

    launch = checks.plan_launch(model, ctx=None if ctx is None else parse_tokens(ctx), attention=attention)
    # Check the output before the measurement, which takes long.
    out = out or default_out("verify", launch.source.name)
    check_free(out, force, keep=launch.source.paths)
    console.quiet_libraries()
    with console.progress_display() as display:
        task = display.add_task("loading", total=None, note="")
        found = checks.verify(
            launch,
            progress=lambda what, done, total: display.update(task, description=what, completed=done, total=total),
        )
    checks.write_certificate(found, launch, out, force=force)
    if as_json:
        console.emit(found.as_dict())
    else:
        console.say(f"{found.model}, {found.notes[0]}")
        console.table(found.HEADER, found.rows())
        for line in (*found.notes[1:], f"written to {out}"):
            console.say(line)
    if found.failed:
        raise CheckFailed(f"{len(found.failed)} of {len(found.checks)} checks failed", hint=f"see {out}")
