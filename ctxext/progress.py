"""The types of the progress callbacks of long operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # (name of the current operation, items done, items in total)
CountProgress = Callable[[int, int], None]  # (items done, items in total)


def ignore(*_: Any) -> None:
    """Does nothing: the default callback."""
