"""The result of a probe as plain data: numbers, tables, and descriptions of pictures to draw and compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

Number = Annotated[float, Field(allow_inf_nan=False)] | None
Name = Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]  # used in file names
Letters = Annotated[str, Field(pattern=r"^[SNFs]*$")]  # one letter for each layer (model/layout.py)


@dataclass(frozen=True)
class Curve:
    """One line of a picture, y over x; None where there is no value."""

    label: str
    x: tuple[float, ...]
    y: tuple[Number, ...]

    def __post_init__(self) -> None:
        _same(f"the line {self.label}", len(self.x), len(self.y))


@dataclass(frozen=True)
class Curves:
    """Several lines in one picture.

    x_tokens     x counts tokens, on a log2 axis
    log          y is on a logarithmic axis
    level        a horizontal line, such as chance; `level_name` is its label
    """

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
    """One bar per layer (or per entry of `labels`), coloured by the `letters` of layout.py, which may be empty.

    `level` as in Curves.
    """

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
    """A grid of cells[row][column]; rows are layers from 0 and columns are heads unless the labels say otherwise.

    `letters` has one letter per row. `highest` is the end of the colour scale; None is the greatest cell.
    """

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
        raise ValueError(f"{of}: parts have different lengths, {lengths}")


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
class ProbeFinding:
    """The result of one probe on one model. `facts` has all its numbers, for JSON; `notes` are shown beside them."""

    facts: dict[str, Any]
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class ProbeResult:
    """One probe, as requested (`spec`), on every model of a report, in the report's order."""

    probe: Name
    spec: dict[str, Any]
    findings: tuple[ProbeFinding, ...]


@dataclass(frozen=True)
class ProbeReport:
    """All probes of one command. `models` are names, two in a comparison; `layouts` are their layers as letters."""

    models: tuple[str, ...]
    layouts: tuple[str, ...]
    seconds: float
    results: tuple[ProbeResult, ...]

    def __post_init__(self) -> None:
        _same("the models", len(self.models), len(self.layouts), *(len(result.findings) for result in self.results))
