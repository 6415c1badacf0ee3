"""The table of commands, and the options that are common to all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from ctxext import __version__
from ctxext.cli import (
    chat,
    console,
    convert,
    doctor,
    evaluate,
    export,
    finetune,
    generate,
    merge,
    plan,
    presets,
    pretrain,
    probe,
    report,
    run,
    verify,
)
from ctxext.errors import InputError
from ctxext.train.ranks import started_rank

RUNS_ON_RANKS = ("finetune", "doctor")  # doctor looks at the host of each process

app = typer.Typer(
    help="Extend the context of a pretrained causal LM: convert its layers, train it on longer text, check the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors on stderr")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    console.debug, console.quiet = debug, quiet
    _check_ranks(context.invoked_subcommand)


def _check_ranks(command: str | None) -> None:
    """Refuses a command that torchrun or the like started several times: all but finetune would do the same work."""
    if command in RUNS_ON_RANKS or (started := started_rank()) is None:
        return
    raise InputError(
        f"{started.starter} has started {started.world} processes, and ctxext {command} uses one",
        hint=f"start ctxext {command} without {started.starter}",
    )


for name, command, examples in (
    ("plan", plan.plan, plan.EXAMPLES),
    ("convert", convert.convert, convert.EXAMPLES),
    ("finetune", finetune.finetune, finetune.EXAMPLES),
    ("eval", evaluate.evaluate, evaluate.EXAMPLES),
    ("merge", merge.merge, merge.EXAMPLES),
    ("generate", generate.generate, generate.EXAMPLES),
    ("chat", chat.chat, chat.EXAMPLES),
    ("export", export.export, export.EXAMPLES),
    ("verify", verify.verify, verify.EXAMPLES),
    ("probe", probe.probe, probe.EXAMPLES),
    ("report", report.report, report.EXAMPLES),
    ("run", run.run, run.EXAMPLES),
    ("doctor", doctor.doctor, doctor.EXAMPLES),
    ("pretrain", pretrain.pretrain, pretrain.EXAMPLES),
):
    app.command(name, epilog=examples)(command)
app.add_typer(presets.app, name="presets", help="List, show and validate presets.")
