"""The sections of training runs, as curves and tables, and of the manifests of all inputs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from ctxext.config.loader import dump_yaml
from ctxext.report import charts, figures, markup, words
from ctxext.report.figures import FigureLine, Point
from ctxext.report.markup import details, heading, join, number, paragraph, picture, pictures, pre, quiet, small, table
from ctxext.report.run_records import RecordedRun
from ctxext.units import format_bytes, format_duration, format_tokens

_CURVES = [  # field of metrics.jsonl, axis label, factor, logarithmic
    ("loss", "training loss, nats a token or in the teacher objective's unit", 1.0, False),
    ("gradient_norm", "gradient norm, before clipping", 1.0, True),
    ("tokens_per_second", "tokens a second", 1.0, False),
    ("memory", "memory, GiB", 2.0**-30, False),
    ("mfu", "model FLOPs utilisation", 1.0, False),
]
_FEW = 25  # points of the averaged line, about
_MOST = 500  # pairs of points that are drawn for a line of raw steps: about one pixel each
_OF_VALIDATION = ("step", "ctx", "loss", "short", "by_position", "passkey")


def section(place: Path, runs: Sequence[RecordedRun]) -> Markup:
    """Returns the section of all training runs, one line per run in each picture; empty where there is no run.

    Pictures are written to `place`.
    """
    runs = [run for run in runs if run.steps]
    if not runs:
        return Markup()
    versions = "; ".join(dict.fromkeys(run.versions for run in runs))
    losses = "Held-out loss is measured with the attention of inference, on the same tokens every time."
    parts = [
        quiet(f"{losses} {versions}."),
        pictures([*_step_curves(place, runs), *_held_out(place, runs), *_positions(place, runs)]),
        _table(runs),
        *[details(f"Validations of {_label(run, runs)}", [_validations(run)]) for run in runs if run.validations],
    ]
    return markup.section("Training", "training", parts)


def _label(run: RecordedRun, runs: Sequence[RecordedRun]) -> str:
    """The name of a run, with its number where several runs have this name."""
    return f"{run.name}, run {run.number}" if sum(each.name == run.name for each in runs) > 1 else run.name


def _step_curves(place: Path, runs: Sequence[RecordedRun]) -> list[Markup]:
    """One picture for each field of _CURVES that any run has in metrics.jsonl."""
    made = []
    for field, axis, factor, log in _CURVES:
        lines = []
        for number_, run in enumerate(runs):
            found = [(line["step"], line.get(field)) for line in run.steps]
            points = [Point(step, x * factor) for step, x in found if isinstance(x, int | float)]
            lines += [_averaged(_label(run, runs), points, number_)] if points else []
        if lines:
            made.append(_curve(place / f"training-{field.replace('_', '-')}.svg", lines, axis, log))
    return made


def _averaged(label: str, points: list[Point], number_: int) -> FigureLine:
    """A line through means of neighbouring steps, the raw steps thin behind it; the raw steps where they are few."""
    size = len(points) // _FEW
    if size < 2:
        return FigureLine(label, points, number_)
    means = [Point(fmean(p.x for p in group), fmean(p.y for p in group)) for group in _groups(points, size)]
    return FigureLine(f"{label}, means of {size} steps", means, number_, behind=_thinned(points))


def _groups(points: list[Point], size: int) -> list[list[Point]]:
    return [points[i : i + size] for i in range(0, len(points), size)]


def _thinned(points: list[Point]) -> list[Point]:
    """At most about _MOST pairs of points: the lowest and the highest of each group of neighbours."""
    if len(points) <= 2 * _MOST:
        return points
    ends = [sorted(group, key=lambda point: point.y) for group in _groups(points, ceil(len(points) / _MOST))]
    return sorted((point for group in ends for point in (group[0], group[-1])), key=lambda point: point.x)


def _curve(path: Path, lines: list[FigureLine], axis: str, log: bool = False, limits: Any = None) -> Markup:
    sketch = partial(figures.curves, lines=lines, x_label="step", y_label=axis, log=log, limits=limits)
    text = f"{axis[0].upper()}{axis[1:]} by step."
    return picture(path, sketch, f"{text} {charts.spoken_lines(lines)}.", text)


def _held_out(place: Path, runs: Sequence[RecordedRun]) -> list[Markup]:
    """Pictures of validation.jsonl: held-out loss, passkey accuracy, and every other single number.

    Held-out loss has a line for each context of a run (stages have several) and one for the original length.
    """
    # Held-out loss.
    lines = []
    for number_, run in enumerate(runs):
        for ctx in dict.fromkeys(line.get("ctx") for line in run.validations):
            here = [line for line in run.validations if line.get("ctx") == ctx]
            points = [Point(line["step"], line["loss"]) for line in here if isinstance(line.get("loss"), int | float)]
            at = f"at {format_tokens(ctx)}" if isinstance(ctx, int) else "at ctx"
            lines += [FigureLine(f"{_label(run, runs)}, {at}", points, number_)] if points else []
        short = [(line["step"], line.get("short")) for line in run.validations]
        points = [Point(step, x) for step, x in short if isinstance(x, int | float)]
        lines += (
            [FigureLine(f"{_label(run, runs)}, at the original length", points, number_, style="--")] if points else []
        )
    made = [_curve(place / "training-held-out.svg", lines, "held-out loss, nats a token")] if lines else []
    # Passkey accuracy: each line, a run at a length, has its own colour.
    lines = list[FigureLine]()
    for run in runs:
        for length in sorted({length for line in run.validations for length in _passkey(line)}):
            points = [
                Point(line["step"], _passkey(line)[length]) for line in run.validations if length in _passkey(line)
            ]
            lines.append(FigureLine(f"{_label(run, runs)}, at {format_tokens(length)}", points, len(lines)))
    made += [_curve(place / "training-passkey.svg", lines, "passkey accuracy", limits=(-0.04, 1.04))] if lines else []
    # One picture for each other number. Files are numbered, since a name from a file is not safe as a file name.
    extra = dict.fromkeys(name for run in runs for line in run.validations for name in _extra(line))
    for count, name in enumerate(extra, start=1):
        lines = [
            FigureLine(_label(run, runs), [Point(line["step"], _extra(line)[name]) for line in mine], number_)
            for number_, run in enumerate(runs)
            if (mine := [line for line in run.validations if name in _extra(line)])
        ]
        made.append(_curve(place / f"training-validation-{count}.svg", lines, name))
    return made


def _extra(line: dict[str, Any]) -> dict[str, float]:
    """Single numbers of a validation besides the fields of _OF_VALIDATION, also those one level down in mappings."""
    found = dict[str, float]()
    for name, value in line.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, x in inner if name not in _OF_VALIDATION else []:
            if isinstance(x, int | float) and not isinstance(x, bool):
                found[f"{name.replace('_', ' ')} {key}".strip()] = x
    return found


def _passkey(line: dict[str, Any]) -> dict[int, float]:
    """Passkey accuracy by length, averaged over depths, where a validation has such a grid (train/passkey.py)."""
    found: dict[int, list[float]] = {}
    for cell in (line.get("passkey") or {}).get("cells", []):
        found.setdefault(cell["length"], []).append(float(cell["accuracy"]))
    return {length: sum(shares) / len(shares) for length, shares in found.items()}


def _positions(place: Path, runs: Sequence[RecordedRun]) -> list[Markup]:
    """Held-out loss by position, at the first and the last validation of the last context."""
    lines = []
    for number_, run in enumerate(runs):
        # Validations at other contexts have other buckets and cannot be compared.
        same = [line for line in run.validations if line.get("by_position")]
        same = [line for line in same if line.get("ctx") == same[-1].get("ctx")]
        for line, style in [(same[0], "--"), (same[-1], "-")] if len(same) > 1 else [(x, "-") for x in same]:
            # A bucket ends where the next one starts, the last one at ctx.
            starts = sorted(map(int, line["by_position"]))
            ends = [*starts[1:], line.get("ctx") or 2 * starts[-1]]
            values = [line["by_position"][str(start)] for start in starts]
            points = [Point(charts.middle(a, b), y) for a, b, y in zip(starts, ends, values, strict=True)]
            lines.append(FigureLine(f"{_label(run, runs)}, step {line['step']}", points, number_, style=style))
    if not lines:
        return []
    axis = "held-out loss, nats a token"
    sketch = partial(figures.curves, lines=lines, x_label="position in the sequence", y_label=axis, tokens=True)
    text = "Held-out loss by position in the sequence, before and after: a point in the middle of its bucket."
    return [picture(place / "training-position.svg", sketch, f"{text} {charts.spoken_lines(lines)}.", text)]


def _table(runs: Sequence[RecordedRun]) -> Markup:
    """A table with one row per run: its settings, its first and last losses, its cost."""
    head = [
        "run",
        "ctx",
        "steps",
        "tokens",
        "training loss",
        "held-out loss",
        "tokens a second",
        "memory",
        "time",
        "seed",
    ]
    rows = []
    for run in runs:
        # Held-out losses are compared within the last context: those of earlier stages are of other lengths.
        spec, facts = run.manifest.spec, run.manifest.facts
        what = f"{facts.get('layout', 'layout unknown')}; {facts.get('positions', 'positions unknown')}"
        ctx = spec.get("ctx")
        rows.append(
            [
                join([_label(run, runs), small(what), small(f"run {run.number}")]),
                format_tokens(ctx) if isinstance(ctx, int) else "none",
                f"{run.steps[-1]['step']:,}",
                _amount(run, "tokens", lambda found: format_tokens(round(found[-1]))),
                _ends(run.steps),
                _ends([line for line in run.validations if line.get("ctx") == run.validations[-1].get("ctx")]),
                _amount(run, "tokens_per_second", lambda found: f"{median(found):,.0f}"),
                _amount(run, "memory", lambda found: format_bytes(max(found))),
                _amount(run, "seconds", lambda found: format_duration(sum(found))),
                str(spec.get("seed", "none")),
            ]
        )
    caption = (
        "Losses in nats a token, from the first to the last (with a teacher: of its objective); held-out at "
        "the last context. Tokens a second: the median step. Memory: the greatest. Time: the sum of the steps."
    )
    return table(caption, head, rows)


def _amount(run: RecordedRun, field: str, text: Any) -> str:
    found = [line[field] for line in run.steps if isinstance(line.get(field), int | float)]
    return text(found) if found else "none"


def _ends(lines: Sequence[dict[str, Any]]) -> Markup:
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), int | float)]
    return join([number(losses[0], 3), " → ", number(losses[-1], 3)]) if losses else number(None, 3)


def _validations(run: RecordedRun) -> Markup:
    """A table of all validations: losses, losses by position, passkey accuracy and other numbers."""
    # Columns are the union over all validations. A validation without a value has an empty cell.
    positions = sorted({int(at) for line in run.validations for at in line.get("by_position") or {}})
    lengths = sorted({length for line in run.validations for length in _passkey(line)})
    extra = list(dict.fromkeys(name for line in run.validations for name in _extra(line)))
    known = ["step", "ctx", "loss", "at the original length", *[f"from {at:,}" for at in positions]]
    head = [*known, *[f"passkey at {length:,}" for length in lengths], *extra]
    rows = [
        [
            f"{line['step']:,}",
            words.detail(line.get("ctx")),
            number(line.get("loss"), 3),
            number(line.get("short"), 3),
            *[number((line.get("by_position") or {}).get(str(at)), 3) for at in positions],
            *[number(_passkey(line).get(length), 2) for length in lengths],
            *[words.detail(_extra(line).get(name)) for name in extra],
        ]
        for line in run.validations
    ]
    return table("Held-out losses in nats a token; by the first position of a bucket.", head, rows)


def manifests(runs: Sequence[RecordedRun]) -> Markup:
    """Returns the section with the ctxext.json of every input, each folded."""
    parts = [details(f"Run {run.number}: {run.manifest.kind}, {run.name}", _manifest(run)) for run in runs]
    return markup.section("Runs and manifests", "manifests", parts)


def _manifest(run: RecordedRun) -> list[Markup]:
    manifest = run.manifest
    files = [[name, digest] for name, digest in run.files.items()]
    versions = [[name, version or "not installed"] for name, version in manifest.versions.items()]
    # A parent is recorded with the hashes of its weights (models) or of its files (runs).
    parents = [
        [role, str(entry.get("path", "unknown")), file, digest]
        for role, entry in manifest.parents.items()
        for file, digest in (entry.get("weights") or entry.get("files") or {"no weights": "none"}).items()
    ]
    return [
        paragraph(f"{run.directory}, made {manifest.created}"),
        pre(f"$ {shlex.join(manifest.command)}"),
        table("Files read", ["file", "sha256"], files, "words"),
        table("Parents", ["role", "path", "file", "sha256"], parents, "words") if parents else Markup(),
        table("Versions", ["package", "version"], versions),
        heading("Spec"),
        pre(dump_yaml(manifest.spec)),
        heading("Facts"),
        pre(dump_yaml(manifest.facts)),
    ]
