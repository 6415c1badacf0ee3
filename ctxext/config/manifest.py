"""ctxext.json, beside every output: what made it, from what, and with which versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ctxext
from ctxext.config.loader import build, spec
from ctxext.config.output import staged_output as staged_output
from ctxext.config.output import write_whole
from ctxext.errors import EnvironmentFault, InputError, ModelError, SpecError

FILE_NAME = "ctxext.json"
RUNS = Path("runs")
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors")
_WEIGHTS = re.compile(r".+\.safetensors|(?:pytorch|adapter)_model.*\.bin")
_CACHE_FORMAT = 1
SMALL = 64 * 1024  # bytes; `content_hashes` does not remember the hash of a smaller file of data


@spec
class Manifest:
    """What an output says of itself.

    kind: conversion, finetune, model, eval and the like. created: ISO 8601, UTC, with microseconds.
    command: as typed. spec: resolved, plain data. parents: by role, each with its path and weight hashes.
    facts: what was measured, and the sha256 of the output's own weights.
    """

    kind: str
    created: str
    command: list[str]
    spec: dict[str, Any]
    parents: dict[str, dict[str, Any]]
    versions: dict[str, str | None]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        try:
            aware = datetime.fromisoformat(self.created).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise ValueError(f"created: got {self.created!r}; allowed: an ISO 8601 time with its zone")


def new(
    kind: str,
    *,
    spec: dict[str, Any],
    parents: dict[str, dict[str, Any]],
    facts: dict[str, Any],
    command: list[str] | None = None,
) -> Manifest:
    """A manifest of now, with this process's command line and the versions installed."""
    return Manifest(
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        command=command if command is not None else ["ctxext", *sys.argv[1:]],
        spec=spec,
        parents=parents,
        versions=versions(),
        facts=facts,
    )


def write(directory: Path, manifest: Manifest) -> Path:
    """Writes ctxext.json into a directory that exists; where weights lie in it, their hashes are among its facts.
    The file is there whole or not at all: a directory that has one is finished. What JSON cannot hold is a TypeError, a
    number that is not finite a ValueError."""
    path = Path(directory) / FILE_NAME
    data, own = asdict(manifest), weight_hashes(directory)
    if own:
        data["facts"] = {"weights": own} | data["facts"]
    write_whole(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
    return path


def read(directory: Path) -> Manifest | None:
    """The manifest of an output; None where there is none.

    Raises:
        ModelError: there is one, and it is broken.
    """
    path = Path(directory) / FILE_NAME
    try:
        return build(Manifest, json.loads(path.read_bytes()), source=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except SpecError as error:
        reason = "; ".join(error.faults)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise ModelError(f"{path} is broken: {reason}", hint="write the output again")


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that shape a result; None for one that is absent. Imports no package."""
    found: dict[str, str | None] = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    found["ctxext"] = ctxext.__version__
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def parent(directory: Path) -> dict[str, Any]:
    """The entry of `parents` for a model directory: its absolute path and its weight hashes."""
    return {"path": str(Path(directory).absolute()), "weights": weight_hashes(directory)}


def weight_hashes(directory: Path) -> dict[str, str]:
    """The sha256 of each weight file (safetensors, or torch's bin) of a directory, by name, sorted.

    A hash is remembered in the user's cache by the file's real path, size and modification time (ns).
    """
    paths = _weight_files(directory)
    return {path.name: digest for path, digest in zip(paths, content_hashes(paths, small=0), strict=True)}


def remembered_hashes(directory: Path) -> dict[str, str] | None:
    """`weight_hashes` where all of them are remembered; None where a file would have to be read."""
    known, hashes = _read_cache(), {}
    for path in _weight_files(directory):
        status = path.stat()
        entry = known.get(str(path.resolve()))
        if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
            return None
        hashes[path.name] = entry[2]
    return hashes


def file_hash(path: Path) -> str:
    """The sha256 of one file, remembered as those of weights are."""
    return content_hashes([Path(path)], small=0)[0]


def _weight_files(directory: Path) -> list[Path]:
    return [path for path in sorted(Path(directory).iterdir()) if _WEIGHTS.fullmatch(path.name) and path.is_file()]


def content_hashes(paths: Iterable[Path], *, small: int = SMALL) -> list[str]:
    """The sha256 of each file, in the order given, remembered as `weight_hashes` does.

    Files below `small` bytes are hashed each time: the cache is one file, and data may be many small ones.
    """
    known = _read_cache()
    fresh: dict[str, list[Any]] = {}
    hashes = []
    for path in paths:
        real, status = str(path.resolve()), path.stat()
        entry = known.get(real)
        if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = [status.st_size, status.st_mtime_ns, digest]
            if status.st_size >= small:
                fresh[real] = entry
        hashes.append(entry[2])
    if fresh:
        _write_cache(fresh)
    return hashes


def newest(
    root: Path, kinds: Collection[str], accept: Callable[[Path, Manifest], bool] = lambda path, manifest: True
) -> Path:
    """The output of one of `kinds` directly under `root` that was created last, by its manifest.

    Outputs whose manifest is broken are passed over.

    Raises:
        InputError: there is none.
    """
    found = []
    for path in sorted(Path(root).glob("[!.]*/")):
        try:
            manifest = read(path)
        except ModelError:
            continue
        if manifest is not None and manifest.kind in kinds and accept(path, manifest):
            found.append((datetime.fromisoformat(manifest.created), path))
    if not found:
        hint = "name a directory, or make one first"
        raise InputError(f"no output of kind {' or '.join(kinds)} under {root}/", hint=hint)
    return max(found)[1]


def default_out(command: str, name: str) -> Path:
    """./runs/<UTC time>-<command>-<name>: the time to the microsecond, so that two runs never share one."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "output"
    return RUNS / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{command}-{safe}"


def _cache_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ctxext" / "hashes.json"


def _read_cache() -> dict[str, list[Any]]:
    """A cache that is absent, broken or of another format is an empty one."""
    try:
        data = json.loads(_cache_path().read_bytes())
        entries = data["files"] if data["format"] == _CACHE_FORMAT else {}
        return {path: entry for path, entry in entries.items() if _is_entry(entry)}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and [type(part) for part in entry] == [int, int, str]
        and re.fullmatch("[0-9a-f]{64}", entry[2]) is not None
    )


def _write_cache(fresh: dict[str, list[Any]]) -> None:
    """Atomically, over what is there by now; a cache that cannot be written costs time and nothing else."""
    files = {path: entry for path, entry in (_read_cache() | fresh).items() if os.path.exists(path)}
    try:
        _cache_path().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_cache_path(), json.dumps({"format": _CACHE_FORMAT, "files": files}, indent=1))
    except (OSError, EnvironmentFault):
        return
