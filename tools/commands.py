"""Writes docs/commands/, a page for each command, made from the command line itself, and the memory that plans state
into the tables of docs/training-at-100k.md. `make docs` runs it.

tests/test_docs.py holds what is committed to be what this makes, so a changed option, help or estimate shows there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ctxext.cli.app import app
from ctxext.config.loader import assignments
from ctxext.train.launch import launched
from ctxext.train.run_directory import plan_from_options

DOCS = Path(__file__).parent.parent / "docs"
FOLDER, TRAINING = DOCS / "commands", DOCS / "training-at-100k.md"
ROW = re.compile(r"^(\| `([^`]*)` \|.*\|) ([\d.]+) \|$", re.MULTILINE)
MACHINES = ("runtime", "buckets")  # what a plan counts where there is a GPU
EXIT_CODES = (
    "Exit codes: 0, 1 a check failed, 2 bad input, 3 the environment, 130 interrupted. stdout is data, stderr is talk."
)
MADE = "Made by `make docs` from the command itself."


def pages() -> dict[str, str]:
    """File name and text of every page."""
    group = typer.main.get_command(app)
    found = list(commands(group))
    made = {file_name(name): page(name, command) for name, command in found}
    return {"index.md": index(group, found)} | made


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and command of all below a group, in the order of `--help`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def file_name(name: str) -> str:
    return name.replace(" ", "-") + ".md"


def index(group: Any, found: list[tuple[str, Any]]) -> str:
    """The table of commands, and the options before a command's name."""
    rows = [f"- [`ctxext {name}`]({file_name(name)}): {summary(command)}" for name, command in found]
    options = list(parameters(group, "option"))
    return "\n".join(["# Commands", "", plain(group.help), "", *rows, "", "Before a command's name:", "", *options, "",
                      EXIT_CODES, "", MADE, ""])  # fmt: skip


def page(name: str, command: Any) -> str:
    """One command: what it does, how it is called, its arguments, options and examples."""
    usage = [f"ctxext {name}", "[OPTIONS]"]
    for argument in (one for one in command.params if one.param_type_name == "argument"):
        shown = spelled(argument)
        usage.append(shown if argument.required or shown.startswith("[") else f"[{shown}]")
    lines = [f"# ctxext {name}", "", plain(command.help), "", f"Usage: `{' '.join(usage)}`", ""]
    for kind in ("argument", "option"):
        if rows := list(parameters(command, kind)):
            lines += [f"## {kind.capitalize()}s", "", *rows, ""]
    if examples := re.findall(r"^\s*((?:ctxext|cat|printf) .*\S)\s*$", command.epilog or "", re.MULTILINE):
        lines += ["## Examples", "", "```sh", *examples, "```", ""]
    return "\n".join([*lines, MADE, ""])


def parameters(command: Any, kind: str) -> Iterator[str]:
    """A line for each option or argument. Names and help as `--help` has them; types are another's way to write."""
    for parameter in command.params:
        if parameter.param_type_name != kind or getattr(parameter, "hidden", False):
            continue
        default, text = parameter.default, plain(parameter.help)
        if isinstance(default, str | int | float) and not isinstance(default, bool) and "[default:" not in text:
            text += f" [default: {default}]"
        elif default is True:
            text += f" [default: {parameter.opts[0]}]"
        if kind == "option" and parameter.required:
            text += " (needed)"
        yield f"- `{spelled(parameter)}`: {text}"


def spelled(parameter: Any) -> str:
    """`--lengths LENGTHS`, `--gate / --no-gate`, `MODEL`."""
    value = parameter.metavar or parameter.name.removesuffix("_").upper()
    if parameter.param_type_name == "argument":
        return value + ("..." if parameter.nargs == -1 and not value.endswith("...") else "")
    names = " / ".join([", ".join(parameter.opts), *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {value}"


def summary(command: Any) -> str:
    """The first sentence of a command's help."""
    return plain(command.help).partition(". ")[0].rstrip(".")


def plain(text: str | None) -> str:
    """Help as one Markdown paragraph: what stands in backticks is kept, nothing else in it is markup."""
    parts = re.split(r"(`[^`]*`)", " ".join((text or "").split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<*])", r"\\\1", part) for part in parts)


def with_memory(text: str) -> str:
    """The page with its rows of `options` and GiB as plans have them: llama2-7b at 100k, in bfloat16."""
    command: Any = typer.main.get_command(app)

    def row(match: re.Match[str]) -> str:
        words = ["llama2-7b", "--set", "dtype=bfloat16", *match[2].split()]
        given = command.commands["finetune"].make_context("finetune", words).params
        requested = {"ctx": "100k"} | assignments(given["settings"])
        plan = plan_from_options("llama2-7b", "lora-alpha", requested, needs_weights=False, say=print)
        plan, _ = launched(plan, given["zero"], given["nproc"], None)
        return f"{match[1]} {sum(n for item, n in plan.memory.items() if item not in MACHINES) / 2**30:.1f} |"

    return ROW.sub(row, text)


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # plans for eight cards are not refused where there are fewer
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    TRAINING.write_text(with_memory(TRAINING.read_text("utf-8")), encoding="utf-8")
    print(f"{len(made)} pages in {FOLDER}, and the tables of {TRAINING.name}")


if __name__ == "__main__":
    main()
