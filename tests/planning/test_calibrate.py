"""What is measured is stored whole, read back, and used; what is broken is none."""

import json
import platform
import re

import pytest
from typer.testing import CliRunner

from ctxext.cli.app import app
from ctxext.config.loader import build
from ctxext.model.source import resolve
from ctxext.ops.cost import WHOLE
from ctxext.planning import calibrate
from ctxext.planning.answer import ask, prediction
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_plan import plan_run

SMALL = {"WIDTHS": {"cpu": (16, 32)}, "ROWS": {"cpu": 64}, "LENGTH": {"cpu": 512}, "STREAMED": {"cpu": (64, 16, 32)}}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, value in SMALL.items():
        monkeypatch.setattr(calibrate, name, value)
    return calibrate.calibrate()


def test_it_is_stored_and_found_again(measured, tmp_path):
    assert [one.dtype for one in measured] == ["float32", "bfloat16"]
    single = measured[0].rates["linear"]
    assert measured[0].rates["adapters"] == measured[1].rates["adapters"] == single != measured[1].rates["linear"]
    for one in measured:
        assert calibrate.stored(one.dtype, gpu=False) == calibrate.Calibration(**json.loads(json.dumps(vars(one))))
        rates = calibrate.stored(one.dtype, gpu=False).as_rates()
        assert rates.measured and rates.linear_at(24) > 0 and rates.stream > 0
        assert set(rates.attention) == {"full", "s2", "sliding"}
        assert all(rate > 0 for pair in rates.attention.values() for rate in pair)
        assert one.machine == platform.node() and one.torch in rates.source and one.dtype in rates.source
    assert calibrate.stored("float32", gpu=True) is None
    assert [path.name for path in (tmp_path / "ctxext").iterdir()] == ["calibration.json"]


def test_other_machines_are_kept_and_a_broken_file_is_none(measured):
    path = calibrate.path()
    data = json.loads(path.read_text())
    data["machines"]["far/cpu/float32"] = {"anything": 1}
    path.write_text(json.dumps(data))
    calibrate._store(measured)
    assert "far/cpu/float32" in json.loads(path.read_text())["machines"]
    for broken in ("", "[]", '{"format": 1, "machines": 3}', '{"format": 2}', json.dumps({"format": 1, "machines": {
            f"{platform.node()}/cpu/float32": {"rates": {}}}})):  # fmt: skip
        path.write_text(broken)
        assert calibrate.stored("float32", gpu=False) is None
        calibrate._store(measured)
        assert calibrate.stored("float32", gpu=False).as_rates() == measured[0].as_rates()


def test_plans_and_runs_use_it_and_say_so(measured):
    question, rates = ask("tiny", "2k", preset="smoke", fixed={})
    assert not question.gpu and rates.measured and "this machine" in rates.source
    assert ask("tiny", "2k", gpu="this", memory="4G", preset="smoke", fixed={})[0].memory == 4 * 2**30
    plan = plan_run(resolve("tiny"), build(FinetuneSpec, {"ctx": 512, "steps": 1}, source="test"))
    text, took = prediction(plan, WHOLE)
    assert "this machine" in text and took.seconds > 0
    calibrate.path().unlink()
    text, took = prediction(plan, WHOLE)
    assert took is None and "no rates known for this machine: ctxext plan" in text and "--calibrate" in text


def test_a_run_says_what_it_expects_and_then_what_it_took(model_dir, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("some words to train on. " * 500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, value in SMALL.items():
        monkeypatch.setattr(calibrate, name, value)
    known = ["finetune", str(model_dir("llama")), "--ctx", "64", "--preset", "smoke", "--data", str(text), "--out"]
    result = CliRunner().invoke(app, [*known, str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert "no rates known for this machine" in result.stderr and "no prediction" in result.stdout
    calibrate.calibrate()
    result = CliRunner().invoke(app, [*known, str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert "on a CPU the process itself keeps more" in result.stderr and "a step (this machine" in result.stderr
    assert re.search(r"peak memory +\d.* [MG]iB resident, .*; \d.* [MG]iB predicted to be held", result.stdout)
    assert re.search(r"a step +\d.* m?s, the median; predicted \d", result.stdout)
