"""`ctxext plan`: quick, without torch, its JSON, its refusals."""

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from ctxext.cli.plan import plan
from ctxext.errors import CheckFailed, CtxextError, InputError
from ctxext.planning import calibrate as calibration
from ctxext.planning.answer import ask
from ctxext.units import format_flops

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)
ctxext = CliRunner()


def run(*arguments):
    result = ctxext.invoke(app, list(arguments))
    if isinstance(result.exception, CtxextError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_says_what_it_found():
    text = run("llama2-7b", "--ctx", "100k", "--gpu", "h100")
    for word in ("arithmetic", "memory", "a step", "tokens/s", "depends most on", "fastest:", "next:", "longest:",
                 "ctxext finetune llama2-7b --ctx 100k"):  # fmt: skip
        assert word in text, word


def test_a_step_is_the_sum_of_its_parts():
    """The FLOPs that head the list are those of the list, no two parts have one name, and none takes 0 s."""
    cards = (("llama2-7b", "--ctx", "100k", "--gpu", "h100"), ("tiny", "--ctx", "2k", "--gpu", "h100"))
    shared = ("llama2-7b", "--ctx", "16k", "--gpu", "h100", "--gpus", "4", "--set", "global_batch_size=8")
    for arguments in (*cards, shared):
        model, *options = arguments
        best = json.loads(run(model, *options, "--json"))["fastest"]
        text = run(model, *options)
        step = next(line for line in text.splitlines() if line.startswith("a step"))
        assert format_flops(sum(part["flops"] for part in best["parts"])) in step
        assert step.endswith(" on each GPU") == (best["processes"] > 1)
        names = [part["name"] for part in best["parts"]]
        assert len(set(names)) == len(names) and not re.search(r"\b0 (s|ms)\b", text)


def test_json():
    found = json.loads(run("mistral-7b", "--ctx", "32k", "--gpu", "a100-40", "--gpus", "4", "--json"))
    assert set(found) == {"model", "ctx", "device", "combinations", "fitting", "fastest", "next", "longest",
                          "least_memory", "dominates"}  # fmt: skip
    assert found["ctx"] == 32_768 and found["device"]["cards"] == 4 and not found["device"]["measured"]
    best = found["fastest"]
    assert len(found["next"]) == 3 and found["longest"]["ctx"] % 1024 == 0
    for choice in (best, *found["next"]):
        assert choice["memory"]["total"] <= found["device"]["memory"]
        assert choice["tokens_per_second"] <= best["tokens_per_second"] * 1.001
        assert sum(part["seconds"] for part in choice["parts"]) == pytest.approx(choice["seconds_per_step"])


def test_hybrids_side_by_side():
    found = json.loads(
        run("llama2-7b", "--ctx", "100k", "--gpu", "h200", "--hybrid", "none,swa128-nope", "--json",
            "--set", "attention.train=dense")
    )  # fmt: skip
    convert, finetune = found["fastest"]["commands"]
    assert convert.startswith("ctxext convert llama2-7b --hybrid swa128-nope --out runs/llama2-7b-swa128-nope")
    assert finetune.startswith("ctxext finetune runs/llama2-7b-swa128-nope --ctx 100k")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ctx", "8k", "--gpu", "h1000"], "allowed are h200, h100"),
        (["--ctx", "8k", "--memory", "lots"], "no number of bytes"),
        (["--ctx", "8k", "--memory", "0"], "1M or more"),
        (["--ctx", "0", "--gpu", "h100"], "at least one token"),
        (["--gpu", "h100"], "--ctx is missing"),
        (["--ctx", "8k", "--gpu", "h100", "--hybrid", "swa1"], "no hybrid preset"),
        (["--ctx", "8k", "--gpu", "h100", "--hybrid", ","], "gives no layout"),
        (["--ctx", "8k", "--gpu", "h100", "--memory", "400G"], "h100 has only 79.6 GiB"),
        (["--ctx", "8k", "--gpu", "h100", "--set", "dtype=float32"], "only the bf16 rate"),
        (["--ctx", "8k", "--gpu", "h100", "--set", "lora.rankk=3"], "rankk"),
        (["--ctx", "8k", "--gpu", "h100", "--set", "attention.group_size=9k"], "group_size"),
    ],
)
def test_refusals(arguments, said, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=said):
        run("llama2-7b", *arguments)


def test_without_rates_the_memory_is_planned_and_the_time_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "card_here", lambda: None)
    text = run("tiny", "--ctx", "8k")
    for words in ("no rates are known for this machine", "time ", "not known; `ctxext plan tiny --calibrate`",
                  "fits: ctx 8,192, time unknown, ", "ctxext finetune tiny --ctx 8k", "checkpoints"):  # fmt: skip
        assert words in text, words
    assert "fastest" not in text and "tokens/s" not in text
    found = json.loads(run("tiny", "--ctx", "8k", "--json"))
    assert found["device"]["rates"] is found["device"]["measured"] is found["dominates"] is None
    best = found["fastest"]
    assert best["seconds_per_step"] is best["tokens_per_second"] is best["parts"] is None
    assert best["memory"]["total"] <= found["device"]["memory"] and found["longest"]["ctx"] >= 8192
    # What is listed first turns the fewest knobs.
    assert all(len(best["changes"]) <= len(other["changes"]) for other in found["next"])


def test_an_unknown_model_and_one_too_large():
    with pytest.raises(InputError, match="no model preset"):
        run("llama9", "--ctx", "8k", "--gpu", "h100")
    with pytest.raises(CheckFailed, match="no configuration fits"):
        run("llama2-70b", "--ctx", "8k", "--memory", "4G")


def test_memory_alone_and_beside_a_card():
    def device(*arguments):
        return json.loads(run("llama2-7b", "--ctx", "16k", "--json", *arguments))["device"]

    assert device("--memory", "80G")["memory"] == 80 * 2**30 and "a100-80" in device("--memory", "80G")["rates"]
    both = device("--gpu", "h100", "--memory", "40G")
    assert both["memory"] == 40 * 2**30 and "h100" in both["rates"]


def test_a_plan_imports_no_torch():
    """What makes it quick; how quick is in benchmarks/startup.py."""
    code = (
        "import sys, typer\nfrom ctxext.cli.plan import plan\napp = typer.Typer()\napp.command()(plan)\n"
        "app(['llama2-70b', '--ctx', '64k', '--gpu', 'h200', '--gpus', '8'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_a_machine_is_calibrated_without_a_plan(monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", lambda say: [])
    assert run("tiny", "--calibrate") == ""
    assert json.loads(run("tiny", "--calibrate", "--json")) == []
    with pytest.raises(InputError, match="no model preset"):
        run("tini", "--calibrate")
    with pytest.raises(InputError, match="in one machine"):
        ask("tiny", "8k", gpu="h100", cards_=64, preset="lora-alpha", fixed={})
