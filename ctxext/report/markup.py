"""The parts of a page, from the macros of templates/parts.html. Strings are escaped, except `Markup`."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}
_CONTROLS = {code: "\ufffd" for code in range(32) if chr(code) not in "\n\t"}  # control characters: invalid in HTML


def _valid(value: Any) -> Any:
    """A value as a template shows it: text from files may have characters that HTML does not allow."""
    return value if isinstance(value, Markup) else str(value).translate(_CONTROLS)


ENVIRONMENT = Environment(
    loader=PackageLoader("ctxext.report"),
    autoescape=True,
    finalize=_valid,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PARTS: Any = ENVIRONMENT.get_template("parts.html").module
section, block, beside = _PARTS.section, _PARTS.block, _PARTS.beside
heading, paragraph, quiet, pre = _PARTS.heading, _PARTS.paragraph, _PARTS.quiet, _PARTS.pre
table, details, pictures = _PARTS.table, _PARTS.details, _PARTS.pictures
missing, bounds, long, strong, sha256 = _PARTS.missing, _PARTS.bounds, _PARTS.long, _PARTS.strong, _PARTS.sha256


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Joins parts with `between`. Strings are escaped, except `Markup`."""
    return escape(_valid(between)).join(map(_valid, parts))


def small(*parts: str) -> Markup:
    """Returns a second line of a cell, in small type."""
    return Markup(_PARTS.small(join(parts)))


def data(text: str, value: object) -> Markup:
    """Returns a number as shown, with all its digits in an attribute."""
    return Markup(_PARTS.data(text, value))


def number(value: float | None, digits: int, *, sign: bool = False) -> Markup:
    """Returns a rounded number with all its digits in an attribute; None is "none"."""
    if value is None:
        return Markup(missing("none"))
    if not math.isfinite(value):
        return data(str(value), value)
    return data(f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−"), value)


def picture(path: Path, draw: Callable[[Path], None], alt: str, caption: str) -> Markup:
    """Calls `draw(path)` and returns a figure with the file embedded as a data URL. `alt`: the alternative text."""
    draw(path)
    encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    return Markup(_PARTS.figure(f"data:{_MEDIA[path.suffix]};base64,{encoded}", alt, caption))
