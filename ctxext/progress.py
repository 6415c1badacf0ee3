"""The progress callbacks that long operations take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # (what is being done, items done, items in all)
CountProgress = Callable[[int, int], None]  # (items done, items in all)


def ignore(*_: Any) -> None:
    """No-op callback."""
