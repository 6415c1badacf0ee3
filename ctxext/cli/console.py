"""Talk on stderr, data on stdout; readable without colour, NO_COLOR honoured (rich does both)."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ctxext.errors import CtxextError

if TYPE_CHECKING:
    from rich.progress import Progress

SILENCE = 30.0  # seconds, of a log
debug = False
quiet = False


def say(line: str) -> None:
    """One line of talk."""
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def fail(error: CtxextError) -> None:
    """An error, and what to do about it."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)


def emit(data: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def pairs(rows: Iterable[tuple[str, str]], *, to_stderr: bool = False) -> None:
    """Name and value lines, aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    if to_stderr:
        for line in lines:
            say(line)
    else:
        print("\n".join(lines))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table on stdout: first column to the left, the others to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        print(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
        if number == 0:
            print("  ".join("-" * width for width in widths))


@contextmanager
def progress_display() -> Iterator[Progress]:
    """A progress display on stderr, gone when done; silent under --quiet and where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=quiet or not terminal.is_terminal) as display:
        yield display


@contextmanager
def progress(first: str) -> Iterator[Callable[[str, int | None, int | None], None]]:
    """A progress display for one task. It yields a progress callback (what is being done, items done, items in all).

    Where stderr is no terminal, a line is printed every few minutes, so that a log of hours is not silent.
    """
    last_line = time.monotonic()

    def tell(what: str, done: int | None, total: int | None) -> None:
        nonlocal last_line
        display.update(task, description=what, completed=done, total=total)
        if display.disable and time.monotonic() - last_line > SILENCE:
            last_line = time.monotonic()
            say(what if done is None or total is None else f"{what}: {done:,} of {total:,}")

    with progress_display() as display:
        task = display.add_task(first, total=None, note="")
        yield tell


def quiet_libraries() -> None:
    """Keep transformers' and the hub's own talk and bars off the screen; before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
