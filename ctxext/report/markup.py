"""Builds HTML from values. Text from files is a plain string and gets escaped; only `Html` is taken as markup."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_VOID = {"meta", "img", "br", "hr"}
_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}
_CONTROLS = {code: "\ufffd" for code in range(32) if chr(code) not in "\n\t"}  # control characters: invalid in HTML


class Html(str):
    """A string that is markup. Every other string is data and gets escaped."""


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """Returns `<name attributes>children</name>`. Children that are not `Html` are escaped.

    In names of attributes an outer _ is removed and an inner _ becomes -: `class_` is class, `aria_label` aria-label.
    """
    given = "".join(f' {key.strip("_").replace("_", "-")}="{_escaped(str(x))}"' for key, x in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[str], between: str = "") -> Html:
    """Joins parts with `between`. Parts that are not `Html`, and `between`, are escaped."""
    return Html(_escaped(between).join(part if isinstance(part, Html) else _escaped(part) for part in parts))


def _escaped(text: str) -> str:
    return html.escape(text.translate(_CONTROLS))


def number(value: float | None, digits: int, *, sign: bool = False) -> Html:
    """Returns a rounded number as a <data> element whose `value` has all digits; None is "none"."""
    if value is None:
        return tag("span", "none", class_="none")
    if not math.isfinite(value):
        return tag("data", str(value), value=value)
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")
    return tag("data", text, value=value)


def small(*children: str) -> Html:
    """Returns a second line of a cell, in small type."""
    return tag("small", *children)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], **attributes: object) -> Html:
    """Returns a table that scrolls sideways where it is too wide. The first cell of a row is its header."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *[tag("td", cell) for cell in row[1:]])
        for row in ([*map(_cell, row)] for row in rows)
    ]
    inner = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *[tag("th", cell, scope="col") for cell in head])),
        tag("tbody", *body),
        **attributes,
    )
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label="table, scrolls sideways")


def _cell(value: str) -> str:
    return value if value != "" else tag("span", "none", class_="none")


def details(summary: str, *children: str) -> Html:
    """Returns children that a click on `summary` shows or hides."""
    return tag("details", tag("summary", summary), *children)


def picture(path: Path, draw: Callable[[Path], None], alt: str, caption: str) -> Html:
    """Calls `draw(path)` and returns a figure with the file embedded as a data URL. `alt`: the alternative text."""
    draw(path)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = tag("img", src=f"data:{_MEDIA[path.suffix]};base64,{data}", alt=alt)
    return tag("figure", image, tag("figcaption", caption))


def pictures(figures: Sequence[Html]) -> Html:
    """Returns pictures side by side, as many in a row as fit."""
    return tag("div", *figures, class_="pictures") if figures else Html("")
