"""The model card (README.md) of an output: what it is, its sources, and the measured numbers."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ctxext import __version__
from ctxext.model.rope_fields import unlike_transformers_4

VERSION_4 = "transformers 4.57.3"  # the 4.x release in which outputs were compared (tests/model/test_transformers_4.py)
FRONT = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ctxext", "long-context"]}


def model_card(
    title: str, paragraphs: Sequence[str], facts: Sequence[tuple[str, str]], licence: Mapping[str, str] | None = None
) -> str:
    """Returns Markdown with the hub's front matter: a title, paragraphs and a two-column table.

    `licence` holds the licence fields of the source's card.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    front, body = front_matter(FRONT | dict(licence or {})), "\n\n".join(paragraphs)
    written = f"Written by ctxext {__version__}; `ctxext.json` has the rest."
    return f"{front}\n\n# {title}\n\n{body}\n\n| | |\n|---|---|\n{rows}\n\n{written}\n"


def minimum_transformers() -> str:
    """Returns the oldest supported transformers by the package's own requirements, else the installed version."""
    for requirement in importlib.metadata.requires("ctxext") or []:
        found = re.match(r"transformers\b[^;]*>=([\d.]+)", requirement)
        if found:
            return found[1]
    return importlib.metadata.version("transformers")


def runtime_note(config: Mapping[str, Any]) -> str:
    """Returns which releases of transformers open an output with this config, and what was not checked."""
    written = importlib.metadata.version("transformers")
    note = f"It needs transformers {minimum_transformers()} or newer (written with {written}); no remote code. "
    if reason := unlike_transformers_4(dict(config)):
        return note + f"transformers 4 does not compute the same from it: {reason}."
    return note + (
        f"config.json has `rope_theta` and `rope_scaling` beside `rope_parameters`, so that {VERSION_4} reads the same "
        f"positions. Logits of such files were compared between {VERSION_4} and 5; this directory, other releases "
        "of 4, and other programs were not checked."
    )


def front_matter(fields: Mapping[str, object]) -> str:
    """Returns the YAML block at the start of a hub card."""
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False)}---"
