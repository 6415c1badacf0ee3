"""Plans and writes the report as one HTML file. All runs are read and checked before the output is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import InputError
from ctxext.report import run_records as reading
from ctxext.report.markup import Html, tag
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
    """The whole document. Its Content-Security-Policy forbids loading and scripts: pictures and styles are embedded."""
    from ctxext.report import probing, sections, training

    # (id, title, section); sections without content are left out, also of the table of contents.
    models = reading.models(plan.runs)
    parts = list[tuple[str, str, Html]]()
    if plan.blocks:
        parts.append(("summary", "Summary", sections.summary(plan.blocks)))
        parts.append(("models", "Models", sections.model_table(models)))
        parts.append(("differences", "Differences", sections.differences(plan.runs)))
        parts += sections.suites(place, plan.blocks)
    parts.append(("probes", "Probes", probing.section(place, plan.runs)))
    parts.append(("training", "Training", training.section(place, plan.runs)))
    parts.append(("manifests", "Runs and manifests", training.manifests(plan.runs)))
    parts = [part for part in parts if part[2]]
    links = [tag("li", tag("a", name, href=f"#{id_}")) for id_, name, _ in parts]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        tag("title", plan.title),
        tag("style", Html(STYLE)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", plan.title), *[tag("p", line) for line in _about(plan)]),
        tag("nav", tag("ul", *links), aria_label="contents"),
        tag("main", *[section for _, _, section in parts]),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


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


STYLE = """
:root { --ground: #fff; --ink: #1b1e22; --quiet: #59616a; --rule: #d8dce1; --tint: #f4f6f8; --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181b; --ink: #e5e7ea; --quiet: #a2a9b1; --rule: #363c43; --tint: #1e2226; --link: #8cbaf2 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem }
body { margin: 0 auto; max-width: 86rem; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: clamp(1.5rem, 4vw, 2.25rem); line-height: 1.15; margin: 0 0 .75rem }
h1, p, figcaption, caption, summary { overflow-wrap: anywhere }
h2 { font-size: 1.375rem; margin: 0 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1.0625rem; margin: 1.5rem 0 .5rem }
p { max-width: 80ch; margin: 0 0 .5rem }
header p { font-size: 1.0625rem; max-width: none }
strong { font-weight: 600 }
section { margin-top: 2.5rem }
a { color: var(--link) }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 1rem 0 0 }
.quiet, small, caption, figcaption, .none { color: var(--quiet) }
.quiet, figcaption, caption { font-size: .875rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23.5rem), 1fr)); gap: 1.5rem;
  align-items: start; margin: 1rem 0 1.5rem }
.beside { display: flex; flex-wrap: wrap; gap: 0 1.5rem; margin-top: 1rem }
.beside figure { flex: 0 1 25.5rem }
.beside .scroll { flex: 1 1 30rem; min-width: min(100%, 24rem) }
figure { margin: 0; max-width: 36rem }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--rule); border-radius: 6px;
  padding: .375rem }
figcaption { margin-top: .375rem; line-height: 1.4 }
.scroll { overflow-x: auto; margin: 1rem 0 1.25rem }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.35;
  min-width: min(100%, 34rem) }
caption { text-align: left; padding-bottom: .5rem }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(80ch, calc(100vw - 2.5rem)) }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--rule); font-weight: 600 }
thead th small { min-width: 8rem }
tr > :first-child { position: sticky; left: 0; background: var(--ground); text-align: left; padding-left: 0;
  max-width: min(17rem, 42vw); overflow-wrap: anywhere }
tbody th { font-weight: 600 }
tr > th:first-child { min-width: min(11rem, 36vw) }
td small, .bounds { white-space: nowrap }
.long { display: inline-block; min-width: 14rem }
small { display: block; font-size: .92em; font-weight: 400 }
.words td, .words th { text-align: left; min-width: 8.5rem; max-width: 24rem; overflow-wrap: anywhere }
details { margin: .5rem 0; border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .75rem }
summary { cursor: pointer; font-weight: 600 }
details tr > :first-child { background: var(--ground) }
pre { background: var(--tint); padding: .75rem; border-radius: 6px; overflow: auto; max-height: 28rem;
  font-size: .8125rem; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere }
@media print {
  :root { --ground: #fff; --ink: #000; --quiet: #444; --rule: #bbb; --tint: #f4f4f4; --link: #000 }
  html { font-size: 11.5px }
  body { padding: 0; max-width: none }
  nav { display: none }
  .scroll, pre { overflow: visible; max-height: none }
  table { min-width: 0 }
  th, td { padding: .15rem .3rem }
  .long, thead th small, .words td, .words th { min-width: 0 }
  tr > th:first-child { min-width: 6rem }
  tr > :first-child, caption span { position: static }
  .pictures { grid-template-columns: 1fr 1fr }
  figure, tr, pre { break-inside: avoid }
  h2, h3, caption { break-after: avoid }
}
"""
