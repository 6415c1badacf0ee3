"""The table of suites: what each checks without torch, prepares once, and runs on a model; imported when used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.data import documents
from ctxext.errors import InputError
from ctxext.evals.engine import Job, Progress
from ctxext.evals.haystacks import GRASS
from ctxext.evals.spec import EvalSpec

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
            hint="raise the limit, or leave it out",
        )


def _data_is_there(suite: Any) -> None:
    if suite.data not in (documents.EMBEDDED, GRASS):
        documents.fingerprint(suite.data, text_field=suite.text_field)


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
