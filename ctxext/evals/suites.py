"""The table of suites: what each checks without torch, prepares once, and runs on a model; imported when used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.data import documents
from ctxext.errors import InputError
from ctxext.evals.engine import Job, Progress
from ctxext.evals.haystacks import GRASS
from ctxext.evals.spec import EvalSpec
from ctxext.model.source import ModelSource, resolve

if TYPE_CHECKING:
    from ctxext.model.load import LoadedModel


def _perplexity(loaded: LoadedModel, spec: Any, place: Path) -> Job:
    from ctxext.evals.perplexity import job

    return job(loaded, spec, place)


def _passkey(loaded: LoadedModel, spec: Any, place: Path) -> Job:
    from ctxext.evals.passkey import job

    return job(loaded, spec, place)


def _niah(loaded: LoadedModel, spec: Any, place: Path) -> Job:
    from ctxext.evals.niah import job

    return job(loaded, spec, place)


def _longppl(loaded: LoadedModel, spec: Any, place: Path) -> Job:
    from ctxext.evals.longppl import job

    return job(loaded, spec, place)


def _ruler(loaded: LoadedModel, spec: Any, place: Path) -> Job:
    from ctxext.evals.ruler import job

    return job(loaded, spec, place)


def _longbench(loaded: LoadedModel, spec: Any, place: Path) -> Job:
    from ctxext.evals.longbench import job

    return job(loaded, spec, place)


def _short(loaded: LoadedModel, spec: Any, place: Path) -> Job:
    from ctxext.evals.short import job

    return job(loaded, spec, place)


JOBS: dict[str, Callable[[Any, Any, Path], Job]] = {
    "perplexity": _perplexity,
    "longppl": _longppl,
    "passkey": _passkey,
    "niah": _niah,
    "ruler": _ruler,
    "longbench": _longbench,
    "short": _short,
}


def _longppl_keys(spec: Any, place: Path, dtype: str, device: str | None, progress: Progress) -> None:
    from ctxext.evals.longppl import prepare

    prepare(spec, place, dtype, device, progress)


def _short_tasks(spec: Any, place: Path, dtype: str, device: str | None, progress: Progress) -> None:
    from ctxext.evals.short import prepare

    prepare(spec, place, dtype, device, progress)


PREPARE: dict[str, Callable[[Any, Path, str, str | None, Progress], None]] = {
    "longppl": _longppl_keys,
    "short": _short_tasks,
}


def check_suites(spec: EvalSpec) -> None:
    """What of each suite can be refused without torch: data that is not there, an evaluator that is missing."""
    for suite in spec.suites:
        if suite.suite in CHECKS:
            CHECKS[suite.suite](suite)


def _enough_for_a_window(suite: Any) -> None:
    _data_is_there(suite)
    if suite.limit is not None and suite.limit < max(suite.lengths):
        raise InputError(
            f"a limit of {suite.limit:,} tokens is less than one window of {max(suite.lengths):,}",
            hint="raise the limit, or leave it out; for another suite alone: --set passkey.limit=40",
        )


def _data_is_there(suite: Any) -> None:
    if not suite.data.strip():
        raise InputError(f"{suite.suite}: data is empty text; allowed: embedded, a file or a directory, a datasets id")
    _a_case_a_length(suite)
    if suite.data not in (documents.EMBEDDED, GRASS):
        documents.fingerprint(suite.data, text_field=suite.text_field)


def _a_case_a_length(suite: Any) -> None:
    if hasattr(suite, "cases") and suite.limit is not None and suite.limit < len(suite.lengths):
        raise InputError(
            f"{suite.suite}: a limit of {suite.limit} is less than one case for each of {len(suite.lengths)} lengths",
            hint="raise the limit, or give fewer lengths",
        )


def _evaluator_is_there(suite: Any) -> None:
    from ctxext.evals.longppl import check

    check(suite)


def _ruler_can_be_made(suite: Any) -> None:
    from ctxext.data.ruler import chosen_tasks, file_hash

    if suite.from_cases is not None:
        file_hash(suite.from_cases)
        return
    _data_is_there(suite)
    for path in (suite.squad, suite.hotpotqa):
        file_hash(path)
    chosen_tasks(suite.tasks, {"squad": suite.squad, "hotpotqa": suite.hotpotqa})


def _longbench_is_there(suite: Any) -> None:
    from ctxext.evals.longbench import check

    check(suite)


def _harness_is_there(suite: Any) -> None:
    from ctxext.evals.short import check

    check(suite)


CHECKS: dict[str, Callable[[Any], None]] = {
    "perplexity": _enough_for_a_window,
    "longppl": _evaluator_is_there,
    "passkey": _data_is_there,
    "niah": _data_is_there,
    "ruler": _ruler_can_be_made,
    "longbench": _longbench_is_there,
    "short": _harness_is_there,
}


def inputs(suite: Any) -> dict[str, Any]:
    """What a suite reads beside its spec, so that two requests can be told apart: the text, files, an evaluator."""
    found: dict[str, Any] = {}
    for name in ("squad", "hotpotqa", "from_cases", "prompts", "include"):
        if getattr(suite, name, None) is not None:
            found[name] = _stamp(Path(getattr(suite, name)))
    if suite.suite == "longbench":
        found["data"] = _stamp(Path(suite.data))
    elif hasattr(suite, "data") and suite.data != GRASS:
        split = "held-out" if suite.data == documents.EMBEDDED else None
        found["data"] = documents.fingerprint(suite.data, text_field=suite.text_field, split=split)
    if getattr(suite, "evaluator", None) is not None:
        found["evaluator"] = model_stamp(resolve(suite.evaluator))
    return found


def model_stamp(source: ModelSource) -> dict[str, Any]:
    """A model by its weights, its config as read, its tokenizer's files and, for a bundle, its base."""
    small = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _tokenizer_files(source.directory)}
    config = hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode()).hexdigest()
    base = {} if source.base is None else {"base": model_stamp(source.base)}
    return {**manifests.parent(source.directory), "config": config, "tokenizer": small, **base}


def _tokenizer_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if "token" in path.name and path.is_file())


def _stamp(path: Path) -> list[list[Any]]:
    """Path, size and modification time of a file, or of the files below a directory."""
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
