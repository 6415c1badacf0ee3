"""The RoPE doctor: rotations measured in the attention, not read; what was edited shows; the past is told."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import from_directory, resolve
from ctxext.probes import positions
from ctxext.probes.probe_spec import Positions
from ctxext.probes.subject import Subject


def look(subject):
    return positions.measure(subject, Positions(), lambda *_: None)


SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "factor": 8.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 128},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("kind", SCALED)
def test_every_layer_turns_as_the_config_means(kind, family, model_dir):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **SCALED[kind]}
    finding = look(Subject(from_directory(model_dir(family, rope_parameters=rope, max_position_embeddings=1024))))
    assert all(layer["apart"] < 1e-4 for layer in finding.facts["layers"])
    scale = finding.facts["attention_scale"]
    assert scale["built"] == pytest.approx(scale["meant"]) and (scale["meant"] > 1) == (kind in ("yarn", "longrope"))
    stretched = max(layer["stretched"][1] for layer in finding.facts["layers"])
    assert (stretched > 1.5) == (kind != "default"), stretched  # also where it depends on the length of the text
    assert any("depends on the length of the text" in note for note in finding.notes) == (
        kind in ("dynamic", "longrope")
    )
    json.dumps(dataclasses.asdict(finding), allow_nan=False)


def test_a_model_that_turns_otherwise_than_its_config_says_is_found_out(model_dir):
    subject = Subject(from_directory(model_dir()))
    subject.loaded.model.model.rotary_emb.inv_freq.div_(2.0)  # interpolated, and config.json knows nothing of it
    finding = look(subject)
    assert all(layer["apart"] == pytest.approx(0.5, abs=1e-3) for layer in finding.facts["layers"])
    assert any("rotate by other angles" in note for note in finding.notes)


def test_layers_without_positions_do_not_turn_and_the_past_is_told(tmp_path):
    run_conversion(plan_conversion("tiny", "SSSN", out=tmp_path / "model", sliding_window=32), gate=False)
    finding = look(Subject(resolve(str(tmp_path / "model"))))
    *sliding, last = finding.facts["layers"]
    assert [one["bears"] for one in sliding] == [None] * 3 and last["kind"] == "N"
    assert max(map(abs, last["realised"])) < 1e-6 and sliding[0]["realised"][0] == pytest.approx(1.0, rel=1e-5)
    assert [step["layers"] for step in finding.facts["history"]] == ["FFFF", "SSSN"]
    assert [step["made_by"] for step in finding.facts["history"]] == ["model", "conversion"]


def test_a_parent_that_is_gone_is_said(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(resolve("tiny").directory, first)
    run_conversion(plan_conversion(str(first), "SSSN", out=second, sliding_window=32), gate=False)
    first.rename(tmp_path / "elsewhere")
    steps = positions.history(resolve(str(second)))
    assert [step["made_by"] for step in steps] == ["missing", "conversion"]


def test_a_path_is_shown_without_the_way_back(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    run_conversion(plan_conversion("tiny", "swa128-nope", out=tmp_path / "model"), gate=False)
    monkeypatch.chdir(tmp_path)
    for given, shown in (("runs/../model", str((tmp_path / "model").resolve())), ("model", "model")):
        assert positions.history(resolve(given))[-1]["path"] == shown


def test_positions_that_nothing_was_trained_for_are_pointed_at(model_dir):
    changes = {"max_position_embeddings": 4096, "original_max_position_embeddings": 512}
    finding = look(Subject(from_directory(model_dir(**changes))))
    assert any("a usable length of 4,096" in note for note in finding.notes)
    assert {layer["bears"] for layer in finding.facts["layers"]} == {4096}


def test_a_picture_has_the_wavelengths(model_dir):
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    (picture,) = look(Subject(from_directory(model_dir(rope_parameters=rope)))).pictures
    first, meant, realised = picture.lines
    assert meant.y[0] == pytest.approx(8 * math.pi) and first.y[0] == pytest.approx(2 * math.pi)
    torch.testing.assert_close(torch.tensor(realised.y), torch.tensor(meant.y), rtol=1e-3, atol=0)
