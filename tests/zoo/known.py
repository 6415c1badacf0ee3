"""Faults of the package that the zoo has found and that are not mended yet: (checkpoint, station) -> reason.

A test of one of these is expected to fail, and fails when it passes: then its line goes. There are none now.
"""

from __future__ import annotations

KNOWN: dict[tuple[str, str], str] = {}
