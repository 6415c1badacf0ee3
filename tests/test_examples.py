"""The examples run on the embedded model, as a newcomer runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctxext.probes.probe_spec import PROBES

ROOT = Path(__file__).parent.parent


def test_every_script_finds_what_it_imports():
    scripts = [
        str(path) for place in ("examples", "benchmarks", "tools") for path in sorted((ROOT / place).glob("*.py"))
    ]
    code = f"import runpy\nfor path in {scripts}: runpy.run_path(path, run_name='imported')"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_demo_shows_that_both_routes_help_at_four_times_the_length(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "examples" / "demo.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    at_2k = {}
    for suite in ("perplexity", "passkey"):
        results = json.loads((tmp_path / "runs" / "demo" / f"eval-{suite}" / "results.json").read_text())
        rows = [row for model in results["models"] for row in model["suites"][0]["rows"]]
        at_2k[suite] = [row["value"] for row in rows if row["length"] == 2048]
    source, plain, converted, healed = at_2k["perplexity"]
    assert plain < source and healed < source and healed <= converted, at_2k
    source, plain, converted, healed = at_2k["passkey"]
    assert plain > source and healed > source and healed >= converted, at_2k


@pytest.mark.slow
def test_the_retrofit_goes_from_plan_to_merge_and_retrieves_beyond_what_it_saw(tmp_path):
    environment = os.environ | {"CTXEXT": str(Path(sys.executable).with_name("ctxext"))}
    script = ROOT / "examples" / "retrofit.sh"
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs" / "retrofit"
    assert (runs / "hybrid" / "retrofit.json").is_file() and (runs / "merged" / "config.json").is_file()
    results = json.loads((runs / "eval" / "results.json").read_text())
    found = [
        {row["length"]: row["value"] for suite in model["suites"] for row in suite["rows"] if row["suite"] == "passkey"}
        for model in results["models"]
    ]
    tiny, plain, converted, healed = found
    assert min(healed.values()) > 0.5 and healed[4096] > max(tiny[4096], plain[4096], converted[4096]) + 0.3, found


@pytest.mark.slow
def test_a_look_inside_has_every_probe_and_one_page(tmp_path):
    environment = os.environ | {"CTXEXT": str(Path(sys.executable).with_name("ctxext"))}
    script = ROOT / "examples" / "look_inside.sh"
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs" / "inside"
    results = [
        r for name in ("probes", "trace") for r in json.loads((runs / name / "probes.json").read_text())["results"]
    ]
    assert {result["probe"] for result in results} == set(PROBES)
    heads = next(result["findings"][1]["facts"] for result in results if result["probe"] == "retrieval-heads")
    assert heads["top"][0][0] == 1, heads["top"]  # tiny retrieves in layer 1
    assert (runs / "report" / "report.html").read_text().count("data:image/png") >= 15


@pytest.mark.slow
def test_the_pipeline_is_the_same_as_commands_and_from_python(tmp_path):
    environment = os.environ | {"CTXEXT": str(Path(sys.executable).with_name("ctxext"))}
    found = {}
    for name, command in (("sh", "bash"), ("py", sys.executable)):
        place = tmp_path / name
        place.mkdir()
        script = ROOT / "examples" / f"pipeline.{name}"
        done = subprocess.run([command, script], cwd=place, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        runs = place / "runs" / "pipeline"
        assert (runs / "merged" / "model.safetensors").is_file() and (runs / "report" / "report.html").is_file()
        results = json.loads((runs / "eval" / "results.json").read_text())
        found[name] = [
            (row["suite"], row["length"], row["value"])
            for model in results["models"]
            for suite in model["suites"]
            for row in suite["rows"]
        ]
    assert found["sh"] == found["py"]
    passkey = [value for suite, length, value in found["sh"] if (suite, length) == ("passkey", 2048)]
    assert passkey[2] > passkey[1] >= passkey[0], found  # tiny, converted, healed and extended
