"""Checks one model directory or run: files, hashes, shapes, positions, tokenizer, adapter, base, export targets.

Headers and small files are read. Weights are hashed where a recorded hash exists; contents.py says which values are
read. The only model that is built is a miniature with one head: its RoPE is compared with that of the config.
torch is imported inside functions.
Not checked: the quality of the weights (`ctxext eval`), what attention sees (`ctxext verify`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config import presets
from ctxext.config.loader import build
from ctxext.config.manifest import Manifest
from ctxext.doctor.contents import chat_template, finite_values, opens_as_config, short_claim, stop_tokens, two_thetas
from ctxext.doctor.finding import Finding, guarded, judged
from ctxext.doctor.tokenizer import SPECIAL, tokenizer
from ctxext.errors import InputError, ModelError
from ctxext.export.export_card import first_model
from ctxext.export.matrix import TARGETS, verdict
from ctxext.model.adapter_plan import LoraSpec, in_adapted, plan_trainables
from ctxext.model.companions import read_object
from ctxext.model.config_fields import Fields
from ctxext.model.gguf import dequantised, stored_as
from ctxext.model.model_config import ModelConfig, parse_config
from ctxext.model.source import manifest_of, original_length, read_config, usable_length
from ctxext.model.weights import ADAPTER_FILE, HEAD, INDEX, check_tensors, read_header, read_tensors
from ctxext.units import counted, format_tokens

COPY_HINT = "copy or download the files again, or write the output again"


def model(name: str) -> list[Finding]:
    """Returns all findings about a local directory, a run, a GGUF file or a preset with local files.

    Raises InputError for anything else: nothing is downloaded.
    """
    path = _place(name)
    # Later checks need a readable config. Without it, stop here.
    found = [judged("manifest", lambda: _manifest(path)), judged("config", lambda: _config(path))]
    manifest = None if found[0].status == "failure" else manifest_of(path)
    if found[1].status == "failure":
        return [*found, Finding("weights", "warning", "not checked: the expected weights are unknown", COPY_HINT)]
    config = parse_config(read_config(path))
    adapter = (path / "adapter_config.json").is_file()
    # The weight files. An adapter must hold the trained tensors, any other model the tensors that config.json implies.
    found += guarded("adapter" if adapter else "weights", lambda: (
        _adapter(path, manifest, config) if adapter else _weights(path, config)), COPY_HINT)  # fmt: skip
    # Values and hashes are read only from complete files.
    whole = all(finding.name not in ("files", "weights") or finding.status != "failure" for finding in found)
    if whole and not adapter:
        found.append(judged("values", lambda: finite_values(path, config), COPY_HINT))
    if manifest is not None and whole:
        found += guarded("hashes", lambda: _hashes(path, manifest, adapter), COPY_HINT)
    # The positions.
    found.append(judged("transformers", lambda: opens_as_config(path, config), "correct the field in config.json"))
    found.append(judged("positions", lambda: _positions(path, config), "correct rope_parameters in config.json"))
    found += guarded("intended positions", lambda: _promises(manifest, config))
    found += guarded("stored positions", lambda: two_thetas(read_config(path)) + short_claim(config))
    # The tokenizer. The chat template and the stop tokens need one that opens.
    found += guarded("tokenizer", lambda: tokenizer(path, config.shape.vocab_size))
    if all(finding.name != "tokenizer" or finding.status == "ok" for finding in found):
        found += guarded("chat template", lambda: chat_template(path))
        found += guarded("stop tokens", lambda: stop_tokens(path, config))
    if adapter:
        return [*found, Finding("exports", "ok", "only after a merge (ctxext merge)")]
    return [*found, *guarded("exports", lambda: _exports(path, config))]


def _exports(path: Path, config: ModelConfig) -> list[Finding]:
    try:
        oldest = first_model(path)
    except ModelError:
        # A manifest among the parents is broken. Where it is this model's own, the check "manifest" reports it.
        oldest = "SOURCE"
    return [_export(target, config, oldest, read_config(path)) for target in TARGETS]


def _place(name: str) -> Path:
    if name and Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        return dequantised(Path(name))
    if "/" not in name:
        preset = presets.find_model(name)
        directory = presets.model_preset(preset).directory
        if directory is not None:
            return preset.path.parent / directory
    raise InputError(f"{name} is not a local directory, and doctor downloads nothing", hint="give a directory")


def _manifest(path: Path) -> str:
    found = manifest_of(path)
    if found is None:
        return "no ctxext.json: not made by ctxext"
    if (stored := stored_as(found)) is not None:
        return f"read from a GGUF file, {stored}, in {path}"
    return f"{found.kind}, {found.created[:10]}, by ctxext {found.versions.get('ctxext')}"


def _config(path: Path) -> str:
    if (path / "spec.yaml").is_file() and not (path / "config.json").is_file():
        raise ModelError("an unfinished run: there is no model yet", hint=f"ctxext finetune --resume --out {path}")
    config = parse_config(read_config(path))
    return f"{config.family.name}, {config.shape.num_layers} layers, {len(config.tensors)} tensors"


def _weights(path: Path, config: ModelConfig) -> list[Finding]:
    """Compares the files with the index, the tensors with the config, and the head with the embeddings."""
    found = [judged("files", lambda: f"{len({info.file for info in read_tensors(path).values()})} whole", COPY_HINT)]
    if found[0].status == "failure":
        return found
    tensors = read_tensors(path)
    named = {info.file for info in tensors.values()}
    stray = sorted(file.name for file in path.glob("*.safetensors") if file.name not in named)
    if stray:
        found.append(
            Finding(
                "files", "warning", f"not in {INDEX}: {', '.join(stray)}", "remove these files: no program reads them"
            )
        )
    # A tied model needs no stored head. An untied model without one gets only this failure, not also a missing tensor.
    expected = config.tensors
    tied, stored = config.shape.tied, HEAD in tensors
    if not tied and not stored:
        text = f"config.json says that the head is not tied, and {HEAD} is missing"
        found.append(Finding("tied embeddings", "failure", text, "set tie_word_embeddings to true in config.json"))
        expected.pop(HEAD)
    elif stored:
        found.append(_head(path, tied))
    else:
        found.append(Finding("tied embeddings", "ok", "tied, and no head is stored"))

    def agrees() -> str:
        check_tensors(path, tensors, expected)
        return f"{len(tensors)} tensors, names and shapes as in config.json"

    return [*found, judged("tensors", agrees, COPY_HINT)]


def _head(path: Path, tied: bool) -> Finding:
    import torch

    from ctxext.model.shards import EMBEDDING, tensor_reader

    read = tensor_reader(path)
    head, embedding = read(HEAD), read(EMBEDDING)
    same = head is not None and embedding is not None and head.shape == embedding.shape and torch.equal(head, embedding)
    # A tied model ignores the stored head. An untied one trains head and embeddings separately.
    name = "tied embeddings"
    if tied and not same:
        text = f"config.json says tied, and {HEAD} differs from {EMBEDDING}: loading would drop it"
        return Finding(name, "failure", text, "set tie_word_embeddings to false in config.json")
    if same and not tied:
        text = f"not tied, and {HEAD} equals {EMBEDDING}: training would make them different"
        return Finding(name, "warning", text, "set tie_word_embeddings to true if they belong together")
    return Finding(
        name, "ok", "tied, and the stored head equals the embeddings" if tied else "not tied, the head is stored"
    )


def _adapter(path: Path, manifest: Manifest | None, config: ModelConfig) -> list[Finding]:
    """Checks that the adapter file holds all tensors that were trained, and that its base is unchanged.

    The run's spec and adapter_config.json say which tensors were trained.
    """

    def complete() -> str:
        stored = set(read_header(path / ADAPTER_FILE))
        settings = read_object(path / "adapter_config.json")
        # Trained whole (modules_to_save), by LoRA (target modules), or directly (parameters such as sinks).
        whole, targets = set(settings.get("modules_to_save") or ()), set(settings.get("target_modules") or ())
        direct: tuple[str, ...] = ()
        if manifest is not None and "lora" in manifest.spec:
            lora = build(LoraSpec, manifest.spec["lora"], source=f"{path / manifests.FILE_NAME}: spec.lora")
            plan = plan_trainables(config, "lora", lora, manifest.facts.get("trained_sinks") or ())
            whole, targets = whole | set(plan.whole), targets | {group.name for group in plan.lora}
            direct = plan.direct
        # The names under which PEFT stores them.
        wanted = {f"base_model.model.{name}.weight" for name in whole} | {in_adapted(name, targets) for name in direct}
        for name in (name.removesuffix(".weight") for name in config.tensors):
            if name.rpartition(".")[2] in targets and not name.endswith(".bias"):
                kind = "lora_embedding_{}" if name.endswith("embed_tokens") else "lora_{}.weight"
                wanted |= {f"base_model.model.{name}.{kind.format(part)}" for part in "AB"}
        lost = sorted(wanted - stored)
        saved = manifest.facts.get("trained_tensors") if manifest else None
        if lost:
            raise ModelError(f"{len(lost)} trained tensors are not in {ADAPTER_FILE}, first {lost[0]}")
        if saved is not None and saved != len(stored):
            raise ModelError(f"{ADAPTER_FILE} has {len(stored)} tensors; the run saved {saved}")
        return f"{len(stored)} trained tensors, none missing"

    def base() -> str:
        parent = manifest.parents.get("base") if manifest else None
        if parent is None:
            raise ModelError("the base that it was trained on is unknown", hint="merge foreign adapters with PEFT")
        if not Path(parent["path"]).is_dir():
            raise ModelError(f"{parent['path']} is missing", hint="put the base back, or train again")
        if manifests.weight_hashes(Path(parent["path"])) != parent["weights"]:
            raise ModelError(f"the weights in {parent['path']} have changed", hint="put the original base back")
        return f"{parent['path']}, unchanged"

    again = "copy the run again, or restore the trained tensors from a checkpoint (ctxext finetune --resume)"
    return [judged("adapter", complete, again), judged("base", base)]


def _hashes(path: Path, manifest: Manifest, adapter: bool) -> list[Finding]:
    """Compares the weights with their recorded hashes, and checks that the parents still exist unchanged."""
    found, own = [], manifest.facts.get("weights")
    if isinstance(own, dict):
        found.append(judged("hashes", lambda: _as_written(path, own), COPY_HINT))
    else:
        found.append(Finding("hashes", "ok", "not checked: the manifest records those of the parents only"))
    for role, parent in manifest.parents.items():
        place = Path(parent.get("path", ""))
        # `_adapter` checks the base of an adapter. A parent without a local path cannot be checked.
        if (role == "base" and adapter) or not place.is_absolute():
            continue
        if not place.is_dir():
            found.append(Finding(f"parent {role}", "ok", f"{place} is missing; the model runs without it"))
        elif manifests.weight_hashes(place) != parent.get("weights"):
            remedy = "nothing, unless you want to make this model from it again"
            found.append(Finding(f"parent {role}", "warning", f"the weights in {place} have changed", remedy))
        else:
            found.append(Finding(f"parent {role}", "ok", f"{place}, unchanged"))
    return found


def _as_written(path: Path, own: dict[str, str]) -> str:
    here = manifests.weight_hashes(path)
    changed = sorted(name for name, value in own.items() if here.get(name) != value)
    if changed:
        raise ModelError(f"{', '.join(changed)}: the content differs from what was written")
    return f"{counted(len(own), 'file')} as written"


def _positions(path: Path, config: ModelConfig) -> str:
    """Compares the RoPE that transformers builds from config.json with the one this package computes from it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from ctxext.model.frequencies import check_realised

    # One head of the real width: the frequencies depend on the width of a head, not on the number of heads.
    small = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "moe_intermediate_size": 8}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    raw = read_config(path) | {"head_dim": config.shape.head_dim} | dict.fromkeys(SPECIAL)
    raw |= {name: value for name, value in small.items() if name in raw or name == "num_key_value_heads"}
    # Building the model draws random weights; the caller's random state stays as it is.
    try:
        with torch.random.fork_rng():
            shadow: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.family.name].from_dict(raw))
    except Exception as error:  # transformers raises errors of any kind for foreign configs
        raise ModelError(f"transformers cannot build the model: {type(error).__name__}: {str(error)[:200]}") from error
    worst = check_realised(shadow, config)
    rope = config.rope
    if not rope:
        return "no layer has RoPE"
    return f"{rope['rope_type']}, theta {rope['rope_theta']:g}; realised to {worst:.0e} (relative)"


def _promises(manifest: Manifest | None, config: ModelConfig) -> list[Finding]:
    """Compares the positions and lengths recorded in the manifest with those of config.json."""
    facts = manifest.facts if manifest else {}
    meant, found, rope = facts.get("rope_parameters") or facts.get("source_rope_parameters"), [], dict(config.rope)
    # Manifests without this field left it to transformers: do not compare it.
    if meant and "original_max_position_embeddings" not in meant:
        rope.pop("original_max_position_embeddings", None)
    if meant and rope and meant != rope:
        text = f"{'the run' if manifest and manifest.kind != 'conversion' else 'the conversion'} set {meant}, "
        text += f"config.json has {rope}"
        found.append(Finding("intended positions", "failure", text, "put the config.json of the run back"))
    usable, claimed = facts.get("usable_length"), usable_length(config)
    if usable and usable > claimed:
        text = f"trained to {format_tokens(usable)} tokens, config.json gives {format_tokens(claimed)}"
        found.append(Finding("length", "warning", text, "raise max_position_embeddings in config.json"))
    if original_length(config) is None and not facts.get("original_length"):
        text = "RoPE is scaled and the original length is not stored"
        found.append(Finding("length", "warning", text, "give --original-length when you extend it"))
    return found


def _export(target: str, config: ModelConfig, source: str, raw: Fields) -> Finding:
    found = verdict(target, config, source, raw)
    name = f"export {target}"
    if found.honoured:
        return Finding(name, "ok", found.how)
    return Finding(name, "warning", "; ".join(found.objections), "; or ".join(found.nearest))
