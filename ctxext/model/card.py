"""The model card (README.md) an output carries: what it is, from what, with the numbers that prove it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from ctxext import __version__

FRONT = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ctxext", "long-context"]}


def model_card(
    title: str, paragraphs: Sequence[str], facts: Sequence[tuple[str, str]], licence: Mapping[str, str] | None = None
) -> str:
    """Markdown with the hub's front matter: a title, paragraphs and a two-column table; `licence` as the source's card
    states it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    front, body = front_matter(FRONT | dict(licence or {})), "\n\n".join(paragraphs)
    written = f"Written by ctxext {__version__}; `ctxext.json` has the rest."
    return f"{front}\n\n# {title}\n\n{body}\n\n| | |\n|---|---|\n{rows}\n\n{written}\n"


def front_matter(fields: Mapping[str, object]) -> str:
    """The block a hub's card begins with."""
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False)}---"
