"""Writes the result of a finished run: all files needed to use it, under standard names.

config.json and ctxext.json come last.

tuning lora   adapter_model.safetensors (LoRA, embeddings, norms, in fp32), adapter_config.json, tokenizer, and a
              config.json with the positions and the layer map: ordinary attention, S²-Attn is never written
tuning full   an ordinary model directory
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctxext.config import manifest as manifests
from ctxext.config.output import sync, sync_tree
from ctxext.errors import CheckFailed
from ctxext.model.adapters import save_adapter
from ctxext.model.card import model_card
from ctxext.model.companions import copy_companions, read_object, stated_licence
from ctxext.model.convert import write_config
from ctxext.model.layout import pattern_text
from ctxext.model.tokenizer import settle
from ctxext.model.weights import SINGLE
from ctxext.train.run_plan import RunPlan
from ctxext.train.teacher import teacher_weights
from ctxext.units import format_tokens

STAGING = ".bundle-"  # prefix of the directory in a run that holds the result while it is written


def save_bundle(run: Path, plan: RunPlan, model: Any, masters: Mapping[str, Tensor], facts: dict[str, Any]) -> int:
    """Writes the run's result into its directory. Returns how many trained tensors were read back and compared.

    The files are written into a hidden directory in `run` and then renamed into `run`, so that a full disk leaves none
    of them. ctxext.json comes last: a run without it is resumed. Raises CheckFailed where a tensor is missing or was
    not saved exactly.
    """
    # Only one process at a time trains a run (train/run_directory.py, `alone`): an old directory is from one that died.
    for stale in run.glob(f"{STAGING}*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = run / f"{STAGING}{uuid.uuid4().hex}"
    try:
        staging.mkdir()
        if plan.spec.tuning == "full":
            count = _save_whole(staging, plan, masters)
        else:
            count = save_adapter(model, staging, masters)
        copy_companions(plan.source.directory, staging, settle(plan.source.directory, plan.config.fields).files)
        _set_tokenizer_length(staging, plan.config.max_position_embeddings)
        (staging / "README.md").write_text(_card(plan, facts), "utf-8")
        # Full tuning saves fp32 weights whatever dtype it trained in.
        write_config(staging, plan.config.with_fields(dtype="float32") if plan.spec.tuning == "full" else plan.config)
        manifests.write(staging, _manifest(plan, facts, count))
        _move(staging, run)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return count


def _manifest(plan: RunPlan, facts: dict[str, Any], count: int) -> manifests.Manifest:
    role = "source" if plan.spec.tuning == "full" else "base"
    teacher = teacher_weights(plan.teacher, plan.spec)
    return manifests.new(
        "model" if plan.spec.tuning == "full" else "finetune",
        spec=json.loads(json.dumps(asdict(plan.spec))),
        parents={role: manifests.parent(plan.source.directory)}
        | ({} if teacher is None else {"teacher": manifests.parent(teacher.directory)}),
        facts=facts
        | {
            "name": run_name(plan),
            "original_length": plan.positions.original_length,
            "usable_length": plan.positions.usable_length,
            "positions": plan.positions.summary,
            "rope_parameters": plan.config.rope,
            "layout": pattern_text(plan.kinds),
            "teacher": None if plan.teacher is None else plan.teacher.description,
            "trained_tensors": count,
            **({"trained_sinks": plan.source.fitted_layers} if plan.trainables.direct else {}),
        },
    )


def _move(staging: Path, run: Path) -> None:
    """Renames every file below `staging` to its place below `run`: config.json last but one, the manifest last.

    All of it is on the disk when this returns: the checkpoints are removed next.
    """
    sync_tree(staging)
    files = [path for path in staging.rglob("*") if path.is_file()]
    late = ("config.json", manifests.FILE_NAME)
    for path in sorted(files, key=lambda path: late.index(path.name) if path.name in late else -1):
        place = run / path.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    for directory in {run, *((run / path.relative_to(staging)).parent for path in files)}:
        sync(directory)


def run_name(plan: RunPlan) -> str:
    """Returns the name of the result, such as `tiny-swa128-nope-2k`."""
    ctx = plan.spec.ctx
    return f"{plan.source.name}-{f'{ctx // 1024}k' if ctx % 1024 == 0 else ctx}"


def _save_whole(run: Path, plan: RunPlan, masters: Mapping[str, Tensor]) -> int:
    """Saves every weight in fp32 in one file, reads it back and compares it with the masters."""
    tensors: dict[str, Tensor] = {name: master.detach().cpu().contiguous() for name, master in masters.items()}
    # The names must be exactly those of the model: none missing, none extra.
    missing = plan.config.tensors.keys() ^ tensors.keys()
    if missing:
        raise CheckFailed(f"{run}: {len(missing)} weights are missing or not expected, first {min(missing)}")
    save_file(tensors, run / SINGLE, metadata={"format": "pt"})
    reopened = load_file(run / SINGLE)
    for name, tensor in tensors.items():
        if not torch.equal(reopened[name], tensor):
            raise CheckFailed(f"{run}: the saved file does not hold {name} as it was trained")
    return len(tensors)


def _set_tokenizer_length(run: Path, length: int) -> None:
    """Sets model_max_length in tokenizer_config.json: with the source's value, tokenizers would warn or truncate."""
    path = run / "tokenizer_config.json"
    if path.is_file():
        settings = read_object(path)
        settings["model_max_length"] = length
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _card(plan: RunPlan, facts: dict[str, Any]) -> str:
    if plan.spec.tuning == "full":
        text = [f"{plan.source.name}, all weights trained at {format_tokens(plan.spec.ctx)} tokens."]
    else:
        text = [
            f"LoRA, embeddings and norms on {plan.source.name}, trained at {format_tokens(plan.spec.ctx)} tokens.",
            "Open it with ctxext, or merge it into an ordinary model (`ctxext merge`). config.json holds the positions "
            "and the layers that it was trained with. PEFT alone would use those of the base.",
        ]
    licence = stated_licence(plan.source.directory)
    unit = "nats a token" if plan.teacher is None else "of the distillation objective"
    rows = [*plan.rows(), ("final training loss", f"{facts['final_loss']:.4f} {unit}")]
    return model_card(f"{plan.source.name} at {format_tokens(plan.spec.ctx)}", text, rows, licence)
