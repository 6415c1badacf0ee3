"""Finds presets by name: first as a path, then in ./presets, then in the copy that comes with the package.

A preset is a YAML file that states only what differs from the defaults of the spec it is built into.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import takewhile
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import ctxext
from ctxext.config.loader import Tokens, build, read_yaml, spec
from ctxext.errors import InputError, SpecError

KINDS = ("models", "hybrid", "finetune", "pretrain", "eval", "probe", "pipelines")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Preset:
    """The content of one YAML file. `name` is the file's stem."""

    kind: str
    name: str
    path: Path
    data: dict[str, Any]


@spec
class PresetShape:
    """The fields of a model's config.json that planning needs, under Hugging Face's names; lengths in tokens."""

    hidden_size: Annotated[int, Field(gt=0)]
    num_hidden_layers: Annotated[int, Field(gt=0)]
    num_attention_heads: Annotated[int, Field(gt=0)]
    num_key_value_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    intermediate_size: Annotated[int, Field(gt=0)]
    vocab_size: Annotated[int, Field(gt=0)]
    max_position_embeddings: Annotated[int, Field(gt=0)]
    rms_norm_eps: Annotated[float, Field(gt=0)]
    rope_parameters: dict[str, float | int | str]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Of q, k and v; whether o has one too is the family's affair."""
    sliding_window: Annotated[int, Field(gt=0)] | None = None


@spec
class ModelPreset:
    """A model by its short name: its location, and the shapes with which it can be planned without its weights.

    The location is `hub_id`, or a `directory` next to the preset. `original_length` is the length at which the model
    was first trained, `usable_length` the length it supports now, in tokens.
    """

    family: str
    original_length: Tokens
    usable_length: Tokens
    hub_id: str | None = None
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    directory: str | None = None
    shape: PresetShape | None = None

    def __post_init__(self) -> None:
        if (self.hub_id is None) == (self.directory is None):
            raise ValueError("hub_id and directory: give exactly one of them")
        if self.hub_id is not None and self.shape is None:
            raise ValueError("shape: missing; plans for a model of the hub need it, since they read no weights")
        if self.usable_length < self.original_length:
            raise ValueError(f"usable_length {self.usable_length} is below original_length {self.original_length}")


def shipped(folder: str) -> Path:
    """Returns the directory `folder` ("presets", "deepspeed_configs") that comes with the package.

    An installed wheel has it inside the package, a checkout next to it.
    """
    package = Path(ctxext.__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def find(kind: str, name: str) -> Preset:
    """Returns the preset of a name: an existing file, ./presets/<kind>/<name>.yaml, or the one in the package.

    Raises:
        InputError: there is none; the hint has the nearest names, or all of them.
        SpecError: the file is not a YAML mapping.
    """
    if _looks_like_a_path(name):
        path = Path(name)
        if not isfile(path):  # unlike Path.is_file, it returns False for names that are invalid on this system
            raise InputError(f"no file {name}", hint=f"names known without a path: {_list(kind)}")
        return Preset(kind, path.stem, path, read_yaml(path))
    if _NAME.fullmatch(name):
        for root in _roots(kind):
            path = root / f"{name}.yaml"
            if isfile(path):
                return Preset(kind, name, path, read_yaml(path))
    close = difflib.get_close_matches(name, names(kind), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else None
    one = kind.removesuffix("s")  # singular for the message: "models" and "pipelines" are plurals
    raise InputError(f"no {one} preset is named {name!r}; allowed: a YAML file, or {_list(kind)}", hint=hint)


def find_model(name: str) -> Preset:
    """Returns a model's preset for a name that is not a directory.

    The error also says that there is no such directory, for users who misspelt one.
    """
    try:
        return find("models", name)
    except SpecError:
        raise
    except InputError as error:
        hint = error.hint or "give a directory with a config.json, a hub id OWNER/NAME, or a preset's name"
        raise InputError(f"there is no directory {name!r} here, and {error.message}", hint=hint) from None


def names(kind: str) -> list[str]:
    """Returns the names that `find` knows for a kind, sorted."""
    found = {path.stem for root in _roots(kind) for path in root.glob("*.yaml")}
    return sorted(name for name in found if _NAME.fullmatch(name))


def kinds(kind: str | None = None) -> tuple[str, ...]:
    """Returns all kinds, or only the given one. Raises InputError for an unknown kind."""
    if kind is not None and kind not in KINDS:
        raise InputError(f"no presets of kind {kind!r}; allowed: {', '.join(KINDS)}")
    return KINDS if kind is None else (kind,)


def parted(name: str) -> tuple[str, str]:
    """Splits "finetune/heal" into kind and name; finds the kind of a file, or of a name that only one kind has.

    Raises InputError if no kind has the name, or several have.
    """
    kind, slash, rest = name.partition("/")
    if slash and kind in KINDS:
        return kind, rest
    if _looks_like_a_path(name):
        # A file in a directory such as presets/eval/ has the kind of that directory.
        if Path(name).parent.name in KINDS:
            return Path(name).parent.name, name
        raise InputError(f"{name}: its kind of preset is not known", hint=f"KIND/{name}; kinds are {', '.join(KINDS)}")
    having = [kind for kind in KINDS if name in names(kind)]
    if len(having) == 1:
        return having[0], name
    found = f"{name} is a preset of {' and '.join(having)}" if having else f"no preset is named {name!r}"
    raise InputError(found, hint=f"write KIND/NAME; kinds are {', '.join(KINDS)}")


def comment(kind: str, name: str) -> str:
    """Returns the comment at the top of a preset, as one line."""
    lines = find(kind, name).path.read_text("utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))


def model_preset(preset: Preset) -> ModelPreset:
    """Builds the ModelPreset of a preset. Raises SpecError, with the file's path, if a field is missing or wrong."""
    return build(ModelPreset, preset.data, source=str(preset.path))


def _looks_like_a_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or (("/" in name or "\\" in name) and isfile(name))


def _roots(kind: str) -> list[Path]:
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; allowed: {', '.join(KINDS)}")
    return [Path("presets") / kind, shipped("presets") / kind]


def _list(kind: str) -> str:
    return ", ".join(names(kind)) or "(none)"
