"""Resolves a MODEL argument: a local directory, a GGUF file, a preset or a hub id, in that order. No torch.

The description of a model comes from files alone (config.json, safetensors headers, ctxext.json). Every error that
these files can show is raised before torch is imported.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config import presets
from ctxext.config.manifest import Manifest
from ctxext.errors import InputError, ModelError
from ctxext.model.companions import CARD, LICENCES, read_object
from ctxext.model.config_fields import FACTS, PARENT, check_fields
from ctxext.model.hub import download
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind, kinds_of
from ctxext.model.model_config import ModelConfig, parse_config
from ctxext.model.weights import (
    ADAPTER_FILE,
    PICKLE,
    TensorInfo,
    check_tensors,
    only_pickles,
    read_header,
    read_tensors,
)
from ctxext.ops.cost import ModelShape

CONFIG_LIMIT = 10_000_000  # bytes; a config.json is a few kilobytes
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_TEXTS = ["*.json", "tokenizer.model", "merges.txt", "*.jinja"]  # all files that planning reads
HUB_FILES = ["*.safetensors", *HUB_TEXTS, CARD, *(f"{name}*" for name in LICENCES)]


@dataclass(frozen=True)
class ModelSource:
    """A model as its files describe it.

    path             the directory; None when only the shapes are known (planning needs no weights)
    kind             source, model, conversion, finetune (a bundle: adapter on a base) or merge
    config           config.json, parsed
    original_length  length in tokens of the FIRST training; None when RoPE is scaled and the config does not state it
    usable_length    tokens that the model supports now
    manifest         ctxext.json; None for a model that ctxext did not write
    base             for a bundle: the base model of the adapter
    """

    name: str
    path: Path | None
    kind: str
    config: ModelConfig
    original_length: int | None
    usable_length: int
    manifest: Manifest | None = None
    base: ModelSource | None = None

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Returns the kind of each layer."""
        return self.config.kinds

    @property
    def paths(self) -> list[Path | None]:
        """The directories that no output may replace: the model's own, and its base's."""
        return [self.path, *([] if self.base is None else [self.base.path])]

    @property
    def shape(self) -> ModelShape:
        """Returns the sizes for the formulas of ops/cost.py."""
        return self.config.shape

    @property
    def fitted_layers(self) -> tuple[int, ...]:
        """The layers in which a conversion fitted sinks (retrofit/fitted_sinks.py); empty for other models."""
        facts = self.manifest.facts if self.kind == "conversion" and self.manifest else {}
        return tuple((facts.get("sinks") or {}).get("layers", ()))

    @property
    def directory(self) -> Path:
        """The model's directory. Raises ModelError where only the shapes are known."""
        if self.path is None:
            raise ModelError(f"{self.name}: the weights are needed, but only the model's shapes are known")
        return self.path

    def with_original_length(self, tokens: int | None) -> ModelSource:
        """Returns the same model with `tokens` as its original length; None changes nothing."""
        if tokens is None:
            return self
        changed = self.config.with_fields(original_max_position_embeddings=tokens)
        return replace(self, original_length=tokens, usable_length=max(self.usable_length, usable_length(changed)))


def resolve(model: str, *, weights: bool = True, allow_pickle: bool = False) -> ModelSource:
    """Finds `model` and describes it. With `weights`, also checks its weight files against config.json.

    A hub model is downloaded: all files with `weights`, otherwise only its text files. Raises InputError when there is
    no such model, ModelError when its files are incomplete or disagree, and EnvironmentFault when the hub cannot be
    reached.
    """
    # `isdir` returns False for a name that no file system allows, where Path.is_dir may raise.
    if isdir(model):
        return from_directory(Path(model), weights=weights, allow_pickle=allow_pickle)
    if isfile(model) or model.lower().endswith(".gguf"):
        return _from_gguf(Path(model), weights)
    # A name without a slash is a preset. OWNER/NAME is a hub id, and every other name with a slash is a missing path.
    if "/" in model and not HUB_ID.fullmatch(model):
        raise InputError(
            f"{model}: no such directory", hint="give a directory with a config.json, a preset or a hub id"
        )
    if "/" not in model:
        return _from_preset(model, weights, allow_pickle)
    path = download(model, None, _patterns(allow_pickle) if weights else HUB_TEXTS)
    return from_directory(path, weights=weights, allow_pickle=allow_pickle, name=model.split("/")[-1])


def from_directory(
    path: Path, *, weights: bool = True, allow_pickle: bool = False, name: str | None = None
) -> ModelSource:
    """Describes the model in a directory: a plain Hugging Face model, or any output of ctxext.

    Raises ModelError when its files are incomplete or disagree. Pickled weights are not checked here
    (shards.check_pickles does that).
    """
    manifest = manifest_of(path)
    facts: dict[str, Any] = manifest.facts if manifest else {}
    config = parse_config(read_config(path))
    kind = manifest.kind if manifest else "source"
    base = None
    if (path / "adapter_config.json").exists():
        base = _base_of(path, manifest)
        _check_adapter(path, manifest)
    elif weights and not (allow_pickle and only_pickles(path)):
        check_tensors(path, read_tensors(path), config.tensors)
    # Lengths that ctxext recorded have priority over those that config.json implies.
    original = facts.get("original_length") or original_length(config)
    usable = facts.get("usable_length") or usable_length(config)
    name = name or facts.get("name") or path.resolve().name
    return ModelSource(name, path, kind, config, original, usable, manifest, base)


def manifest_of(path: Path) -> Manifest | None:
    """Returns ctxext.json of a model, or None without one. Raises ModelError for a field of a wrong type."""
    manifest = manifests.read(path)
    if manifest is not None:
        check_fields(manifest.facts, FACTS, path / manifests.FILE_NAME)
        for role, parent in manifest.parents.items():
            check_fields({"path": None, "weights": None} | parent, PARENT, f"{path / manifests.FILE_NAME}, its {role}")
    return manifest


def read_config(path: Path) -> dict[str, Any]:
    """Returns config.json unchanged. Raises ModelError when it is missing, too large (10 MB), or not a JSON object."""
    file = path / "config.json"
    if not file.is_file():
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"{path}: not a model: it has no config.json (found {inside})",
            hint="give the directory that holds config.json and the safetensors files",
        )
    if file.stat().st_size > CONFIG_LIMIT:
        raise ModelError(f"{file}: {file.stat().st_size:,} bytes is too large for a config.json")
    return read_object(file)


def original_length(config: ModelConfig) -> int | None:
    """Returns the length in tokens of the first training; None when RoPE is scaled and the config does not state it."""
    rope = config.rope
    stated = config.fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if stated is None and rope.get("rope_type") == "linear":
        return None
    return int(stated or config.max_position_embeddings)


def usable_length(config: ModelConfig) -> int:
    """Returns the length in tokens that a config claims to support.

    This is max_position_embeddings, or the original length times the scaling factor where that is more: many configs of
    scaled models leave max_position_embeddings at the original length.
    """
    rope, claimed = config.rope, config.max_position_embeddings
    original = original_length(config)
    if original is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn", "longrope"):
        return int(claimed)
    return int(max(claimed, original * (rope.get("factor") or 1)))


def original_config(source: ModelSource) -> ModelConfig:
    """Returns the config under which a model's weights compute what they were pretrained for.

    For a pretrained model this is its own config. For a conversion it is a config with the layout and RoPE of the
    source model, in the conversion's class (with fitted sinks in a class without sinks). Raises InputError for a model
    that ctxext trained, for a conversion that does not record its source's layout, and for one whose fitted sinks
    changed biases that its source had.
    """
    # Kind `model` without parents: an output that ctxext pretrained from scratch.
    pretrained = source.kind == "model" and source.manifest is not None and not source.manifest.parents
    if source.kind == "source" or pretrained:
        return source.config
    if source.kind != "conversion":
        raise InputError(
            f"{source.name} is a {source.kind}: its weights were trained after pretraining",
            hint="give a model that was not trained by ctxext, or a conversion of one",
        )
    facts = source.manifest.facts if source.manifest else {}
    try:
        rope, kinds = facts["source_rope_parameters"], kinds_of(facts["source_layout"])
        config, sinks = source.config, facts.get("sinks")
        if sinks and sinks["source_biases"]:
            raise InputError(
                f"{source.name}: fitting sinks changed its biases, so that its weights differ from its source's",
                hint="give the source as the teacher: --set distill.teacher=SOURCE",
            )
        if sinks:
            # Leave out the fitted sinks and biases: use a class that has neither.
            config = config.with_fields(model_type="llama", attention_bias=False)
        return hybrid_config(config, kinds, rope=rope)
    except (KeyError, TypeError):
        message = f"{source.name}: its ctxext.json does not record the source's layout"
        raise InputError(message, hint="convert it again") from None


def tensors_of(source: ModelSource) -> dict[str, TensorInfo]:
    """Returns the stored tensors of a model that is not a bundle. Raises what `read_tensors` raises."""
    return read_tensors(source.directory)


def _base_of(path: Path, manifest: Manifest | None) -> ModelSource:
    # The base must exist at the recorded path, must not be a bundle, and must have the recorded weights.
    if manifest is None or "base" not in manifest.parents:
        raise ModelError(
            f"{path}: an adapter, but no ctxext.json names its base",
            hint="ctxext opens only adapters that it wrote; merge other adapters with PEFT first",
        )
    parent = manifest.parents["base"]
    base = Path(parent["path"])
    if isfile(base / "adapter_config.json"):
        raise ModelError(f"{path}: its base {base} is an adapter too", hint="merge the base first with ctxext merge")
    if not isdir(base):
        # A base in the GGUF cache can be rebuilt from its file, so it gets another hint.
        cached = base.parent.name == "gguf" and base.parent.parent.name == "ctxext"
        raise ModelError(
            f"{path}: its base {base} no longer exists",
            hint="it was read from a GGUF file: `ctxext doctor FILE.gguf` writes it to the cache again"
            if cached
            else "put the base model back at that path, or train again from its current path",
        )
    if manifests.weight_hashes(base) != parent["weights"]:
        raise ModelError(
            f"{path}: the base at {base} is not the one this adapter was trained on (its weights' sha256 differs)",
            hint="put the original base back: on another base the adapter gives wrong results",
        )
    return from_directory(base)


def _check_adapter(path: Path, manifest: Manifest | None) -> None:
    """Checks a bundle's files before PEFT opens them: they are readable, and no trained tensor is missing."""
    read_object(path / "adapter_config.json")
    stored = len(read_header(path / ADAPTER_FILE))
    saved = manifest.facts.get("trained_tensors") if manifest else None
    if stored != saved:
        raise ModelError(f"{path / ADAPTER_FILE}: {stored} trained tensors, but {saved} were saved")


def _patterns(allow_pickle: bool) -> list[str]:
    """Returns the file patterns to download from the hub where the weights are needed."""
    return [*HUB_FILES, *([PICKLE, "pytorch_model-*.bin"] if allow_pickle else [])]


def _from_gguf(file: Path, weights: bool) -> ModelSource:
    """Describes a GGUF file by its header, or with `weights` by its dequantised directory in the cache (gguf.py)."""
    from ctxext.model import gguf

    if weights:
        return from_directory(gguf.dequantised(file), name=file.stem)
    header = gguf.read_header(file)
    config = parse_config(gguf.config_of(header))
    gguf.tensor_names(header, config)
    return ModelSource(file.stem, None, "source", config, original_length(config), usable_length(config))


def _from_preset(name: str, weights: bool, allow_pickle: bool) -> ModelSource:
    # A preset names a directory beside it, or a hub model with its shapes. Without weights the shapes are enough.
    preset = presets.find_model(name)
    model = presets.model_preset(preset)
    if model.directory is not None:
        path = preset.path.parent / model.directory
        return from_directory(path, weights=weights, name=preset.name)
    if weights:
        assert model.hub_id is not None  # ModelPreset has a hub_id or a directory
        path = download(model.hub_id, model.revision, _patterns(allow_pickle))
        found = from_directory(path, allow_pickle=allow_pickle, name=preset.name)
        return replace(found, original_length=model.original_length, usable_length=model.usable_length)
    assert model.shape is not None  # ModelPreset refuses a hub model without one
    config = parse_config({"model_type": model.family, **asdict(model.shape)})
    return ModelSource(preset.name, None, "source", config, model.original_length, model.usable_length)
