"""ctxext run"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.cli import completion, console

if TYPE_CHECKING:
    from ctxext.study.run_pipeline import PipelinePlan

EXAMPLES = """Examples:\n
  ctxext run retrofit-100k --set model=llama3.1-8b --set data=books/ --dry-run\n
  ctxext run extend-32k --set model=./my-model --set data=books/ --out ./long\n
  ctxext run retrofit-100k --from heal-extend\n
  ctxext run ablation --set model=./my-model --set data=books/ --set over.rank=[8,16,32]"""


def run(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="A pipeline preset or a YAML file", autocompletion=completion.of("pipelines")
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Set a value of the pipeline, as name=value, or any part by its path; may be repeated"
        ),
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from", help="Run this step and all later ones again; use the outputs of earlier steps as they are"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every step as it would run, and stop")] = False,
    untrusted: Annotated[
        bool, typer.Option("--untrusted", help="Refuse paths and links that lead out of the working directory")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output directory; give the same one to resume [default: ./runs/<name>]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that were made from other inputs")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the jobs, or the results, as JSON")] = False,
) -> None:
    """Run a pipeline of named steps, each of them a command; finished steps with unchanged inputs are skipped."""
    from ctxext.config.loader import assignments
    from ctxext.study.pipeline import read_pipeline
    from ctxext.study.run_pipeline import plan_pipeline, run_pipeline

    read = read_pipeline(pipeline, assignments(set_ or [], example="model=./my-model"))
    plan = plan_pipeline(read, out, begin=begin, force=force, trusted=not untrusted)
    if dry_run:
        _show_plan(plan, as_json)
        return
    console.quiet_libraries()
    with console.progress("starting") as progress:
        found = run_pipeline(plan, say=console.say, progress=progress)
    if found is None:
        console.say("stopped; give the same command to resume")
        raise typer.Exit(130)
    if as_json:
        console.emit(asdict(found))
        return
    console.table(found.JOBS, found.job_rows())
    if found.rows:
        print()
        console.table(found.header, found.rows)
        if found.note:
            console.say(found.note)
    console.say(f"written to {plan.out}: results.md, results.json")


def _show_plan(plan: PipelinePlan, as_json: bool) -> None:
    from ctxext.config.loader import flow

    jobs = [
        {"job": job.id, "command": job.command, "standing": plan.standings[job.id], "arguments": job.arguments}
        for job in plan.pipeline.jobs
    ]
    if as_json:
        console.emit({"name": plan.pipeline.name, "out": str(plan.out), "jobs": jobs})
        return
    # The action for each status of a job (study/state.py and study/run_pipeline.py).
    words = {"new": "runs", "waits": "runs", "again": "runs again", "changed": "runs again, replaces the output",
             "unfinished": "resumes", "reported": "resumes",
             "done": "done, skipped", "taken": "used as it is"}  # fmt: skip
    for job in plan.pipeline.jobs:
        given = " ".join(f"{key}={flow(value)}" for key, value in job.arguments.items() if value is not None)
        print(f"{job.id}  ({job.command}; {words[plan.standings[job.id]]})\n    {given}")
