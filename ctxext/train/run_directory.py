"""Creates, finds and reads the directory of a run, before training and between its processes. No torch.

run/spec.yaml       the model and the resolved spec; with it a run can be resumed or repeated
run/data.json       the hashes of the files of data (train/same_data.py)
run/metrics.jsonl   one line per step
run/checkpoints/    the newest few
run/...             the bundle (train/bundle.py), written when the last step is done, ctxext.json last
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config import presets
from ctxext.config.loader import build, dump_yaml, read_yaml, set_value, spec
from ctxext.config.locks import locked
from ctxext.config.output import check_free, claim, disk_faults, write_whole
from ctxext.errors import InputError, ModelError
from ctxext.model.source import ModelSource, from_directory, resolve
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_plan import RunPlan, plan_run
from ctxext.train.same_data import DATA_FILE, changes_of_data, data_hash, first_few, moved_data, write_record
from ctxext.train.teacher import teacher_weights
from ctxext.units import counted, parse_tokens

SPEC_FILE = "spec.yaml"


def option_fields(
    ctx: str | int | None, data: str | None, steps: int | None, original_length: str | int | None
) -> dict[str, Any]:
    """Returns the most common options as fields of the spec; None: not given. "8k,32k" is a stage and the last ctx."""
    given = {"ctx": ctx, "data.source": data, "steps": steps, "original_length": original_length}
    fields = {name: value for name, value in given.items() if value is not None}
    if isinstance(ctx, str) and "," in ctx:
        *fields["stages"], fields["ctx"] = [part.strip() for part in ctx.split(",")]
    return fields


def plan_from_options(
    model: str | None,
    preset: str,
    given: Mapping[str, Any],
    *,
    needs_weights: bool,
    say: Callable[[str], None] = lambda line: None,
) -> RunPlan:
    """Returns the plan of a preset; `given` replaces fields of it, by dotted path.

    Without `model`, the newest conversion or model is taken, which is logged. Raises InputError where no ctx is given
    and nothing is distilled.
    """
    fields: dict[str, Any] = dict(presets.find("finetune", preset).data)
    for key, value in given.items():
        set_value(fields, key, value)
    if "ctx" not in fields and not fields.get("distill"):
        raise InputError("--ctx is missing", hint="give the context to train at, such as --ctx 32k")
    if model is None:
        model = str(manifests.newest(manifests.RUNS, ("conversion", "model")))
        say(f"no MODEL given: using the newest, {model}")
    source = resolve(model, weights=needs_weights)
    # Distillation without a ctx trains at the original length.
    given_length = fields.get("original_length")
    length = source.original_length if given_length is None else parse_tokens(given_length)
    if "ctx" not in fields and length is not None:
        fields["ctx"] = length
        say(f"no --ctx given: healing at {length:,} tokens, the model's original training length")
    return plan_run(source, build(FinetuneSpec, fields, source=f"finetune spec (preset {preset}, options)"))


def start_run(plan: RunPlan, run: Path) -> None:
    """Makes the run's directory with its spec.yaml and data.json, whose contents a resumed run must find unchanged.

    Raises InputError when the directory exists, and for missing data; EnvironmentFault when the disk is full.
    """
    check_free(run)
    # Hash the model and the data before the directory exists, so that an error leaves nothing behind.
    start = Start.of(plan)
    claim(run)
    try:
        write_spec(run, start)
        write_record(run, plan.spec.data)
    except BaseException:
        shutil.rmtree(run)
        raise


def write_spec(run: Path, start: Start) -> None:
    """Writes spec.yaml, whole or not at all."""
    write_whole(run / SPEC_FILE, dump_yaml(asdict(start)))


@spec
class Start:
    """What a run started from: the contents of spec.yaml.

    `weights` has the sha256 of the model's files by name, `teacher` the same of a second model that is the teacher.
    `data` is a hash of the contents of the data.
    """

    model: str
    name: str
    original_length: int | None
    usable_length: int
    weights: dict[str, str]
    data: str | None
    spec: FinetuneSpec
    teacher: dict[str, str] | None = None

    @classmethod
    def of(cls, plan: RunPlan) -> Start:
        """Returns what a run of `plan` starts from, with the hashes of its files as they are now."""
        teacher = teacher_weights(plan.teacher, plan.spec)
        return cls(
            model=str(plan.source.directory.absolute()),
            name=plan.source.name,
            original_length=plan.source.original_length,
            usable_length=plan.source.usable_length,
            weights=manifests.weight_hashes(plan.source.directory),
            data=data_hash(plan.spec.data),
            spec=plan.spec,
            teacher=None if teacher is None else manifests.weight_hashes(teacher.directory),
        )

    def source(self) -> ModelSource:
        """Returns the model with the name and the lengths that the run started with, whatever its files say now."""
        return replace(
            from_directory(Path(self.model)),
            name=self.name,
            original_length=self.original_length,
            usable_length=self.usable_length,
        )


def discard_unstarted(run: Path) -> None:
    """Removes a run's directory when the run failed before its first step was done: nothing can be resumed."""
    started = _metrics_size(run) > 0 or any(run.glob("checkpoints/step-*"))
    if (run / SPEC_FILE).is_file() and not started:
        shutil.rmtree(run)


def started_as(run: Path, plan: RunPlan, *, any_data: bool = False) -> bool:
    """Returns whether the run was started with the model, the data and the spec of `plan`.

    With `any_data`, the contents of the data are not compared.
    """
    if not (run / SPEC_FILE).is_file():
        return False
    start, now = _read(run), Start.of(plan)
    # Settings that the run's version did not have: those of its behaviour and today's defaults both mean this run.
    if replace(now, data=start.data) not in (start, _read(run, as_today=True)):
        return False
    return any_data or not moved_data(run, start.data, now.spec.data, now.data)


def newest_unfinished(root: Path) -> Path:
    """Returns the run under `root` that was started last, of those that are neither finished nor being trained.

    Raises InputError when there is none.
    """
    runs = [path.parent for path in root.glob(f"*/{SPEC_FILE}") if not (path.parent / manifests.FILE_NAME).exists()]
    runs = [run for run in runs if not _in_use(run)]
    if not runs:
        raise InputError(f"no unfinished run under {root}/", hint="name one with --out")
    return max(runs, key=lambda run: (run / SPEC_FILE).stat().st_mtime_ns)


def plan_resumed(
    run: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    accept: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> RunPlan:
    """Returns the plan of an existing run; `changes` are fields of its spec by dotted path (optimizer.learning_rate).

    Nothing is written: `applied_changes` does that. `say` gets a warning where changed data is accepted.
    Raises InputError when the directory is not a run, when the run is finished or has done more than `steps`, or when
    the spec or the data changed without `accept`; ModelError when the model or the teacher has changed.
    """
    if not (run / SPEC_FILE).is_file():
        raise InputError(f"{run}: not a run: it has no {SPEC_FILE}")
    if (run / manifests.FILE_NAME).exists():
        raise InputError(f"{run} is finished", hint="evaluate it with ctxext eval, or merge it with ctxext merge")
    start = _read(run)
    new = _changed(start.spec, changes or {})
    differ = differences(asdict(start.spec), asdict(new))
    # Another path with the same contents is not a change. Every other difference needs --force.
    if differ and all(one.startswith("data.source was ") for one in differ) and data_hash(new.data) == start.data:
        say(f"the data is now at {new.data.described}; its contents are the same")
    elif differ and not accept:
        raise InputError(
            f"{run} was started with another spec: {', '.join(differ)}",
            hint="leave these options out to keep the run's spec, or add --force to continue with what is given",
        )
    done = _steps_done(run)
    if new.steps < done:
        raise InputError(
            f"{run} has done {counted(done, 'step')}, more than steps: {new.steps}", hint=f"give {done} or more"
        )
    plan = plan_run(start.source(), new)
    # Compare the files with those at the start of the run. Changed weights of the model are never accepted.
    now = Start.of(plan)
    if now.weights != start.weights:
        raise ModelError(f"{start.model}: its weights are not those that this run started from (other sha256)")
    if now.teacher != start.teacher and new.distill == start.spec.distill:
        raise ModelError(f"{run}: the teacher's weights are not those that this run started with (other sha256)")
    moved = moved_data(run, start.data, new.data, now.data) if new.data == start.spec.data else []
    if moved and not accept:
        raise InputError(
            f"{start.spec.data.described}: the data changed since this run started: {first_few(moved)}",
            hint="put the files back, start a new run, or add --force to continue with the changed data",
        )
    if moved:
        say(f"warning: continuing with data that changed since this run started: {first_few(moved)}")
    return plan


@contextmanager
def applied_changes(plan: RunPlan, run: Path) -> Iterator[None]:
    """Runs the block that trains a resumed run: the changes of `plan_resumed` become the run's spec.

    If the block fails before a step was trained with them, the old files are restored.
    """
    kept = {name: (run / name).read_bytes() for name in (SPEC_FILE, DATA_FILE) if (run / name).is_file()}
    trained = _metrics_size(run)
    with disk_faults(run, hint=resume_hint(run)):
        _record_changes(plan, run)
        try:
            yield
        except BaseException:
            if _metrics_size(run) <= trained:
                for name, content in kept.items():
                    if (run / name).read_bytes() != content:
                        write_whole(run / name, content)
            raise


def resume_hint(run: Path) -> str:
    """Returns the hint for a full disk."""
    return f"free disk space, then give: ctxext finetune --resume --out {run}"


def _record_changes(plan: RunPlan, run: Path) -> None:
    """Rewrites spec.yaml and data.json where the spec or the data changed, with the step of a change of the data."""
    start, now = _read(run), Start.of(plan)
    if start == now:
        return
    changed = changes_of_data(run)
    if now.spec.data == start.spec.data and (moved := moved_data(run, start.data, now.spec.data, now.data)):
        changed.append(f"after step {_steps_done(run)}: {first_few(moved)}")
    write_spec(run, now)
    write_record(run, now.spec.data, changed)


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Locks `run` within the block, so that no other process trains it. Raises InputError where one already does."""
    with locked(run, "training"):
        yield


def _in_use(run: Path) -> bool:
    try:
        with alone(run):
            return False
    except InputError:
        return True


def _steps_done(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)


def _metrics_size(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def plan_repeated(
    run: Path, changes: Mapping[str, Any] | None = None, *, accept: bool = False
) -> tuple[RunPlan, list[str]]:
    """Returns (a plan for a new run with what `run` was started with, what has changed since, in words).

    `run` may be finished or not. `changes` as in `plan_resumed`; data that they change is not compared. Raises
    InputError when the directory is not a run, or when weights or data changed without `accept`.
    """
    if not (run / SPEC_FILE).is_file():
        raise InputError(f"{run}: not a run: it has no {SPEC_FILE}")
    start = _read(run)
    plan = plan_run(start.source(), _changed(start.spec, changes or {}))
    # Compare the model's files one by one, then the data and the teacher, unless `changes` replace these.
    now = Start.of(plan)
    files = sorted(start.weights.keys() | now.weights.keys())
    moved = [
        f"{Path(start.model) / file} ({'changed' if file in now.weights else 'missing'})"
        for file in files
        if start.weights.get(file) != now.weights.get(file)
    ]
    if plan.spec.data == start.spec.data and (data := moved_data(run, start.data, plan.spec.data, now.data)):
        moved.append(f"the data, {start.spec.data.described} (changed): {first_few(data)}")
    if now.teacher != start.teacher and plan.spec.distill == start.spec.distill:
        moved.append("the teacher's weights (changed)")
    if moved and not accept:
        raise InputError(
            f"{run} cannot be repeated; missing or changed since then: {', '.join(moved)}",
            hint="restore them, or add --force to run the same spec on the current files",
        )
    return plan, moved


def _read(run: Path, *, as_today: bool = False) -> Start:
    """Reads spec.yaml. With `as_today`, settings that an older version did not have get today's defaults."""
    fields = read_yaml(run / SPEC_FILE)
    if not as_today:
        # A spec.yaml of an older version lacks these settings. Its run trained without sink tokens, without BOS and
        # with fitted sinks frozen, and continues in this way.
        fields["spec"].setdefault("attention", {}).setdefault("sinks", 0)
        fields["spec"].setdefault("data", {}).setdefault("bos", False)
        fields["spec"].setdefault("lora", {}).setdefault("sinks", "frozen")
    start = build(Start, fields, source=str(run / SPEC_FILE))
    if not Path(start.model).is_dir():
        raise ModelError(f"{run}: the model that it started from, {start.model}, no longer exists")
    return start


def _changed(old: FinetuneSpec, changes: Mapping[str, Any]) -> FinetuneSpec:
    fields = asdict(old)
    for path, value in changes.items():
        set_value(fields, path, value)
    return build(FinetuneSpec, fields, source="the run's spec with what was given")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns the differences between two mappings in words, by dotted path."""
    found = []
    for name in old | new:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} was {a}, is {b}")
    return found
