"""Plans and writes the report as one HTML file. All runs are read and checked before the output is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import InputError
from ctxext.report import run_records as reading
from ctxext.report.markup import ENVIRONMENT
from ctxext.report.run_records import Block, RecordedRun
from ctxext.units import format_tokens

PAGE = "report.html"
PICTURES = (".svg", ".png")


@dataclass(frozen=True)
class ReportPlan:
    """A report whose runs are read and valid."""

    runs: list[RecordedRun]
    blocks: list[Block]
    title: str
    out: Path
    force: bool


@dataclass(frozen=True)
class Report:
    """What was written. `page` and `pictures` are paths, `models` are labels, `runs` are the directories read."""

    out: str
    page: str
    pictures: list[str]
    models: list[str]
    runs: list[str]


def plan_report(directories: list[Path], *, out: Path | None, title: str | None, force: bool) -> ReportPlan:
    """Reads every run and checks that a report can be made of them. Draws nothing.

    Errors: those of `runs.read_runs`, and InputError where no run holds a measurement or `out` is not free.
    """
    found = reading.read_runs(directories)
    if not any(run.measured for run in found):
        given = ", ".join(f"{run.directory} (a {run.manifest.kind})" for run in found)
        raise InputError(
            f"nothing to report in {given}: no evaluation, training or probe",
            hint="give the output of an eval, a probe or a finetune; other outputs may be added",
        )
    # The report is named after the first evaluated model, or after the first run where nothing was evaluated.
    name = next((model.model for run in found if run.results for model in run.results.models), found[0].name)
    out = out or manifests.default_out("report", name)
    check_free(out, force, keep=directories)
    return ReportPlan(found, reading.blocks(found), title or f"ctxext report: {name}", out, force)


def write_report(plan: ReportPlan) -> Report:
    """Writes report.html with all pictures embedded, the pictures as files beside it, and ctxext.json last.

    The same runs give the same bytes, except for the time in ctxext.json.
    """
    with staged_output(plan.out, plan.force) as place:
        # `_page` draws the pictures into `place`. Text of a file may hold lone surrogates: replace them.
        (place / PAGE).write_bytes(_page(place, plan).encode("utf-8", "replace"))
        pictures = sorted(path.name for path in place.iterdir() if path.suffix in PICTURES)
        parents = {
            f"run {run.number}": {"path": str(run.directory.absolute()), "files": run.files} for run in plan.runs
        }
        labels = [label for label, _, _ in reading.models(plan.runs)]
        facts: dict[str, Any] = {"pictures": pictures, "models": labels}
        manifests.write(place, manifests.new("report", spec={"title": plan.title}, parents=parents, facts=facts))
    paths = [str(plan.out / name) for name in pictures]
    return Report(str(plan.out), str(plan.out / PAGE), paths, labels, [str(run.directory) for run in plan.runs])


def _page(place: Path, plan: ReportPlan) -> str:
    """The whole document (templates/page.html)."""
    from ctxext.report import probing, sections, training

    # (id, title, section); sections without content are left out, also of the table of contents.
    models = reading.models(plan.runs)
    parts = list[tuple[str, str, Markup]]()
    if plan.blocks:
        parts.append(("summary", "Summary", sections.summary(plan.blocks)))
        parts.append(("models", "Models", sections.model_table(models)))
        parts.append(("differences", "Differences", sections.differences(plan.runs)))
        parts += sections.suites(place, plan.blocks)
    parts.append(("probes", "Probes", probing.section(place, plan.runs)))
    parts.append(("training", "Training", training.section(place, plan.runs)))
    parts.append(("manifests", "Runs and manifests", training.manifests(plan.runs)))
    parts = [part for part in parts if part[2]]
    page = ENVIRONMENT.get_template("page.html")
    return page.render(title=plan.title, about=_about(plan), parts=parts) + "\n"


def _about(plan: ReportPlan) -> list[str]:
    """Two lines for the header: what was compared, and which runs it comes from."""
    lines = []
    # First line: evaluated models with the range of lengths, probed models, trained runs.
    labels = [label for label, _, _ in reading.models(plan.runs)]
    trained = [run.name for run in plan.runs if run.steps]
    lengths = sorted({length for block in plan.blocks for length in block.lengths if length})
    span = " to ".join(dict.fromkeys(map(format_tokens, lengths[:: max(1, len(lengths) - 1)])))
    compared = [f"{', '.join(labels)}{f' at {span} tokens' if lengths else ''}"] if labels else []
    probed = dict.fromkeys(name for run in plan.runs if run.probes for name in run.probes.models)
    compared += [f"{'a' if compared else 'A'} look inside {', '.join(probed)}"] if probed else []
    lines.append("; ".join([*compared, *([f"training of {', '.join(trained)}"] if trained else [])]) or "No results")
    # Second line: how many runs of each kind, their dates, versions.
    kinds = [run.manifest.kind for run in plan.runs]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    days = sorted({run.manifest.created[:10] for run in plan.runs})
    versions = "; ".join(dict.fromkeys(run.versions for run in plan.runs))
    lines.append(f"From {counted}, made {' to '.join(dict.fromkeys((days[0], days[-1])))}; {versions}")
    return [f"{line}." for line in lines]
