"""The manifest ctxext.json of every output: the command that made it, its inputs, and the versions."""

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
SMALL = 64 * 1024  # bytes; `content_hashes` does not cache the hash of a smaller data file


@spec
class Manifest:
    """The content of an output's ctxext.json.

    kind      conversion, finetune, model, eval and the like
    created   ISO 8601, UTC, with microseconds
    command   as typed
    spec      resolved, plain data
    parents   by role, each with its path and weight hashes
    facts     what was measured, and the sha256 of the output's own weights
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
    """Returns a manifest with the current time, this process's command line and the installed versions."""
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
    """Writes ctxext.json into an existing directory; if the directory holds weights, adds their hashes to the facts.

    The file appears whole or not at all: a directory that has one is finished. Raises TypeError for a value that
    JSON cannot hold, and ValueError for a number that is not finite.
    """
    path = Path(directory) / FILE_NAME
    data, own = asdict(manifest), weight_hashes(directory)
    if own:
        data["facts"] = {"weights": own} | data["facts"]
    write_whole(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
    return path


def read(directory: Path) -> Manifest | None:
    """Returns the manifest of an output, or None if there is none.

    Raises:
        ModelError: the manifest exists and is broken.
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
    """Returns the versions of Python and of the packages that affect results.

    An absent package has None. No package is imported.
    """
    found: dict[str, str | None] = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    found["ctxext"] = ctxext.__version__
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def parent(directory: Path) -> dict[str, Any]:
    """Returns the entry of `parents` for a model directory: its absolute path and its weight hashes."""
    return {"path": str(Path(directory).absolute()), "weights": weight_hashes(directory)}


def weight_hashes(directory: Path) -> dict[str, str]:
    """Returns the sha256 of each weight file (safetensors, or torch's bin) of a directory, by name, sorted.

    The user's cache stores each hash by the file's real path, size and modification time (ns).
    """
    paths = _weight_files(directory)
    return {path.name: digest for path, digest in zip(paths, content_hashes(paths, small=0), strict=True)}


def remembered_hashes(directory: Path) -> dict[str, str] | None:
    """Returns `weight_hashes` if the cache has all of them, and None if a file would have to be read."""
    known, hashes = _read_cache(), {}
    for path in _weight_files(directory):
        status = path.stat()
        entry = known.get(str(path.resolve()))
        if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
            return None
        hashes[path.name] = entry[2]
    return hashes


def file_hash(path: Path) -> str:
    """Returns the sha256 of one file, cached as those of weights are."""
    return content_hashes([Path(path)], small=0)[0]


def _weight_files(directory: Path) -> list[Path]:
    return [path for path in sorted(Path(directory).iterdir()) if _WEIGHTS.fullmatch(path.name) and path.is_file()]


def content_hashes(paths: Iterable[Path], *, small: int = SMALL) -> list[str]:
    """Returns the sha256 of each file, in the given order, cached as in `weight_hashes`.

    Files below `small` bytes are hashed each time: the cache is one file, and a data set may have many small files.
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
    # Write the cache once at the end, not once per file.
    if fresh:
        _write_cache(fresh)
    return hashes


def newest(
    root: Path, kinds: Collection[str], accept: Callable[[Path, Manifest], bool] = lambda path, manifest: True
) -> Path:
    """Returns the most recent output of one of `kinds` directly under `root`, by the time in its manifest.

    Outputs with a broken manifest are skipped. `accept` may reject further ones.

    Raises:
        InputError: there is no such output.
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
        hint = "give a directory, or make such an output first"
        raise InputError(f"no output of kind {' or '.join(kinds)} under {root}/", hint=hint)
    return max(found)[1]


def default_out(command: str, name: str) -> Path:
    """Returns ./runs/<UTC time>-<command>-<name>.

    The time has microseconds, so that two runs never share a directory.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "output"
    return RUNS / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{command}-{safe}"


def _cache_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ctxext" / "hashes.json"


def _read_cache() -> dict[str, list[Any]]:
    """Returns the entries of the hash cache. A cache that is absent, broken or of another format counts as empty."""
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
    """Merges `fresh` into the current cache file, atomically. A cache that cannot be written only costs time."""
    # Read the cache again, since another process may have added entries. Drop entries of files that no longer exist.
    files = {path: entry for path, entry in (_read_cache() | fresh).items() if os.path.exists(path)}
    try:
        _cache_path().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_cache_path(), json.dumps({"format": _CACHE_FORMAT, "files": files}, indent=1))
    except (OSError, EnvironmentFault):
        return
