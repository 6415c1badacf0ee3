"""Probes as a command runs them: what is written, in which order, what is compared, and that failures leave nothing."""

import json

import pytest

from ctxext.config import manifest as manifests
from ctxext.errors import EnvironmentFault, InputError, ModelError
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.probes import run_probes
from ctxext.probes.plan_probes import plan_probe
from ctxext.probes.probe_finding import ProbeFinding
from ctxext.probes.probe_spec import PROBES


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "hybrid"
    run_conversion(plan_conversion("tiny", "swa128-nope", out=out, sliding_window=32), gate=False)
    return str(out)


SMALL = {"samples": 2, "attention-distance.rows": 4, "length": 128}


def test_every_probe_has_its_function():
    assert list(run_probes.MEASURES) == list(PROBES)


def test_what_a_probing_writes(hybrid, tmp_path):
    plan = plan_probe(hybrid, ["attention-distance", "positions"], SMALL, compare="tiny", out=tmp_path / "out")
    said, seen = [], []
    report = run_probes.measure(plan, lambda *told: seen.append(told), said.append)
    pictures = run_probes.write(plan, report)
    assert report.models == ("tiny-swa128-nope", "tiny") and report.layouts == ("SNSN", "FFFF")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["probes.json", "ctxext.json", *pictures]
    )
    assert {name.split("-")[0] for name in pictures} == {"attention", "positions"}
    data = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert [result["probe"] for result in data["results"]] == ["attention-distance", "positions"]
    assert data["results"][0]["spec"]["samples"] == 2 and len(data["results"][0]["findings"]) == 2
    manifest = manifests.read(tmp_path / "out")
    assert manifest.kind == "probe" and set(manifest.parents) == {"model 0", "model 1"}
    assert manifest.spec["probes"][0]["length"] == 128
    assert any("tiny-swa128-nope, positions" in line for line in said)
    assert seen[-1][1] == seen[-1][2] and {what.split()[0] for what, _, _ in seen} == {"tiny-swa128-nope", "tiny"}


def test_the_same_question_has_the_same_answer(hybrid, tmp_path):
    plan = plan_probe(hybrid, ["attention-distance"], SMALL, out=tmp_path / "out")
    assert run_probes.measure(plan).results == run_probes.measure(plan).results


def test_a_failure_leaves_nothing(hybrid, tmp_path, monkeypatch):
    plan = plan_probe(hybrid, ["positions"], out=tmp_path / "out")
    report = run_probes.measure(plan)
    monkeypatch.setattr("ctxext.report.panels.draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_probes.write(plan, report)
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_says_what_helps(hybrid, tmp_path, monkeypatch):
    def exhausted(*_):
        raise MemoryError("no room")

    monkeypatch.setitem(run_probes.MEASURES, "positions", exhausted)
    with pytest.raises(EnvironmentFault, match="out of memory in positions of tiny-swa128-nope") as caught:
        run_probes.measure(plan_probe(hybrid, ["positions"], out=tmp_path / "out"))
    assert "--length" in caught.value.hint


def test_all_says_what_it_leaves_out_and_why(hybrid, tmp_path, monkeypatch):
    plan = plan_probe(hybrid, ["all"], preset="smoke", out=tmp_path / "out")
    assert plan.left_out == "all leaves out retrieval-trace and qk-distance (tiny-swa128-nope is not a finetune run)"
    monkeypatch.setattr(run_probes, "MEASURES", dict.fromkeys(run_probes.MEASURES, lambda *_: ProbeFinding({})))
    told = []
    run_probes.measure(plan, notice=told.append)
    assert told == [plan.left_out]
    assert plan_probe(hybrid, ["positions"], out=tmp_path / "out").left_out == ""


def test_models_of_one_name_are_told_apart(hybrid, tmp_path):
    plan = plan_probe(hybrid, ["positions"], compare=hybrid, out=tmp_path / "out")
    assert len(set(run_probes.measure(plan).models)) == 2


def test_an_output_that_exists_is_refused_at_once(hybrid, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        plan_probe(hybrid, ["positions"], out=tmp_path / "out")


def test_numbers_that_are_not_finite_are_refused(write_model, tmp_path):
    """NaN in one weight: the probe and the model are named, and nothing is written."""
    from safetensors.torch import load_file, save_file

    place = write_model(tmp_path / "model", max_position_embeddings=512)
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    for name in ("attention-distance", "layer-niah"):
        given = {"length": 512, "samples": 40} if name == "layer-niah" else {"length": 128, "samples": 1}
        plan = plan_probe(str(place), [name], given, out=tmp_path / "out")
        with pytest.raises(ModelError, match="NaN or infinite"):
            run_probes.measure(plan)
