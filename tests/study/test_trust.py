"""A pipeline that somebody else wrote does not leave the working directory."""

import json

import pytest

from ctxext.errors import InputError
from ctxext.study.pipeline import read_pipeline
from ctxext.study.run_pipeline import plan_pipeline


@pytest.fixture
def refused(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.chdir(inside)

    def planned(step, out=None, trusted=False):
        (inside / "p.yaml").write_text(json.dumps({"steps": {"a": step}}))
        return plan_pipeline(read_pipeline("p.yaml"), out, trusted=trusted)

    return planned


CASES = {
    "absolute": {"command": "eval", "models": "tiny", "data": "/etc/hostname"},
    "upwards": {"command": "eval", "models": "tiny", "data": "../secret.txt"},
    "home": {"command": "eval", "models": "tiny", "data": "~/x.txt"},
    "field": {"command": "finetune", "model": "tiny", "ctx": "1k", "settings": {"data.source": "../secret.txt"}},
    "mixture": {
        "command": "finetune", "model": "tiny", "ctx": "1k",
        "settings": {"data.mixture": [{"source": "../secret.txt", "weight": 1.0}]},
    },
    "link": {"command": "eval", "models": "tiny", "data": "link.txt"},
    "below": {"command": "eval", "models": "tiny", "data": "books"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_leads_out_is_refused_and_named(refused, tmp_path, case):
    (tmp_path / "inside" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "inside" / "books").mkdir()
    (tmp_path / "inside" / "books" / "b.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="outside the working directory"):
        refused(CASES[case])
    assert not (tmp_path / "inside" / "runs").exists()


def test_an_output_elsewhere_and_a_base_elsewhere_are_refused(refused, tmp_path, model_dir, write_model):
    with pytest.raises(InputError, match="outside the working directory"):
        refused({"command": "probe", "model": "tiny", "names": "positions"}, out=tmp_path / "there")
    (tmp_path / "inside" / "model").symlink_to(model_dir())
    with pytest.raises(InputError, match="outside the working directory"):
        refused({"command": "probe", "model": "model", "names": "positions"})
    write_model(tmp_path / "inside" / "own")
    made = {"kind": "conversion", "created": "2026-01-01T00:00:00+00:00", "command": [], "spec": {}, "versions": {},
            "facts": {}, "parents": {"source": {"path": "/etc", "weights": {}}}}  # fmt: skip
    (tmp_path / "inside" / "own" / "ctxext.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="leads to /etc"):
        refused({"command": "probe", "model": "own", "names": "positions"})


def test_links_in_the_output_and_model_presets_that_lead_out_are_refused(refused, tmp_path, write_model):
    step = {"command": "probe", "model": "tiny", "names": "positions"}
    out = tmp_path / "inside" / "out"
    out.mkdir()
    (out / "pipeline.json").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="outside the working directory"):
        refused(step, out=out)
    write_model(tmp_path / "away")
    (tmp_path / "inside" / "presets" / "models").mkdir(parents=True)
    text = "family: llama\noriginal_length: 64\nusable_length: 64\ndirectory: ../../../away\n"
    (tmp_path / "inside" / "presets" / "models" / "evil.yaml").write_text(text)
    with pytest.raises(InputError, match="outside the working directory"):
        refused(step | {"model": "evil"})


def test_presets_that_ship_and_files_below_are_allowed(refused, tmp_path):
    (tmp_path / "inside" / "b.txt").write_text("text")
    for step in (
        {"command": "eval", "models": "tiny", "data": "b.txt", "lengths": [64]},
        {"command": "finetune", "model": "tiny", "ctx": "1k", "preset": "longlora"},
        {"command": "convert", "model": "tiny", "hybrid": "swa128-nope"},
    ):
        assert refused(step).standings["a"] == "new"
    assert refused(CASES["upwards"] | {"data": str(tmp_path / "secret.txt")}, trusted=True).standings["a"] == "new"
    with pytest.raises(InputError, match="no processes on other hosts"):
        refused({"command": "finetune", "model": "tiny", "ctx": "1k", "hostfile": "hosts"})
