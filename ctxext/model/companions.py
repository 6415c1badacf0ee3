"""The files beside a model's weights: tokenizer, chat templates, licence, and other JSON files. No torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctxext.errors import ModelError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a directory with one of them has a tokenizer
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")  # licences require that their text is kept
CARD = "README.md"
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
STATED = re.compile(r"^(license|license_name|license_link):[ \t]+([^\s\[{>|&*!#].{0,500}?)(?:\s+#.*)?$", re.MULTILINE)


def companions(directory: Path) -> list[str]:
    """Returns the companion files that a directory has, as paths relative to it."""
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)}
    found |= {path for path in directory.iterdir() if path.name.upper().startswith(LICENCES)}
    return sorted(path.relative_to(directory).as_posix() for path in found if path.is_file())


def copy_companions(source: Path, out: Path, instead: Mapping[str, bytes] | None = None) -> None:
    """Copies the companion files unchanged. Files in `instead` are written with the given bytes and not copied."""
    instead = instead or {}
    for name in companions(source):
        if name not in instead:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
    for name, data in instead.items():
        (out / name).write_bytes(data)


def stated_licence(directory: Path) -> dict[str, str]:
    """Returns the licence fields in the front matter of a model's card; empty if there is no card or no such field.

    The function matches single lines and does not parse the YAML: a third-party card may be long, deep or broken.
    """
    card = directory / CARD
    front = FRONT.match(card.read_text("utf-8", "replace")) if card.is_file() else None
    return {name: value.strip().strip("\"'") for name, value in STATED.findall(front[1])} if front else {}


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises ModelError for any other content."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: not a JSON object")
    return found


def require_tokenizer(path: Path) -> None:
    """Raises ModelError unless the directory has a tokenizer."""
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            f"{path}: no tokenizer ({' or '.join(TOKENIZERS)})", hint="copy the tokenizer's files beside the weights"
        )
