"""What a pipeline found: its jobs, and the numbers of its evaluations in one table. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.evals.engine import STAR
from ctxext.study import state
from ctxext.study.pipeline import Axis, Pipeline
from ctxext.units import format_duration, format_tokens


@dataclass(frozen=True)
class JobResult:
    """`outcome`: ran, resumed, skipped or taken; `seconds` are those of the run that made the output."""

    id: str
    command: str
    outcome: str
    seconds: float
    out: str


@dataclass(frozen=True)
class Results:
    """`header` and `rows` are the table of what was measured: a row a model and cell, a column a suite and length."""

    name: str
    jobs: tuple[JobResult, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def seconds(self) -> float:
        return sum(job.seconds for job in self.jobs)

    @property
    def note(self) -> str | None:
        """What a * in the table means, where there is one."""
        return STAR if any(cell.endswith("*") for row in self.rows for cell in row) else None

    JOBS = ("step", "command", "outcome", "took", "output")

    def job_rows(self) -> list[tuple[str, ...]]:
        return [(job.id, job.command, job.outcome, format_duration(job.seconds), job.out) for job in self.jobs]

    def markdown(self) -> str:
        parts = [f"# {self.name}", *_markdown(self.JOBS, self.job_rows())]
        parts += ["", *_markdown(self.header, self.rows)] if self.rows else []
        parts += ["", self.note.replace("*", "\\*")] if self.note else []
        return "\n".join(parts) + "\n"


def results(pipeline: Pipeline, out: Path, outcomes: dict[str, str]) -> Results:
    """Read back from the jobs' state."""
    jobs, measured = [], list[tuple[dict[str, Axis], str, dict[str, str]]]()
    for job in pipeline.jobs:
        record = state.read(out, job)
        assert record is not None
        jobs.append(JobResult(job.id, job.command, outcomes[job.id], record["seconds"] or 0.0, str(out / job.id)))
        if job.command == "eval":
            measured += [(job.cell, model, numbers) for model, numbers in _numbers(record["report"])]
    columns = list(dict.fromkeys(name for _, _, numbers in measured for name in numbers))
    axes = [axis for axis in pipeline.over if any(axis in cell for cell, _, _ in measured)]
    rows = dict.fromkeys(
        (*(str(cell.get(axis, "")) for axis in axes), model, *(numbers.get(name, "") for name in columns))
        for cell, model, numbers in measured
    )
    return Results(pipeline.name, tuple(jobs), (*axes, "model", *columns), tuple(rows))


def _numbers(report: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Each model of an evaluation with its numbers of whole suites; * where it does not bear the length."""
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
