"""The results of `verify`, check by check, as data and as table rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One measurement, on one layer or (None) end to end; the check passes where `measured` is at most `allowed`."""

    name: str
    layer: int | None
    passed: bool
    detail: str
    measured: float  # an integer counts wrong outputs; a float is a relative difference, 1e9 for NaN
    allowed: float


@dataclass(frozen=True)
class Certificate:
    """Every check of one launch, on a row of T tokens; `notes` say what was launched and how the row differs.

    `out` is the directory that it was written to.
    """

    HEADER = ("check", "layer", "result", "measured", "allowed", "what")
    model: str
    attention: str
    T: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    out: str | None = None

    @property
    def failed(self) -> tuple[Check, ...]:
        """Returns the checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    def rows(self) -> list[list[str]]:
        """Returns lines for the screen: layers with the same result and text share one line, with the worst figure."""
        groups: dict[tuple[str, bool, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.name, check.passed, check.detail), []).append(check)
        rows = []
        for (name, passed, detail), checks in groups.items():
            figures = max(check.measured for check in checks), checks[0].allowed
            shown = [f"{x:,}" if isinstance(x, int) else f"{x:.1e}" for x in figures]
            where = "end to end" if checks[0].layer is None else str(checks[0].layer)
            where = where if len(checks) == 1 else f"{len(checks)} layers"
            rows.append([name, where, "pass" if passed else "FAIL", *shown, detail])
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "out"} | {"passed": not self.failed}
