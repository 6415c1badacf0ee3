"""`ctxext presets` and `ctxext probe` as they are typed: what is printed, on which stream, and what is refused."""

import json

import pytest
from typer.testing import CliRunner

from ctxext.cli.app import app
from ctxext.config import presets
from ctxext.errors import CheckFailed, InputError


def run(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_the_list_has_every_preset_with_its_comment():
    lines = run("presets", "list").stdout.splitlines()
    assert len(lines) == sum(len(presets.names(kind)) for kind in presets.KINDS)
    found = json.loads(run("presets", "list", "finetune", "--json").stdout)
    assert {one["name"] for one in found} == {f"finetune/{name}" for name in presets.names("finetune")}
    assert all(one["comment"] for one in json.loads(run("presets", "list", "--json").stdout))
    with pytest.raises(InputError, match="no presets of kind 'nothing'"):
        run("presets", "list", "nothing")


def test_a_preset_is_shown_as_its_file_and_what_differs():
    done, path = run("presets", "show", "finetune/heal"), presets.find("finetune", "heal").path
    assert done.stdout.startswith(path.read_text().rstrip()) and "by default" in done.stdout
    assert "lora.target_modules   [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]   (by" in done.stdout
    assert "self   (not set by default)" in done.stdout and "None" not in done.stdout and "('" not in done.stdout
    assert str(path) in done.stderr and str(path) not in done.stdout
    data = json.loads(run("presets", "show", "heal", "--json").stdout)
    assert data["name"] == "finetune/heal" and data["sets"] == presets.find("finetune", "heal").data
    assert data["differs"] and {"field", "here", "default"} == set(data["differs"][0])
    assert json.loads(run("presets", "show", "swa128-nope", "--json").stdout)["differs"] == []


def test_validate_prints_every_fault_and_fails(tmp_path):
    assert run("presets", "validate", "finetune/heal").stdout == "finetune/heal: valid\n"
    bad = tmp_path / "finetune" / "bad.yaml"
    bad.parent.mkdir()
    bad.write_text("stepss: 3\nctx: -1")
    with pytest.raises(CheckFailed, match="presets with faults: finetune/"):
        run("presets", "validate", bad)
    done = CliRunner().invoke(app, ["presets", "validate", str(bad), "--json"])
    (found,) = json.loads(done.stdout)
    assert len(found["faults"]) == 2 and "did you mean" in " ".join(found["faults"])


def test_a_probe_prints_its_tables_or_json_on_stdout_and_the_rest_on_stderr(tmp_path):
    small = ("--preset", "smoke", "--length", 128, "--samples", 1)
    done = run("probe", "tiny", "attention-distance", *small, "--out", tmp_path / "a")
    assert done.stdout.startswith("layer  kind") and "tiny, attention-distance:" in done.stderr
    assert "probes.json" in done.stderr and "probes.json" not in done.stdout
    data = json.loads(run("probe", "tiny", "attention-distance", *small, "--out", tmp_path / "b", "--json").stdout)
    assert data["models"] == ["tiny"] and [one["probe"] for one in data["results"]] == ["attention-distance"]
    with pytest.raises(InputError, match="nonsense"):
        run("probe", "tiny", "nonsense", "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()
