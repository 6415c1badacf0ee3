"""Runs a pipeline: one job after the other. Finished jobs are skipped, interrupted jobs are resumed. No torch.

<out>/pipeline.json     the pipeline as it was read; <out> is locked while the pipeline runs
<out>/<job>/            the output of a job, as its command writes it
<out>/state/<job>.json  the job's request, its inputs and its report
<out>/results.json, results.md, ctxext.json   written when all jobs are done
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
from ctxext.study.pipeline import Pipeline, PipelineJob
from ctxext.study.results import PipelineResults, results
from ctxext.study.trust import check_inside
from ctxext.train.run_directory import differences

FILE = "pipeline.json"
EVAL_REQUEST = "request.json"  # the file by which an interrupted evaluation can be resumed (eval_and_merge.py)
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
CALLBACKS: dict[str, tuple[str, ...]] = {  # the callbacks that each of these functions takes
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
class PipelinePlan:
    """A pipeline, its output directory and the status of each job.

    begin      the step to start at: earlier steps are taken as they are; this step and later ones run again
    trusted    False: no path and no link may lead out of the working directory
    standings  status by job id: that of state.py where the inputs of the job are known; `waits` where the job needs
               an output that is not done; with `begin`: `taken` or `again`
    """

    pipeline: Pipeline
    out: Path
    begin: str | None
    force: bool
    trusted: bool
    standings: dict[str, str]


def plan_pipeline(
    pipeline: Pipeline, out: Path | None = None, *, begin: str | None = None, force: bool = False, trusted: bool = True
) -> PipelinePlan:
    """Determines the status of every job. Writes nothing.

    `out`: the output directory; None is ./runs/<name of the pipeline>.
    Raises SpecError where text that a step reads does not exist; InputError where a finished output was made from
    other inputs and `force` is False, where a step before `begin` is not done, and where `out` is not a pipeline's.
    """
    out = out or manifests.RUNS / pipeline.name
    if begin is not None and begin not in pipeline.steps:
        raise InputError(f"--from {begin}: no step has this name; allowed: {', '.join(pipeline.steps)}")
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not (out / FILE).is_file():
        raise InputError(f"{out} exists and is not the output of a pipeline", hint="give another --out")
    check_inputs(pipeline, out, begin=begin, trusted=trusted)
    # Jobs come after the jobs they need, so one pass over them is enough.
    standings: dict[str, str] = {}
    for job in pipeline.jobs:
        if begin is not None:
            early = pipeline.steps.index(job.step) < pipeline.steps.index(begin)
            standings[job.id] = _taken(out, job) if early else "again"
        elif any(standings[other] != "done" for other in _needs(job)):
            standings[job.id] = "waits"
        else:
            standings[job.id] = _standing(job, pipeline, out, force, trusted)
    return PipelinePlan(pipeline, out, begin, force, trusted, standings)


def _taken(out: Path, job: PipelineJob) -> str:
    record = state.read(out, job)
    if record is None or not record["done"] or not (out / job.id).exists():
        raise InputError(f"--from: the earlier job {job.id} is not done", hint="start at its step, or earlier")
    return "taken"


def _standing(job: PipelineJob, pipeline: Pipeline, out: Path, force: bool, trusted: bool) -> str:
    record = state.read(out, job)
    request = state.request(job, _filled(job, _reports(pipeline, out, job), out, trusted), record)
    found = state.standing(record, request, out / job.id)
    _may_replace(found, record, request, out / job.id, force)
    return found


def _may_replace(found: str, record: dict[str, Any] | None, request: dict[str, Any], out: Path, force: bool) -> None:
    """Raises InputError where a finished output would be replaced without `force`."""
    if found == "changed" and not force:
        moved = differences(record["request"], request) if record else ["it was not made by this pipeline"]
        raise InputError(
            f"{out} exists and was made from another request: {'; '.join(moved) or 'its files changed since'}",
            hint="give --force to run the step again and replace it, or another --out",
        )


def run_pipeline(
    plan: PipelinePlan, *, say: api.Say = api.ignore, progress: api.Progress = api.ignore
) -> PipelineResults | None:
    """Runs all jobs in order and writes the results. Returns None where a training was interrupted.

    The same call resumes the pipeline. Errors are those of the commands, with the job's id in front of the message;
    finished jobs stay done.
    """
    about = {"name": plan.pipeline.name, "values": plan.pipeline.values, "over": plan.pipeline.over}
    with disk_faults(plan.out, hint="free some space, then give the same command again: it skips finished jobs"):
        plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out, "pipeline"):
        write_whole(plan.out / FILE, json.dumps(state.plain(about), indent=2) + "\n")
        outcomes: dict[str, str] = {}
        for number, job in enumerate(plan.pipeline.jobs, 1):
            say(f"[{number}/{len(plan.pipeline.jobs)}] {job.id}: {job.command}")
            try:
                outcomes[job.id] = _job(plan, job, say, progress)
            except CtxextError as error:
                # Keep the type of the error, and with it the exit code.
                error.message = f"step {job.id}: {error.message}"
                error.args = (error.message,)
                raise
            if outcomes[job.id] == "interrupted":
                return None
        # The manifest is written last: it marks the output as finished.
        found = results(plan.pipeline, plan.out, outcomes)
        write_whole(plan.out / "results.json", json.dumps(asdict(found), indent=2) + "\n")
        write_whole(plan.out / "results.md", found.markdown())
        facts = {"jobs": outcomes, "seconds": found.seconds}
        manifests.write(plan.out, manifests.new("pipeline", spec=state.plain(about), parents={}, facts=facts))
    return found


def _job(plan: PipelinePlan, job: PipelineJob, say: api.Say, progress: api.Progress) -> str:
    """Runs, resumes or skips one job. Returns `ran`, `resumed`, `skipped`, `taken` or `interrupted`."""
    if plan.standings[job.id] == "taken":
        return "taken"
    # The jobs before this one are done now: fill in what they reported, and compute the status again.
    out, record = plan.out / job.id, state.read(plan.out, job)
    step = _filled(job, _reports(plan.pipeline, plan.out, job), plan.out, plan.trusted)
    request = state.request(job, step, record)
    standing: str = state.standing(record, request, out)
    # A job that a killed run with --from left unfinished or reported is resumed, and does not start again.
    if plan.standings[job.id] == "again" and standing in ("new", "changed", "done"):
        standing = "again"
    _may_replace(standing, record, request, out, plan.force)
    if standing == "done":
        say(f"  skipped, since it is done and unchanged: {out}")
        return "skipped"
    # The command finished and its report is stored; only the hash of the output is missing.
    if standing == "reported" and record is not None:
        _done(plan.out, job, record)
        return "resumed"
    # Only trainings and evaluations resume. `keep`: the command must not replace its output directory.
    resume = standing == "unfinished" and job.command == "finetune" and _resumable(out)
    keep = resume or (standing == "unfinished" and job.command == "eval" and _eval_resumable(out))
    # Store the request before the work begins: after a kill it shows that the unfinished output belongs to it.
    state.write(plan.out, job, {"request": request, "done": False, "report": None, "seconds": None, "output": None})
    began = time.monotonic()
    report = _call(job.command, step, out, resume, not keep, say, progress)
    if job.command == "plan":
        report.refuse()
    if getattr(report, "finished", True) is False:
        return "interrupted"
    # Reports differ by command: some convert themselves, the others are plain dataclasses.
    as_dict = getattr(report, "to_dict", None) or getattr(report, "as_dict", None)
    stored = state.plain(as_dict() if as_dict else asdict(report)) | {"out": str(out)}
    seconds = round(time.monotonic() - began, 1)
    _done(plan.out, job, {"request": request, "done": False, "report": stored, "seconds": seconds, "output": None})
    return "resumed" if keep and record is not None else "ran"


def _done(root: Path, job: PipelineJob, record: dict[str, Any]) -> None:
    """Stores the report first and the hash of the output second.

    Hashing may take minutes. Without the first write, a kill during that time would lose a finished training.
    """
    state.write(root, job, record)
    state.write(root, job, record | {"done": True, "output": state.plain(state.stamp(str(root / job.id)))})


def _call(command: str, step: Any, out: Path, resume: bool, force: bool, say: api.Say, progress: api.Progress) -> Any:
    given = {field.name: getattr(step, field.name) for field in fields(step)}
    # Each command takes other callbacks; the steps of a training are reported by the progress callback.
    callbacks: dict[str, Callable[..., None]] = {"say": say, "progress": progress}
    if command == "finetune":
        given["resume"], total = resume, steps.resolved(command, step).steps
        callbacks["on_step"] = lambda metrics: progress("training", metrics.step, total)
    taken = {name: callbacks[name] for name in CALLBACKS[command]}
    return RUNS[command](**given, **taken, out=out, force=force)


def _eval_resumable(out: Path) -> bool:
    return (out / EVAL_REQUEST).is_file() and not (out / manifests.FILE_NAME).exists()


def _resumable(out: Path) -> bool:
    """Whether a training has begun (it has its spec) and has not ended (it has no manifest)."""
    return (out / "spec.yaml").is_file() and not (out / manifests.FILE_NAME).exists()


def _filled(job: PipelineJob, reports: tuple[dict[str, Any], dict[str, list[str]]], out: Path, trusted: bool) -> Any:
    """The job's spec with the reports of earlier steps filled in. Raises InputError where a report lacks a value."""
    try:
        arguments = filled(job.arguments, *reports)
    except LookupError as error:
        raise InputError(f"step {job.id}: {error.args[0]}") from None
    step = steps.read(job.command, arguments, source=f"step {job.id}")
    # Check again: a report of an earlier step can hold a path.
    if not trusted:
        check_inside(job, step, out)
    return step


def _reports(pipeline: Pipeline, out: Path, job: PipelineJob) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Reports of the steps that a job refers to, and the output directories of all cells of the steps it collects.

    A step that has not reported yet is represented by its output directory alone.
    """
    by_id = {other.id: other for other in pipeline.jobs}
    known: dict[str, Any] = {}
    for name, other in job.uses.items():
        record = state.read(out, by_id[other])
        known[name] = (record["report"] if record else None) or {"out": str(out / other)}
    return known, {name: [str(out / other) for other in jobs] for name, jobs in job.collects.items()}


def _needs(job: PipelineJob) -> list[str]:
    return [*job.uses.values(), *(other for jobs in job.collects.values() for other in jobs)]
