"""The state of a pipeline: one file per job with its request, its inputs and its report. No torch.

<out>/state/<job>.json   {"request", "done", "report", "seconds", "output"}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

from ctxext import __version__
from ctxext.config import manifest as manifests
from ctxext.config import presets
from ctxext.config.output import disk_faults, write_whole
from ctxext.data.documents import EMBEDDED, MOST_COMPARED, fingerprint
from ctxext.data.fingerprints import by_time
from ctxext.errors import ModelError
from ctxext.model.source import HUB_ID, resolve
from ctxext.study import steps
from ctxext.study.known_fields import known_fields
from ctxext.study.pipeline import PipelineJob

FOLDER = "state"
NOT_COMPARED = (manifests.FILE_NAME, "README.md")  # files of an input that record when and how it was made
COMPARED_FACTS = ("original_length", "usable_length", "source_layout", "source_rope_parameters")  # facts that steps use
LARGEST = 64 * 1024**2  # bytes of a file, other than weights, whose content is compared

Standing = Literal["new", "unfinished", "reported", "done", "changed"]


def request(job: PipelineJob, step: Any, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what identifies a run of a job: arguments, content of presets, all inputs, version of ctxext.

    Two runs with equal requests give the same output. The result is plain JSON data. `record` is the job's state file:
    fields that the version that wrote it did not have are left out where they hold their default, and a hash of
    training text stays in the form that this version wrote, where the text is still the same.
    """
    recorded = (record or {}).get("request") or {}
    meant = steps.resolved(job.command, step)
    arguments = asdict(step)
    # Models and runs are identified by their content, and other inputs (text) by their fingerprint.
    named = {name: value for name, value in arguments.items() if name in steps.MODELS and value is not None}
    reads = {
        name: [stamp(one, but=NOT_COMPARED) for one in ([value] if isinstance(value, str) else value)]
        for name, value in named.items()
    }
    return plain(
        {
            "command": job.command,
            "arguments": known_fields(step, recorded.get("arguments")),
            "means": known_fields(meant, recorded.get("means")),
            "reads": {**reads, **_texts(job.command, meant, arguments, recorded.get("reads") or {})},
            "ctxext": __version__,
        }
    )


def stamp(name: str, *, but: Collection[str] = ()) -> Any:
    """Returns data that identifies a model or a run.

    directory        the content of its files except those named in `but`, and the weights of its base
    GGUF file        its content
    hub id           name and commit
    preset of a hub  the content of the preset: without a pinned revision, a newer commit goes unnoticed
    """
    path: Path | None = Path(name)
    if os.path.isfile(name):
        return {"gguf": manifests.file_hash(Path(name))}
    if not os.path.isdir(name):
        path = resolve(name, weights=False).path
    if path is None:
        return {"name": name, "preset": presets.find("models", name).data}
    if HUB_ID.fullmatch(name) and not os.path.isdir(name):
        return {"name": name, "commit": path.name}
    # Weights are always hashed, other files up to LARGEST bytes. An adapter depends on its base, so the base counts.
    weights = manifests.weight_hashes(path)
    small = [file for file in sorted(path.iterdir()) if file.is_file() and file.name not in {*weights, *but}]
    files = {file.name: _sha256(file) for file in small if file.stat().st_size <= LARGEST}
    manifest = manifests.read(path)
    base = manifest.parents.get("base") if manifest else None
    meant = {key: manifest.facts[key] for key in COMPARED_FACTS if key in manifest.facts} if manifest else {}
    return {"weights": weights, "files": files, "facts": meant, **({"base": base["weights"]} if base else {})}


def standing(record: dict[str, Any] | None, current: dict[str, Any], out: Path) -> Standing:
    """Returns the status of a job, from its record and its output directory.

    new         it has not run, or its output is gone
    unfinished  it began and did not end
    reported    it ended and its report is stored, but its output is not hashed yet
    done        it is finished and matches the request
    changed     the output is of another request, or was changed after it was written
    """
    if record is None:
        return "changed" if out.exists() else "new"
    # A record of another request says nothing about this one.
    if record["request"] != current:
        return "changed" if out.exists() else "new"
    # The command writes its manifest last: with a stored report and a manifest, the work itself is complete.
    if not record["done"]:
        ended = record["report"] is not None and (out / manifests.FILE_NAME).exists()
        return "reported" if ended else "unfinished"
    if not out.exists():
        return "new"
    # Compare the content, since files may have been changed after the job was done.
    return "done" if plain(stamp(str(out))) == record["output"] else "changed"


def read(root: Path, job: PipelineJob) -> dict[str, Any] | None:
    """Returns the record of a job, None where there is none. Raises ModelError where the file is broken."""
    path = root / FOLDER / f"{job.id}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        if {"request", "done", "report", "seconds", "output"} <= record.keys():
            return dict(record)
        reason = "a key is missing"
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        reason = str(error)
    raise ModelError(f"{path} is broken: {reason}", hint="remove it; the step then runs again")


def write(root: Path, job: PipelineJob, record: dict[str, Any]) -> None:
    """Writes the record of a job atomically."""
    path = root / FOLDER / f"{job.id}.json"
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")


def plain(data: Any) -> Any:
    """Returns `data` as JSON reads it back. A number that is not finite becomes a string."""
    return json.loads(json.dumps(_finite(data), default=_mapped))


def _mapped(value: Any) -> Any:
    return _finite(asdict(value)) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return str(data)
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def _texts(command: str, meant: Any, arguments: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Fingerprints of the text and other files that a step reads, besides models and runs."""
    if command == "finetune":
        from ctxext.train.same_data import data_hash

        teacher = teacher_of(meant)
        zero = Path(arguments["zero"] or "")
        return {
            "data": data_hash(meant.data, then=recorded.get("data")),
            "teacher": None if teacher is None else stamp(teacher),
            "zero": _sha256(zero) if zero.is_file() else None,
        }
    if command == "eval":
        from ctxext.evals.suites import inputs

        found, then = [inputs(suite) for suite in meant.suites], recorded.get("data") or []
        for suite, now, old in zip(meant.suites, found, then, strict=False):
            if "data" in now and hasattr(suite, "text_field"):
                split = "held-out" if suite.data == EMBEDDED else None
                now["data"] = _as_recorded(now["data"], old.get("data"), suite.data, suite.text_field, split)
        return {"data": found}
    # Text of the other commands. A name that is not a local file, such as a hub id, is compared by the arguments alone.
    named = [arguments.get(name) for name in ("data", "calibration")]
    texts = [text for text in named if text is not None and (text == EMBEDDED or Path(text).exists())]
    then = (recorded.get("data") or []) + [None] * len(texts)
    return {
        "data": [
            _as_recorded(fingerprint(text, most=MOST_COMPARED), old, text)
            for text, old in zip(texts, then, strict=False)
        ]
    }


def _as_recorded(now: str, then: str | None, source: str, text_field: str = "text", split: str | None = None) -> str:
    """Returns `then`, a recorded hash, where an older version wrote it and `source` is unchanged; else `now`."""
    return then if then is not None and then == by_time(source, text_field=text_field, split=split) else now


def teacher_of(spec: Any) -> str | None:
    """Returns the model that a finetune spec names as teacher; None for no teacher, and for the model itself."""
    teacher = spec.distill.teacher if spec.distill else "self"
    return None if teacher == "self" else str(teacher)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
