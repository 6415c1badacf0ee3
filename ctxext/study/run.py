"""A pipeline carried out: jobs one after the other, what is done skipped, what was begun gone on with. No torch.

<out>/pipeline.json     the pipeline as it was read; <out> is locked while it runs
<out>/<job>/            a step's output, as its command makes it
<out>/state/<job>.json  what it was asked, what it read, what it reported
<out>/results.json, results.md, ctxext.json   when all is done
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ctxext import api
from ctxext.config import manifest as manifests
from ctxext.config.locks import locked
from ctxext.config.output import disk_faults, write_whole
from ctxext.errors import CtxextError, InputError
from ctxext.study import state, steps
from ctxext.study.flow import filled
from ctxext.study.inputs import check_inputs
from ctxext.study.pipeline import Job, Pipeline
from ctxext.study.results import Results, results
from ctxext.study.trust import check_inside
from ctxext.train.run import differences

FILE = "pipeline.json"
EVAL_REQUEST = "request.json"  # with it an evaluation knows what it has done (pipeline.py)
RUNS: dict[str, Callable[..., Any]] = {
    "plan": api.plan,
    "convert": api.convert,
    "finetune": api.finetune,
    "eval": api.evaluate,
    "probe": api.probe,
    "merge": api.merge,
    "export": api.export_model,
    "report": api.write_report,
}
CALLBACKS: dict[str, tuple[str, ...]] = {  # that each of these functions takes
    "convert": ("say", "progress"),
    "finetune": ("say", "on_step"),
    "eval": ("say", "progress"),
    "probe": ("say", "progress"),
    "merge": ("say",),
    "plan": (),
    "export": (),
    "report": (),
}


@dataclass(frozen=True)
class Plan:
    """A pipeline and where it goes. `standings` are those of jobs whose inputs are known; `waits` for others' outputs.

    begin    the step to begin at: those before it are taken as they are, it and those after it run anew
    trusted  False: no path, and no link, may lead out of the working directory
    """

    pipeline: Pipeline
    out: Path
    begin: str | None
    force: bool
    trusted: bool
    standings: dict[str, str]


def plan_pipeline(
    pipeline: Pipeline, out: Path | None = None, *, begin: str | None = None, force: bool = False, trusted: bool = True
) -> Plan:
    """Where every job stands; nothing is written.

    Raises SpecError where text that a step reads is not there; InputError where a finished output is of other inputs
    and `force` does not say to replace it, and for a `begin` whose earlier steps are not done.
    """
    out = out or manifests.RUNS / pipeline.name
    if begin is not None and begin not in pipeline.steps:
        raise InputError(f"--from {begin}: no step has this name; there are {', '.join(pipeline.steps)}")
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not (out / FILE).is_file():
        raise InputError(f"{out} exists and is no pipeline's output", hint="give another --out")
    check_inputs(pipeline, out, begin=begin, trusted=trusted)
    standings: dict[str, str] = {}
    for job in pipeline.jobs:
        if begin is not None:
            early = pipeline.steps.index(job.step) < pipeline.steps.index(begin)
            standings[job.id] = _taken(out, job) if early else "again"
        elif any(standings[other] != "done" for other in _needs(job)):
            standings[job.id] = "waits"
        else:
            standings[job.id] = _standing(job, pipeline, out, force, trusted)
    return Plan(pipeline, out, begin, force, trusted, standings)


def _taken(out: Path, job: Job) -> str:
    record = state.read(out, job)
    if record is None or not record["done"] or not (out / job.id).exists():
        raise InputError(f"--from: {job.id} comes before and is not done", hint="begin there, or earlier")
    return "taken"


def _standing(job: Job, pipeline: Pipeline, out: Path, force: bool, trusted: bool) -> str:
    record = state.read(out, job)
    asked = state.request(job, _filled(job, _reports(pipeline, out, job), out, trusted))
    found = state.standing(record, asked, out / job.id)
    _may_replace(found, record, asked, out / job.id, force)
    return found


def _may_replace(found: str, record: dict[str, Any] | None, asked: dict[str, Any], out: Path, force: bool) -> None:
    """Refuse to run a step again over a finished output that nobody said may go."""
    if found == "changed" and not force:
        moved = differences(record["request"], asked) if record else ["it is not of this pipeline"]
        raise InputError(
            f"{out} is there, and not what is asked for: {'; '.join(moved) or 'its files changed since'}",
            hint="give --force to run the step again and replace it, or another --out",
        )


def run_pipeline(plan: Plan, *, say: api.Say = api.ignore, progress: api.Progress = api.ignore) -> Results | None:
    """Every job in its turn, then the results on disk. None where training was interrupted: the same call goes on.

    Errors are those of the commands, with the step's name before them; what was done stays done.
    """
    about = {"name": plan.pipeline.name, "values": plan.pipeline.values, "over": plan.pipeline.over}
    with disk_faults(plan.out, hint="make room, then give the same command again: what is done is not done again"):
        plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out, "pipeline"):
        write_whole(plan.out / FILE, json.dumps(state.plain(about), indent=2) + "\n")
        outcomes: dict[str, str] = {}
        for number, job in enumerate(plan.pipeline.jobs, 1):
            say(f"[{number}/{len(plan.pipeline.jobs)}] {job.id}: {job.command}")
            try:
                outcomes[job.id] = _job(plan, job, say, progress)
            except CtxextError as error:
                error.message = f"step {job.id}: {error.message}"
                error.args = (error.message,)
                raise
            if outcomes[job.id] == "interrupted":
                return None
        found = results(plan.pipeline, plan.out, outcomes)
        write_whole(plan.out / "results.json", json.dumps(asdict(found), indent=2) + "\n")
        write_whole(plan.out / "results.md", found.markdown())
        facts = {"jobs": outcomes, "seconds": found.seconds}
        manifests.write(plan.out, manifests.new("pipeline", spec=state.plain(about), parents={}, facts=facts))
    return found


def _job(plan: Plan, job: Job, say: api.Say, progress: api.Progress) -> str:
    """Run, resume or skip one job: `ran`, `resumed`, `skipped`, `taken` or `interrupted`."""
    if plan.standings[job.id] == "taken":
        return "taken"
    out, record = plan.out / job.id, state.read(plan.out, job)
    step = _filled(job, _reports(plan.pipeline, plan.out, job), plan.out, plan.trusted)
    asked = state.request(job, step)
    standing: str = state.standing(record, asked, out)
    if plan.standings[job.id] == "again" and standing in ("new", "changed", "done"):  # not what a killed --from left
        standing = "again"
    _may_replace(standing, record, asked, out, plan.force)
    if standing == "done":
        say(f"  as asked and unchanged: {out}")
        return "skipped"
    if standing == "reported" and record is not None:
        _done(plan.out, job, record)
        return "resumed"
    resume = standing == "unfinished" and job.command == "finetune" and _resumable(out)
    keep = resume or (standing == "unfinished" and job.command == "eval" and _eval_resumable(out))
    state.write(plan.out, job, {"request": asked, "done": False, "report": None, "seconds": None, "output": None})
    began = time.monotonic()
    report = _call(job.command, step, out, resume, not keep, say, progress)
    if job.command == "plan":
        report.refuse()
    if getattr(report, "finished", True) is False:
        return "interrupted"
    as_dict = getattr(report, "to_dict", None) or getattr(report, "as_dict", None)
    told_of = state.plain(as_dict() if as_dict else asdict(report)) | {"out": str(out)}
    seconds = round(time.monotonic() - began, 1)
    _done(plan.out, job, {"request": asked, "done": False, "report": told_of, "seconds": seconds, "output": None})
    return "resumed" if keep and record is not None else "ran"


def _done(root: Path, job: Job, record: dict[str, Any]) -> None:
    """Keep what a job reported first: to hash what it wrote may take minutes, and a kill would cost a training."""
    state.write(root, job, record)
    state.write(root, job, record | {"done": True, "output": state.plain(state.stamp(str(root / job.id)))})


def _call(command: str, step: Any, out: Path, resume: bool, force: bool, say: api.Say, progress: api.Progress) -> Any:
    given = {field.name: getattr(step, field.name) for field in fields(step)}
    callbacks = {"say": say, "progress": progress, "on_step": lambda metrics: progress("training", metrics.step, 0)}
    taken = {name: callbacks[name] for name in CALLBACKS[command]}
    if command == "finetune":
        given["resume"] = resume
    return RUNS[command](**given, **taken, out=out, force=force)


def _eval_resumable(out: Path) -> bool:
    return (out / EVAL_REQUEST).is_file() and not (out / manifests.FILE_NAME).exists()


def _resumable(out: Path) -> bool:
    """A training that began and did not end: one that ended is done, and one without its spec never began."""
    return (out / "spec.yaml").is_file() and not (out / manifests.FILE_NAME).exists()


def _filled(job: Job, reports: tuple[dict[str, Any], dict[str, list[str]]], out: Path, trusted: bool) -> Any:
    """The job's spec with what earlier steps found. Raises InputError for what they did not find."""
    try:
        arguments = filled(job.arguments, *reports)
    except LookupError as error:
        raise InputError(f"step {job.id}: {error.args[0]}") from None
    step = steps.read(job.command, arguments, source=f"step {job.id}")
    if not trusted:
        check_inside(job, step, out)
    return step


def _reports(pipeline: Pipeline, out: Path, job: Job) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What the steps that a job refers to reported, and the outputs of all cells of those it collects."""
    by_id = {other.id: other for other in pipeline.jobs}
    known: dict[str, Any] = {}
    for name, other in job.uses.items():
        record = state.read(out, by_id[other])
        known[name] = (record["report"] if record else None) or {"out": str(out / other)}
    return known, {name: [str(out / other) for other in jobs] for name, jobs in job.collects.items()}


def _needs(job: Job) -> list[str]:
    return [*job.uses.values(), *(other for jobs in job.collects.values() for other in jobs)]
