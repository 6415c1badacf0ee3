"""The section of the report with the findings of probes: pictures, then tables, probe by probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctxext.report import panels
from ctxext.report.markup import Html, details, picture, pictures, table, tag
from ctxext.report.run_records import RecordedRun


def section(place: Path, runs: Sequence[RecordedRun]) -> Html:
    """Returns the section of all probes in the order of `runs`, empty where nothing was probed.

    Pictures are written to `place`.
    """
    parts: list[Html] = []
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
                tag("h3", f"{result.probe}, {' and '.join(run.probes.models)}"),
                tag(
                    "p",
                    f"Request: {requested or 'default settings'}. From run {run.number}; {run.versions}.",
                    class_="quiet",
                ),
                *[
                    tag("p", f"{model}: {note}.", class_="quiet")
                    for model, finding in findings
                    for note in finding.notes
                ],
                pictures(shown),
            ]
            tables = [
                table(f"{model}: {one.caption}.", one.header, one.rows)
                for model, finding in findings
                for one in finding.tables
            ]
            parts += [details("In numbers", *tables)] if tables else []
    return tag("section", tag("h2", "Probes", id="probes"), *parts) if parts else Html("")
