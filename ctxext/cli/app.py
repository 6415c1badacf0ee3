"""The table of commands, and the options that belong to all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from ctxext import __version__
from ctxext.cli import console, convert, evaluate, finetune, merge, presets, pretrain, probe, report, run, verify

app = typer.Typer(
    help="Take a pretrained causal LM and make it long: retrofit its layers, extend its context, prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No talk on stderr but errors")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    console.debug, console.quiet = debug, quiet


app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("finetune", epilog=finetune.EXAMPLES)(finetune.finetune)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("merge", epilog=merge.EXAMPLES)(merge.merge)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.command("probe", epilog=probe.EXAMPLES)(probe.probe)
app.command("pretrain", epilog=pretrain.EXAMPLES)(pretrain.pretrain)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("run", epilog=run.EXAMPLES)(run.run)
app.add_typer(presets.app, name="presets", help="What presets there are, what they say, and whether they are in order.")
