"""The model card (README.md) an output carries: what it is, from what, with the numbers that prove it."""

from __future__ import annotations

from collections.abc import Sequence

from ctxext import __version__

FRONT = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- ctxext\n- long-context\n---\n\n"


def model_card(title: str, paragraphs: Sequence[str], facts: Sequence[tuple[str, str]]) -> str:
    """Markdown with the hub's front matter: a title, paragraphs and a two-column table."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    body = "\n\n".join(paragraphs)
    table = f"| | |\n|---|---|\n{rows}"
    return f"{FRONT}# {title}\n\n{body}\n\n{table}\n\nWritten by ctxext {__version__}; `ctxext.json` has the rest.\n"
