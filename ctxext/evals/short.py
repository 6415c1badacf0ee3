"""Short context: lm-eval's own tasks, run by lm-eval (the optional extra `eval`) on the model in memory.

lm-eval decides the questions and the scoring; the protocol names its version. It gets the model as loaded, with
ctxext's attention, so bundles, conversions and plain models are measured alike. Tasks fetch their data from the hub,
unless their definitions in `include` name local files.

Torch is imported only when a model runs.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.errors import EnvironmentFault, InputError
from ctxext.evals.eval_spec import Short
from ctxext.evals.item_runner import Outcome, ResultRow, SuiteJob
from ctxext.progress import Progress
from ctxext.units import counted

if TYPE_CHECKING:
    from ctxext.model.load import LoadedModel

PREFERRED = ("acc_norm", "acc")  # metrics in order of preference; otherwise a task's first
BATCH = 8  # requests that lm-eval runs together
NO_LENGTH = 0  # length of a row: a task's documents have their own lengths


@dataclass(frozen=True)
class WholeTask:
    """A whole task as one item."""

    id: str
    size: int = 1


def check(spec: Short) -> None:
    """Checks that lm-eval and `include` are there. No torch.

    Errors: EnvironmentFault (no lm-eval), InputError (`include` is not a directory).
    """
    if find_spec("lm_eval") is None:
        raise EnvironmentFault(
            "the suite short runs lm-eval, which is not installed", hint='pip install "ctxext[eval]"'
        )
    if spec.include is not None and not Path(spec.include).is_dir():
        raise InputError(
            f"include: no such directory: {spec.include}", hint="give a directory of lm-eval task definitions (YAML)"
        )


def prepare(spec: Short, place: Path, dtype: str, device: str | None, progress: Progress) -> None:
    """Finds every task and its data before a model is loaded. Errors: those of `check` and `job`."""
    check(spec)
    manager = _manager(spec)
    progress("tasks of lm-eval", 0, len(spec.tasks))
    for done, task in enumerate(spec.tasks, start=1):
        _task(manager, task)
        progress("tasks of lm-eval", done, len(spec.tasks))


def job(loaded: LoadedModel, spec: Short, place: Path) -> SuiteJob:
    """Returns the job with one item per task.

    Errors: those of `check`; InputError (a task that lm-eval does not know), EnvironmentFault (a task's data cannot be
    fetched).
    """
    check(spec)
    manager = _manager(spec)
    version = importlib.metadata.version("lm_eval")
    protocol = f"lm-eval {version}" + (f", first {counted(spec.limit, 'document')} of each task" if spec.limit else "")
    items = [WholeTask(task) for task in dict.fromkeys(spec.tasks)]

    def run(batch: Sequence[WholeTask]) -> list[Outcome]:
        return [_outcome(loaded, manager, item.id, spec.limit) for item in batch]

    return SuiteJob(items, run, lambda outcomes: _rows(protocol, outcomes))


def main_metric(results: dict[str, Any]) -> tuple[str, float, float | None]:
    """Returns (name, value, standard error or None) of a task's results: acc_norm, else acc, else its first metric."""
    values = {
        key: value
        for key, value in results.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    if not values:
        raise InputError(f"lm-eval gives no number for {results.get('alias', 'this task')}")
    by_name = {key.split(",")[0]: key for key in reversed(values)}  # where there are several filters, the first
    key = next((by_name[name] for name in PREFERRED if name in by_name), next(iter(values)))
    name, filter_ = key.split(",", 1)
    error = results.get(f"{name}_stderr,{filter_}")
    return name, float(values[key]), float(error) if isinstance(error, int | float) else None


def _outcome(loaded: LoadedModel, manager: Any, task: str, limit: int | None) -> Outcome:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from ctxext.model.load import causal_lm

    model = HFLM(
        pretrained=causal_lm(loaded.model),
        tokenizer=loaded.tokenizer,
        max_length=loaded.usable_length,
        batch_size=BATCH,
    )
    found: Any = simple_evaluate(
        model,
        tasks=[_task(manager, task)],
        limit=limit,
        task_manager=manager,
        log_samples=False,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    name, value, error = main_metric(found["results"][task])
    n = sum(counts["effective"] for counts in found["n-samples"].values())
    return Outcome(task, task, NO_LENGTH, value * n, n, {"metric": name, "stderr": error})


def _manager(spec: Short) -> Any:
    """Returns lm-eval's index of tasks.

    lm-eval's own definitions are thousands of files. They are not read where `include` has all requested tasks.
    """
    from lm_eval.tasks import TaskManager

    if spec.include is not None:
        manager = TaskManager(include_path=spec.include, include_defaults=False)
        if set(spec.tasks) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=spec.include)
    known = {*manager.all_subtasks, *manager.all_groups}  # no tags: a tag is many tasks without a common figure
    unknown = [task for task in spec.tasks if task not in known]
    if unknown:
        raise InputError(
            f"lm-eval has no task or group {', '.join(unknown)}",
            hint="`lm_eval ls tasks` lists them; put your own definitions into the directory `include`",
        )
    return manager


def _task(manager: Any, task: str) -> Any:
    """Returns lm-eval's task or group of tasks; building it reads or fetches its data."""
    try:
        found = manager.load([task])
    except Exception as error:  # datasets and the hub's client raise errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentFault(
            f"the data of the task {task} cannot be loaded: {reason}",
            hint="lm-eval downloads it from the hub: run it once with a network connection, or give tasks with local "
            "data in `include`",
        ) from error
    return found["groups"].get(task) or found["tasks"][task]


def _rows(protocol: str, outcomes: Sequence[Outcome]) -> list[ResultRow]:
    """Returns their average, where each task counts the same, then one row per task with lm-eval's standard error."""
    each = [
        ResultRow(
            "short",
            protocol,
            outcome.task,
            NO_LENGTH,
            outcome.details["metric"],
            outcome.score / outcome.weight,
            int(outcome.weight),
            *_interval(outcome),
            details={"stderr": outcome.details["stderr"]},
        )
        for outcome in outcomes
    ]
    average = sum(row.value or 0.0 for row in each) / len(each)
    n = sum(row.n for row in each)
    whole = {"tasks": {row.task: row.metric for row in each}}
    return [ResultRow("short", protocol, "", NO_LENGTH, "average", average, n, details=whole), *each]


def _interval(outcome: Outcome) -> tuple[float | None, float | None]:
    """Returns the value minus and plus 1.96 standard errors."""
    error = outcome.details["stderr"]
    if error is None:
        return None, None
    value = outcome.score / outcome.weight
    return value - 1.96 * error, value + 1.96 * error
