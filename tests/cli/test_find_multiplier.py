"""`ctxext finetune --find-multiplier` as typed: what it prints and leaves, what it refuses without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ctxext import multiplier_search
from ctxext.cli import finetune as command
from ctxext.cli import multiplier
from ctxext.config import manifest as manifests
from ctxext.errors import InputError
from ctxext.finetuning import finetune_fields
from ctxext.multiplier_search import brief
from ctxext.requests import FinetuneRequest
from ctxext.train.multiplier import GRID, STEPS, MultiplierSearch, Trial


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(200)))
    return path


def finetune(*arguments: object):
    """The command, in this process."""
    app = typer.Typer()
    app.command()(command.finetune)
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.slow
def test_it_prints_the_option_and_leaves_curves_and_a_manifest(model_dir, text, tmp_path):
    arguments = ["--ctx", 64, "--set", "global_batch_size=1", "--set", "lora.multiplier=0.5", "--data", text]
    done = finetune(model_dir("llama"), "--find-multiplier", "--steps", 2, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 0, done.output
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted([multiplier_search.CURVES, multiplier_search.NUMBERS, manifests.FILE_NAME])
    numbers = json.loads((tmp_path / "out" / multiplier_search.NUMBERS).read_text())
    assert [trial["multiplier"] for trial in numbers["trials"]] == [0.5 * factor for factor in GRID]
    best = min(numbers["trials"], key=lambda trial: trial["held_out"][-1][1])
    assert numbers["option"] == f"--set lora.multiplier={best['multiplier']:.6g}"
    assert f"\n{numbers['option']}\n" in done.stdout
    assert all(f"\n{trial['multiplier']:g} " in done.stdout for trial in numbers["trials"])
    assert (tmp_path / "out" / multiplier_search.CURVES).read_bytes().startswith(b"\x89PNG")
    manifest = manifests.read(tmp_path / "out")
    assert manifest.kind == "multiplier" and manifest.facts["option"] == numbers["option"]
    assert manifest.spec["steps"] == 2 and manifest.parents["base"]["weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_best_is_marked_and_what_diverged_is_called_so(capsys, tmp_path):
    curve = ((1, 3.0), (2, 2.0))
    trials = (
        Trial(0.5, curve, ((0, 3.0), (1, 2.9), (2, 2.8))),
        Trial(1.0, curve, ((0, 3.0), (1, 2.7), (2, 2.5))),
        Trial(2.0, curve[:1], ((0, 3.0), (1, 9e9)), "step 2: the loss is nan"),
    )
    found = MultiplierSearch(trials, given=1.0, steps=2)
    multiplier._show(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["multiplier", "step", "0", "step", "1", "step", "2", "training"]
    assert lines[3].split() == ["1", "*", "3.0000", "2.7000", "2.5000", "2.0000"]
    assert lines[4].split() == ["2", "3.0000", "9000000000.0000", "diverged"] and lines[-1] == found.option
    multiplier_search._draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_trial_has_its_own_number_of_steps_where_none_is_given():
    request = FinetuneRequest(model="tiny", ctx=64)
    assert finetune_fields(brief(request)) == {"ctx": 64, "steps": STEPS}
    assert finetune_fields(brief(replace(request, steps=7)))["steps"] == 7
    assert finetune_fields(brief(replace(request, settings={"steps": 8})))["steps"] == 8


@pytest.mark.parametrize("option", [["--plan"], ["--nproc", "2"], ["--zero", "2"]], ids=" ".join)
def test_options_that_ask_for_a_run_are_refused(model_dir, option):
    arguments = ["--ctx", 64, "--find-multiplier", "--set", "tuning=full"]  # refused as well, but later
    error = finetune(model_dir("llama"), *arguments, *option).exception
    assert isinstance(error, InputError) and option[0] in error.message


def test_it_refuses_before_torch_is_there_and_leaves_nothing(model_dir, tmp_path):
    code = (
        "import sys; from ctxext.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    arguments = ["finetune", str(model_dir("llama")), "--ctx", "64", "--find-multiplier", "--set", "tuning=full"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 False\n" and "has no lora.multiplier" in done.stderr, (done.stdout, done.stderr)
    assert list(tmp_path.iterdir()) == []
