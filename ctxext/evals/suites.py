"""The table of suites: what each checks without torch, prepares once, and runs on a model; imported when used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.data import documents
from ctxext.errors import InputError
from ctxext.evals.eval_spec import EvalSpec
from ctxext.evals.haystacks import GRASS
from ctxext.model.source import ModelSource, resolve

PREPARED = ("longppl", "short")  # suites with a step before the models load: the evaluator's keys, lm-eval's tasks


def module_of(suite: str) -> Any:
    """Imports evals/<suite>.py on use, because most need torch. Each has `job`, some `check` and `prepare`."""
    return import_module(f"ctxext.evals.{suite}")


def check_suites(spec: EvalSpec) -> None:
    """Raises what can be refused without torch, suite by suite: missing data, a missing evaluator."""
    for suite in spec.suites:
        if suite.suite in CHECKS:
            CHECKS[suite.suite](suite)


def _enough_for_a_window(suite: Any) -> None:
    _data_is_there(suite)
    if suite.limit is not None and suite.limit < max(suite.lengths):
        raise InputError(
            f"a limit of {suite.limit:,} tokens is less than one window of {max(suite.lengths):,}",
            hint="raise the limit, or leave it out; to limit another suite alone: --set passkey.limit=40",
        )


def _data_is_there(suite: Any) -> None:
    if not suite.data.strip():
        raise InputError(f"{suite.suite}: data is empty text; allowed: embedded, a file or a directory, a datasets id")
    _a_case_a_length(suite)
    if suite.data not in (documents.EMBEDDED, GRASS):
        documents.read_documents(suite.data, text_field=suite.text_field)


def _a_case_a_length(suite: Any) -> None:
    if hasattr(suite, "cases") and suite.limit is not None and suite.limit < len(suite.lengths):
        raise InputError(
            f"{suite.suite}: a limit of {suite.limit} is less than one case for each of {len(suite.lengths)} lengths",
            hint="raise the limit, or give fewer lengths",
        )


def _ruler_can_be_made(suite: Any) -> None:
    from ctxext.data.ruler import chosen_tasks, file_hash

    if suite.from_cases is not None:
        file_hash(suite.from_cases)
        return
    _data_is_there(suite)
    for path in (suite.squad, suite.hotpotqa):
        file_hash(path)
    chosen_tasks(suite.tasks, {"squad": suite.squad, "hotpotqa": suite.hotpotqa})


def _by_itself(suite: Any) -> None:
    """Runs the check of the suite's own module, without torch."""
    module_of(suite.suite).check(suite)


CHECKS: dict[str, Callable[[Any], None]] = {
    "perplexity": _enough_for_a_window,
    "longppl": _by_itself,
    "passkey": _data_is_there,
    "niah": _data_is_there,
    "ruler": _ruler_can_be_made,
    "longbench": _by_itself,
    "short": _by_itself,
}


def inputs(suite: Any) -> dict[str, Any]:
    """Returns what a suite reads besides its spec, to tell two requests apart: the text, files, an evaluator."""
    found: dict[str, Any] = {}
    for name in ("squad", "hotpotqa", "from_cases", "prompts", "include"):
        if getattr(suite, name, None) is not None:
            found[name] = _stamp(Path(getattr(suite, name)))
    # LongBench's data is stamped as files; other data gets the fingerprint of its documents. Grass is a constant.
    if suite.suite == "longbench":
        found["data"] = _stamp(Path(suite.data))
    elif hasattr(suite, "data") and suite.data != GRASS:
        split = "held-out" if suite.data == documents.EMBEDDED else None
        found["data"] = documents.fingerprint(
            suite.data, text_field=suite.text_field, split=split, most=documents.MOST_COMPARED
        )
    if getattr(suite, "evaluator", None) is not None:
        found["evaluator"] = model_stamp(resolve(suite.evaluator))
    return found


def model_stamp(source: ModelSource) -> dict[str, Any]:
    """Identifies a model by its weights, its config as read, its tokenizer's files and, for a bundle, its base."""
    small = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _tokenizer_files(source.directory)}
    config = hashlib.sha256(json.dumps(source.config.fields, sort_keys=True, default=str).encode()).hexdigest()
    base = {} if source.base is None else {"base": model_stamp(source.base)}
    return {**manifests.parent(source.directory), "config": config, "tokenizer": small, **base}


def _tokenizer_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if "token" in path.name and path.is_file())


def _stamp(path: Path) -> list[list[Any]]:
    """Returns path, size and modification time of a file, or of all files below a directory."""
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
