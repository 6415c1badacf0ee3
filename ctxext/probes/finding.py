"""What a probe found, as plain data: numbers, tables, and pictures described so that they can be drawn and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Number = float | None


@dataclass(frozen=True)
class Curve:
    """y over x, a line of a picture; None where there is nothing."""

    label: str
    x: tuple[float, ...]
    y: tuple[Number, ...]


@dataclass(frozen=True)
class Curves:
    """Lines in one picture. `x_tokens`: x counts tokens, on a log2 axis; `log`: y on a logarithmic axis. `level` is
    drawn across, such as chance, and `level_name` says what it is."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Curve, ...]
    x_tokens: bool = False
    log: bool = False
    level: Number = None
    level_name: str = ""
    kind: Literal["curves"] = "curves"


@dataclass(frozen=True)
class Bars:
    """A bar a layer (or whatever `labels` are), coloured by the `letters` of layout.py; `letters` may be empty.
    `level` as in Curves."""

    name: str
    title: str
    x_label: str
    y_label: str
    labels: tuple[str, ...]
    values: tuple[Number, ...]
    letters: str = ""
    level: Number = None
    level_name: str = ""
    kind: Literal["bars"] = "bars"


@dataclass(frozen=True)
class Grid:
    """cells[row][column], rows being layers from 0 and columns heads where nothing else is said; `letters` one a row.
    `highest` is the end of the colour scale; None is the greatest cell."""

    name: str
    title: str
    x_label: str
    y_label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Number, ...], ...]
    letters: str = ""
    highest: Number = None
    kind: Literal["grid"] = "grid"


Picture = Curves | Bars | Grid


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, with a caption that says what was measured."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Finding:
    """One probe on one model. `facts` is every number of it, for JSON; `notes` what must be said beside them."""

    facts: dict[str, Any]
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class ProbeResult:
    """One probe, as asked (`spec`), on every model of a report, in its order."""

    probe: str
    spec: dict[str, Any]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class ProbeReport:
    """All probes of one command. `models` are names, two where they are compared; `layouts` theirs, as letters."""

    models: tuple[str, ...]
    layouts: tuple[str, ...]
    seconds: float
    results: tuple[ProbeResult, ...]
