"""What an older ctxext wrote opens, resumes and counts with this one: outputs of commit a22c3a9 (make.py)."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from pathlib import Path

import pytest
import torch

from ctxext import api
from ctxext.data.fingerprints import by_time
from ctxext.doctor import model as doctor
from ctxext.errors import InputError
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.study.pipeline import read_pipeline
from ctxext.study.run_pipeline import plan_pipeline, run_pipeline
from ctxext.study.state import plain, stamp

HERE = Path(__file__).parent
ARCHIVES = sorted(HERE.glob("outputs-*.tar.gz"))
IDS = torch.arange(2, 66)[None]


def placeholder() -> bytes:
    spec = importlib.util.spec_from_file_location("make", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PLACEHOLDER.encode()


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.gz"))
def old(request, tmp_path_factory) -> Path:
    """The outputs, unpacked; absolute paths in their text files point at where they lie now."""
    place = tmp_path_factory.mktemp("old")
    with tarfile.open(request.param) as archive:
        archive.extractall(place, filter="data")
    for path in (place / "outputs").rglob("*"):
        if path.is_file() and placeholder() in (data := path.read_bytes()):
            path.write_bytes(data.replace(placeholder(), str(place / "outputs").encode()))
    return place / "outputs"


def test_there_is_something_to_open():
    assert ARCHIVES


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(str(directory), device="cpu").model(IDS).logits[0, -1]


def test_a_conversion_a_bundle_and_a_merge_compute_what_they_did(old):
    stored = torch.load(old / "logits-of-merged.pt")
    torch.testing.assert_close(logits(old / "merged"), stored, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(old / "run"), stored, atol=1e-3, rtol=1e-3)
    kinds = resolve(str(old / "conversion")).kinds
    assert [(kind.use_rope, kind.sliding_window) for kind in kinds] == [(True, 8), (False, None)]


@pytest.mark.parametrize("name", ["conversion", "run", "merged"])
def test_the_doctor_finds_no_failure(name, old):
    assert [finding for finding in doctor.model(str(old / name)) if finding.status == "failure"] == []


def test_a_run_that_stopped_is_resumed_to_the_same_loss(old):
    # The hash of its data is of paths and times, which unpacking has changed.
    with pytest.raises(InputError, match="an older version started this run"):
        api.finetune(out=old / "unfinished", resume=True)
    report = api.finetune(out=old / "unfinished", resume=True, force=True)
    assert report.finished and report.steps_done == 3
    losses = [
        [json.loads(line)["loss"] for line in (old / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "unfinished")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_an_evaluation_is_reported(old):
    out = old / "page"
    api.write_report([old / "evaluation"], out=out)
    (page,) = out.glob("*.html")
    assert "model-SN-64-merged" in page.read_text()


def test_a_pipeline_has_nothing_left_to_do(old):
    # The recorded hashes of outputs and of text hold for the paths before unpacking.
    for path in (old / "pipeline" / "state").glob("*.json"):
        record = json.loads(path.read_text()) | {"output": plain(stamp(str(old / "pipeline" / path.stem)))}
        if path.stem == "measured":
            record["request"]["reads"]["data"] = [{"data": by_time(str(old / "text.txt"))}]
        path.write_text(json.dumps(record))
    said: list[str] = []
    plan = plan_pipeline(read_pipeline(str(old / "pipeline.yaml")), old / "pipeline")
    assert set(plan.standings.values()) == {"done"}
    found = run_pipeline(plan, say=said.append)
    assert found is not None, said
    # Text that changed is noticed all the same.
    (old / "text.txt").write_text("Another text.\n" * 100)
    with pytest.raises(InputError, match=r"reads\.data was"):
        plan_pipeline(read_pipeline(str(old / "pipeline.yaml")), old / "pipeline")
