"""What a probe found, as plain data: numbers, tables, and pictures described so that they can be drawn and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

Number = Annotated[float, Field(allow_inf_nan=False)] | None
Name = Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]  # a part of a file's name
Letters = Annotated[str, Field(pattern=r"^[SNFs]*$")]  # of layers (model/layout.py)


@dataclass(frozen=True)
class Curve:
    """y over x, a line of a picture; None where there is nothing."""

    label: str
    x: tuple[float, ...]
    y: tuple[Number, ...]

    def __post_init__(self) -> None:
        _same(f"the line {self.label}", len(self.x), len(self.y))


@dataclass(frozen=True)
class Curves:
    """Lines in one picture. `x_tokens`: x counts tokens, on a log2 axis; `log`: y on a logarithmic axis. `level` is
    drawn across, such as chance, and `level_name` says what it is."""

    name: Name
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

    name: Name
    title: str
    x_label: str
    y_label: str
    labels: tuple[str, ...]
    values: tuple[Number, ...]
    letters: Letters = ""
    level: Number = None
    level_name: str = ""
    kind: Literal["bars"] = "bars"

    def __post_init__(self) -> None:
        _same(self.name, len(self.labels), len(self.values), len(self.letters) or len(self.labels))


@dataclass(frozen=True)
class Grid:
    """cells[row][column], rows being layers from 0 and columns heads where nothing else is said; `letters` one a row.
    `highest` is the end of the colour scale; None is the greatest cell."""

    name: Name
    title: str
    x_label: str
    y_label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Number, ...], ...]
    letters: Letters = ""
    highest: Number = None
    kind: Literal["grid"] = "grid"

    def __post_init__(self) -> None:
        _same(self.name, len(self.rows), len(self.cells), len(self.letters) or len(self.rows))
        _same(self.name, len(self.columns), *map(len, self.cells))


def _same(of: str, *lengths: int) -> None:
    if len(set(lengths)) > 1:
        raise ValueError(f"{of}: parts of {lengths} entries do not belong together")


Picture = Annotated[Curves | Bars | Grid, Field(discriminator="kind")]


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, with a caption that says what was measured."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        _same("a table", len(self.header), *map(len, self.rows))


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

    probe: Name
    spec: dict[str, Any]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class ProbeReport:
    """All probes of one command. `models` are names, two where they are compared; `layouts` theirs, as letters."""

    models: tuple[str, ...]
    layouts: tuple[str, ...]
    seconds: float
    results: tuple[ProbeResult, ...]

    def __post_init__(self) -> None:
        _same("the models", len(self.models), len(self.layouts), *(len(result.findings) for result in self.results))
