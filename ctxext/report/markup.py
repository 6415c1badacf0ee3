"""HTML from values: what comes from a file is escaped, because only `tag` makes what is not."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_VOID = {"meta", "img", "br", "hr"}
_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}
_CONTROLS = {code: "\ufffd" for code in range(32) if chr(code) not in "\n\t"}  # not allowed in HTML


class Html(str):
    """Text that is markup; every other text is data."""


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """`<name attributes>children</name>`; children that are not `Html` are escaped. `class_` is class, _ is -."""
    given = "".join(f' {key.strip("_").replace("_", "-")}="{_escaped(str(x))}"' for key, x in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts one after another, those that are not `Html` escaped, as is `between`."""
    return Html(_escaped(between).join(part if isinstance(part, Html) else _escaped(part) for part in parts))


def _escaped(text: str) -> str:
    return html.escape(text.translate(_CONTROLS))


def number(value: float | None, digits: int, *, sign: bool = False) -> Html:
    """A number rounded for reading, with all its digits in the `value` of a <data>; None is "none"."""
    if value is None:
        return tag("span", "none", class_="none")
    if not math.isfinite(value):
        return tag("data", str(value), value=value)
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")
    return tag("data", text, value=value)


def small(*children: str) -> Html:
    """A second, quieter line in a cell."""
    return tag("small", *children)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], **attributes: object) -> Html:
    """A table that scrolls by itself where it is too wide; the first cell of a row heads it."""
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
    return tag("details", tag("summary", summary), *children)


def picture(path: Path, draw: Callable[[Path], None], alt: str, caption: str) -> Html:
    """Draws into the file `path` and shows what is in it, embedded."""
    draw(path)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = tag("img", src=f"data:{_MEDIA[path.suffix]};base64,{data}", alt=alt)
    return tag("figure", image, tag("figcaption", caption))


def pictures(figures: Sequence[Html]) -> Html:
    """Pictures beside each other, as many as there is room for."""
    return tag("div", *figures, class_="pictures") if figures else Html("")
