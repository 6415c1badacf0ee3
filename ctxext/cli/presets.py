"""ctxext presets"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ctxext.cli import completion, console

EXAMPLES = """Examples:\n
  ctxext presets list\n
  ctxext presets list finetune\n
  ctxext presets show finetune/heal\n
  ctxext presets validate"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})


@app.command("list", epilog=EXAMPLES)
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="models, hybrid, finetune, pretrain, eval, probe or pipelines [default: all]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print names and comments as JSON")] = False,
) -> None:
    """List all presets by kind, each with the first sentence of its comment."""
    from ctxext.config import presets

    rows = [(f"{one}/{name}", presets.comment(one, name)) for one in presets.kinds(kind) for name in presets.names(one)]
    if as_json:
        console.emit([{"name": name, "comment": comment} for name, comment in rows])
        return
    width = max((len(name) for name, _ in rows), default=0)
    for name, comment in rows:
        print(f"{name.ljust(width)}  {comment.partition('. ')[0].rstrip('.')}")


@app.command("show", epilog=EXAMPLES)
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="KIND/NAME",
            help="A name that `ctxext presets list` prints, or a YAML file",
            autocompletion=completion.of(),
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the preset as JSON")] = False,
) -> None:
    """Show a preset and its comment; of a finetune preset also the fields that differ from the defaults."""
    from ctxext.config import presets
    from ctxext.config.loader import flow
    from ctxext.study.pipeline_presets import differences

    found = presets.find(*presets.parted(name))
    differs = differences(presets.parted(name)[1]) if found.kind == "finetune" else []
    if as_json:
        comment = presets.comment(*presets.parted(name))
        console.emit(
            {
                "name": f"{found.kind}/{found.name}",
                "path": str(found.path),
                "comment": comment,
                "sets": found.data,
                "differs": [{"field": field, "here": here, "default": default} for field, here, default in differs],
            }
        )
        return
    console.say(str(found.path))
    print(found.path.read_text("utf-8").rstrip())
    if differs:
        print()
        console.pairs([(field, f"{flow(here)}   ({_default(default)})") for field, here, default in differs])


def _default(value: Any) -> str:
    from ctxext.config.loader import flow

    return "not set by default" if value is None else f"by default {flow(value)}"


@app.command("validate", epilog=EXAMPLES)
def validate(
    name: Annotated[
        str | None,
        typer.Argument(metavar="KIND/NAME", help="One preset [default: all]", autocompletion=completion.of()),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every fault as JSON")] = False,
) -> None:
    """Validate presets by reading them as the commands do; exit code 1 if one has a fault."""
    from ctxext.errors import CheckFailed
    from ctxext.study.pipeline_presets import validated
    from ctxext.units import counted

    found = validated(name)
    if as_json:
        console.emit([{"name": name, "faults": faults} for name, faults in found])
    else:
        for name, faults in found:
            print("\n  ".join([f"{name}: {counted(len(faults), 'fault') if faults else 'valid'}", *faults]))
    bad = [name for name, faults in found if faults]
    if bad:
        raise CheckFailed(f"presets with faults: {', '.join(bad)}", hint="correct the YAML at the paths above")
