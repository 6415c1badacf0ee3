"""The section of the report with the findings of probes: pictures, then tables, probe by probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ctxext.report import markup, panels
from ctxext.report.markup import details, heading, picture, pictures, quiet, table
from ctxext.report.run_records import RecordedRun


def section(place: Path, runs: Sequence[RecordedRun]) -> Markup:
    """Returns the section of all probes in the order of `runs`, empty where nothing was probed.

    Pictures are written to `place`.
    """
    parts: list[Markup] = []
    for run in runs:
        if run.probes is None:
            continue
        # All pictures of the run are drawn here, so `picture` below only embeds the files.
        drawn = panels.draw(run.probes, place, prefix=f"run-{run.number}-")
        for result in run.probes.results:
            findings = [(m, f) for m, f in zip(run.probes.models, result.findings, strict=True)]
            shown = [
                picture(one.path, lambda _: None, one.alt, one.caption) for one in drawn if one.probe == result.probe
            ]
            requested = ", ".join(f"{key} {value}" for key, value in result.spec.items() if key != "probe")
            parts += [
                heading(f"{result.probe}, {' and '.join(run.probes.models)}"),
                quiet(f"Request: {requested or 'default settings'}. From run {run.number}; {run.versions}."),
                *[quiet(f"{model}: {note}.") for model, finding in findings for note in finding.notes],
                pictures(shown),
            ]
            tables = [
                table(f"{model}: {one.caption}.", one.header, one.rows)
                for model, finding in findings
                for one in finding.tables
            ]
            parts += [details("In numbers", tables)] if tables else []
    return markup.section("Probes", "probes", parts) if parts else Markup()
