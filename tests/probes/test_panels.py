"""Findings drawn: one model, two, shapes that differ, numbers that are missing; and what a report makes of them."""

import json
from dataclasses import asdict, replace

import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from ctxext.config import manifest as manifests
from ctxext.errors import DataError
from ctxext.probes.probe_finding import Bars, Curve, Curves, Grid, ProbeFinding, ProbeReport, ProbeResult, Table
from ctxext.report import panels
from ctxext.report.page import plan_report, write_report


def finding(shift: float = 0.0, layers: int = 4) -> ProbeFinding:
    x = (64.0, 128.0, 256.0)
    lines = (Curve("full", x, (1.0 + shift, None, 3.0)), Curve("sliding", x, (2.0, 2.5 + shift, 2.0)))
    rows, columns = tuple(map(str, range(layers))), ("0", "1")
    cells = tuple((0.1 * i + shift, None) for i in range(layers))
    letters = "SNSN"[:layers]
    return ProbeFinding(
        {"shift": shift},
        (
            Curves("loss", "Loss <b>by</b> R", "tokens", "nats", lines, True, level=1.5, level_name="whole"),
            Bars("layers", "By layer", "layer", "nats", rows, tuple(row[0] for row in cells), letters),
            Grid("heads", "Heads", "head", "layer", rows, columns, cells, letters),
        ),
        (Table("numbers <i>", ("a", "b"), (("1", "2<script>"),)),),
        ("said beside",),
    )


def reported(*findings: ProbeFinding, names=("after", "before")) -> ProbeReport:
    models = names[: len(findings)]
    result = ProbeResult("receptive-field", {"probe": "receptive-field", "samples": 3}, findings)
    return ProbeReport(models, ("SNSN",) * len(models), 1.0, (result,))


def pixels(path):
    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


def test_every_picture_is_a_file_and_two_models_are_in_one(tmp_path):
    for name, report in {"one": reported(finding()), "two": reported(finding(0.5), finding())}.items():
        (tmp_path / name).mkdir()
        drawn = panels.draw(report, tmp_path / name)
        assert [one.path.name for one in drawn] == [f"receptive-field-{n}.png" for n in ("loss", "layers", "heads")]
        assert all(one.path.stat().st_size > 5000 and one.alt and one.caption for one in drawn)
    for picture in ("loss", "layers", "heads"):
        one, two = (pixels(tmp_path / name / f"receptive-field-{picture}.png") for name in ("one", "two"))
        assert two[0][0] * two[0][1] > one[0][0] * one[0][1]  # the difference has room of its own


def test_the_difference_is_the_first_less_the_one_before():
    (label, x, y), other = panels._differences([("before", finding().pictures[0]), ("after", finding(0.5).pictures[0])])
    assert (label, x, y) == ("full", [64.0, 256.0], [0.5, 0.0])
    assert other[2] == [0.0, 0.5, 0.0]


def test_models_of_other_shapes_stand_beside_each_other_without_a_difference(tmp_path):
    drawn = panels.draw(reported(finding(layers=4), finding(layers=2)), tmp_path)
    assert len(drawn) == 3


def test_every_model_has_its_own_level():
    drawn = []

    class Axes:
        def axhline(self, level, **look):
            drawn.append((level, look["linestyle"]))

    curves = finding().pictures[0]
    pairs = [("before", replace(curves, level=0.85)), ("after", replace(curves, level=0.95))]
    assert [name for name, _ in panels._levels(Axes(), pairs)] == ["whole, before", "whole, after"]
    assert [level for level, _ in drawn] == [0.85, 0.95] and drawn[0][1] != drawn[1][1]
    drawn.clear()
    assert [name for name, _ in panels._levels(Axes(), [("before", curves), ("after", curves)])] == ["whole"]
    assert [level for level, _ in drawn] == [1.5]


def test_a_picture_that_one_model_lacks_names_the_other(tmp_path):
    alone = replace(finding(), pictures=finding().pictures[2:])
    for name, report in {"one": reported(alone), "two": reported(alone, replace(alone, pictures=()))}.items():
        (tmp_path / name).mkdir()
        panels.draw(report, tmp_path / name)
    one, two = (pixels(tmp_path / name / "receptive-field-heads.png") for name in ("one", "two"))
    assert one != two


def test_the_same_findings_give_the_same_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        panels.draw(reported(finding(0.1), finding()), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def probing(place, report) -> None:
    place.mkdir(parents=True)
    (place / "probes.json").write_text(json.dumps(asdict(report)))
    manifests.write(place, manifests.new("probe", spec={}, parents={}, facts={}, command=["ctxext"]))


def test_a_report_has_a_section_for_probes(tmp_path):
    probing(tmp_path / "probe", reported(finding(0.5), finding()))
    probing(tmp_path / "again", reported(finding()))
    plan = plan_report([tmp_path / "probe", tmp_path / "again"], out=tmp_path / "out", title=None, force=False)
    written = write_report(plan)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert len(written.pictures) == 6 and page.count("data:image/png;base64,") == 6
    assert "A look inside after, before." in page and "No results" not in page
    assert "receptive-field, after and before" in page and "after: said beside." in page
    assert "<script>" not in page and "2&lt;script&gt;" in page and "<b>by" not in page


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("results", 0, "findings", 0, "pictures", 0, "lines", 0, "y"), [1.0]),
        (("results", 0, "findings", 0, "pictures", 0, "lines", 0, "y", 0), float("nan")),
        (("results", 0, "findings", 0, "pictures", 2, "cells", 0), [1.0]),
        (("results", 0, "findings", 0, "pictures", 1, "letters"), "XYZW"),
        (("results", 0, "findings", 0, "pictures", 0, "name"), "../outside"),
        (("results", 0, "probe"), "../outside"),
        (("results", 0, "findings"), []),
        (("results", 0, "findings", 0, "tables", 0, "rows", 0), ["1"]),
        (("models",), ["after", "before"]),
        (("results", 0, "findings", 0, "pictures", 0, "kind"), "pie"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(path, value, tmp_path):
    data = json.loads(json.dumps(asdict(reported(finding()))))
    TypeAdapter(ProbeReport).validate_python(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValidationError):
        TypeAdapter(ProbeReport).validate_json(json.dumps(data))
    place = tmp_path / "probe"
    probing(place, reported(finding()))
    (place / "probes.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="does not hold what probes found"):
        plan_report([place], out=tmp_path / "out", title=None, force=False)
