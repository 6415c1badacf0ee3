"""Prints messages to stderr and data to stdout. Output is readable without colour; NO_COLOR is supported (by rich)."""

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

SILENCE = 30.0  # seconds between two progress lines where stderr is no terminal
debug = False
quiet = False


def say(line: str) -> None:
    """Prints one message to stderr, unless --quiet was given."""
    if quiet:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass  # a log on a full disk: a lost message must not end a training run


def fail(error: CtxextError, *, rank: int = 0) -> None:
    """Prints an error and its hint to stderr, also under --quiet. `rank`: of a process that is one of several."""
    where = f"rank {rank}: " if rank else ""
    print(f"{where}error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)


def emit(data: Any) -> None:
    """Prints data as JSON to stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def pairs(rows: Iterable[tuple[str, str]], *, to_stderr: bool = False) -> None:
    """Prints lines of name and value, aligned, to stdout, or as messages to stderr."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    if to_stderr:
        for line in lines:
            say(line)
    else:
        print("\n".join(lines))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a plain table to stdout: the first column aligned left, the others right."""
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
    """Yields a progress display on stderr that disappears at the end.

    It is disabled under --quiet and where stderr is no terminal.
    """
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
    # `transient` removes the display at the end. A disabled display still accepts updates, so callers need no check.
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=quiet or not terminal.is_terminal) as display:
        yield display


@contextmanager
def progress(first: str) -> Iterator[Callable[[str, int | None, int | None], None]]:
    """Yields a progress callback for one task, with a display: callback(current action, items done, items in all).

    Where stderr is no terminal, the callback prints a line at most every SILENCE seconds, so that logs show progress.
    """
    last_line = time.monotonic()

    def tell(what: str, done: int | None, total: int | None) -> None:
        # None for `done` and `total`: their number is not known.
        nonlocal last_line
        display.update(task, description=what, completed=done, total=total)
        if display.disable and time.monotonic() - last_line > SILENCE:
            last_line = time.monotonic()
            say(what if done is None or total is None else f"{what}: {done:,} of {total:,}")

    with progress_display() as display:
        task = display.add_task(first, total=None, note="")
        yield tell


def quiet_libraries() -> None:
    """Turns off messages and progress bars of transformers, the hub and others. It imports none of them.

    Call it before they are imported: they read these variables then.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")
