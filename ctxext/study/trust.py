"""Checks for a pipeline from an untrusted author: no path, link or preset may lead out of the working directory.

Other limits hold for every pipeline: a step is one of ctxext's own commands, YAML holds no tags, weights are
safetensors, remote code is never run. Not limited: the run time, the size of the output, and the hub ids it names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config import presets
from ctxext.config.presets import shipped
from ctxext.errors import InputError
from ctxext.study import steps
from ctxext.study.pipeline import PipelineJob
from ctxext.study.state import teacher_of


def check_inside(job: PipelineJob, step: Any, out: Path) -> None:
    """Raises InputError for a job that reads or writes outside the working directory, with the text and its target."""
    if getattr(step, "hostfile", None) is not None:
        raise InputError(f"step {job.id}: hostfile: --untrusted allows no processes on other hosts")
    allowed = [Path.cwd().resolve(), shipped("presets").resolve(), shipped("deepspeed_configs").resolve()]
    meant = steps.resolved(job.command, step)
    # Any string of the step or of its presets may be used as a path, so all of them are checked.
    for text in _texts([asdict(step), asdict(meant) if is_dataclass(meant) else None]):  # type: ignore[arg-type]
        path = Path(text)
        leads_up = path.is_absolute() or text.startswith("~") or ".." in path.parts
        if leads_up and not (path.is_absolute() and any(path.resolve().is_relative_to(place) for place in allowed)):
            raise _outside(job, text, path)
        # A path inside can still be, or hold, a link that leads outside.
        for entry in _entries(path):
            if not any(entry.resolve().is_relative_to(place) for place in allowed):
                raise _outside(job, text, entry)
    # Outputs may be written below the working directory only, not into the shipped presets.
    for entry in _entries(out):
        if not entry.resolve().is_relative_to(allowed[0]):
            raise _outside(job, str(out), entry)
    _check_models(job, step, meant, allowed)
    if not any(out.absolute().resolve().is_relative_to(place) for place in allowed[:1]):
        raise _outside(job, str(out), out)


def _check_models(job: PipelineJob, step: Any, meant: Any, allowed: list[Path]) -> None:
    """Checks the directories that model presets name, the parents that manifests name, and the links in them."""
    named = [getattr(step, name, None) or () for name in steps.MODELS]
    texts = [one for value in named for one in ([value] if isinstance(value, str) else value)]
    if job.command == "finetune" and (teacher := teacher_of(meant)) is not None:
        texts.append(teacher)
    for text in texts:
        if not os.path.isdir(text):
            places = [_preset_directory(text)] if text in presets.names("models") else []
        else:
            manifest = manifests.read(Path(text))
            places = [Path(str(parent.get("path", "."))) for parent in manifest.parents.values()] if manifest else []
        for entry in (entry for place in places if place is not None for entry in [place, *_entries(place)]):
            if not any(entry.resolve().is_relative_to(inside) for inside in allowed):
                raise _outside(job, text, entry)


def _preset_directory(name: str) -> Path | None:
    found = presets.find("models", name)
    directory = presets.model_preset(found).directory
    return None if directory is None else found.path.parent / directory


def _entries(path: Path) -> Iterator[Path]:
    """Yields a path and everything below it, without following links; nothing for text that is not a path."""
    try:
        if path.is_symlink() or path.exists():
            yield path
            if path.is_dir():
                yield from path.rglob("*")
    except OSError:
        return


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _outside(job: PipelineJob, text: str, leads: Path) -> InputError:
    return InputError(
        f"step {job.id}: {text!r} leads to {leads.resolve()}, outside the working directory",
        hint="move the files below the working directory, or leave out --untrusted if you trust the pipeline",
    )
