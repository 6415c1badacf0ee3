"""The results of a pipeline: its jobs, and the numbers of its evaluations in one table. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.evals.item_runner import STAR
from ctxext.study import state
from ctxext.study.pipeline import Axis, Pipeline
from ctxext.units import format_duration, format_tokens


@dataclass(frozen=True)
class JobResult:
    """The result of one job. `outcome`: ran, resumed, skipped or taken. `seconds`: of the run that made the output."""

    id: str
    command: str
    outcome: str
    seconds: float
    out: str


@dataclass(frozen=True)
class PipelineResults:
    """All jobs and the table of measured numbers: one row per model and cell, one column per suite and length."""

    name: str
    jobs: tuple[JobResult, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def seconds(self) -> float:
        """The total time of the jobs."""
        return sum(job.seconds for job in self.jobs)

    @property
    def note(self) -> str | None:
        """The explanation of * in the table; None where no number has one."""
        return STAR if any(cell.endswith("*") for row in self.rows for cell in row) else None

    JOBS = ("step", "command", "outcome", "took", "output")

    def job_rows(self) -> list[tuple[str, ...]]:
        """Returns the rows of the table of jobs, with the columns JOBS."""
        return [(job.id, job.command, job.outcome, format_duration(job.seconds), job.out) for job in self.jobs]

    def markdown(self) -> str:
        """Returns the tables of jobs and numbers as Markdown."""
        parts = [f"# {self.name}", *_markdown(self.JOBS, self.job_rows())]
        parts += ["", *_markdown(self.header, self.rows)] if self.rows else []
        parts += ["", self.note.replace("*", "\\*")] if self.note else []
        return "\n".join(parts) + "\n"


def results(pipeline: Pipeline, out: Path, outcomes: dict[str, str]) -> PipelineResults:
    """Builds the results from the state files of all jobs. `outcomes`: by job id."""
    jobs, measured = [], list[tuple[dict[str, Axis], str, dict[str, str]]]()
    for job in pipeline.jobs:
        record = state.read(out, job)
        assert record is not None
        jobs.append(JobResult(job.id, job.command, outcomes[job.id], record["seconds"] or 0.0, str(out / job.id)))
        if job.command == "eval":
            measured += [(job.cell, model, numbers) for model, numbers in _numbers(record["report"])]
    # The union of the suites and lengths of all evaluations. A number that one of them lacks is an empty cell.
    columns = list(dict.fromkeys(name for _, _, numbers in measured for name in numbers))
    axes = [axis for axis in pipeline.over if any(axis in cell for cell, _, _ in measured)]
    # Two evaluations can measure one model with equal results: keep one row.
    rows = dict.fromkeys(
        (*(str(cell.get(axis, "")) for axis in axes), model, *(numbers.get(name, "") for name in columns))
        for cell, model, numbers in measured
    )
    return PipelineResults(pipeline.name, tuple(jobs), (*axes, "model", *columns), tuple(rows))


def _numbers(report: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Each model of an evaluation with the numbers of whole suites; * marks lengths beyond the usable length."""
    found = []
    for model in report["models"]:
        numbers = {}
        for row in (row for suite in model["suites"] for row in suite["rows"] if not row["task"]):
            length = f" {format_tokens(row['length'])}" if row["length"] else ""
            value = "none" if row["value"] is None else f"{row['value']:.3f}{'*' if row['extrapolated'] else ''}"
            numbers[f"{row['suite']}{length}"] = value
        found.append((model["model"], numbers))
    return found


def _markdown(header: tuple[str, ...], rows: Any) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
