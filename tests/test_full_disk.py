"""Every writer of the package on a disk that is really full: a small tmpfs. Each ends in exit code 3, with the place
and what to do; it leaves nothing that a later command takes as whole, and the same command works once there is room."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ctxext import api
from ctxext.cli import main
from ctxext.config.manifest import FILE_NAME, weight_hashes
from ctxext.data.cases import Case, read_cases, write_cases
from ctxext.errors import EnvironmentFault
from ctxext.evals.item_runner import Ledger, Outcome

SHARES = (0.5, 0.0, 0.1, 0.3, 0.7, 0.95)  # of the room that the output needs; the first one quick
LONG = ("multiplier", "pretrain", "pipeline", "probe")
TRAINING = ["--ctx", "64", "--steps", "2", "--set", "global_batch_size=1", "--set", "data.min_tokens=null"]

PRETRAIN = """
shape: {vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 2, head_dim: 16, length: 64}
stages:
- {ctx: 64, tuning: full, steps: 2, global_batch_size: 1, memory: {checkpoint: false}, attention: {train: dense},
   data: {source: TEXT}}
"""

PIPELINE = """
steps:
  convert: {command: convert, model: MODEL, hybrid: SN, sliding_window: 8}
  measure: {command: eval, models: "${convert}", lengths: [32], data: TEXT, limit: 128}
  page: {command: report, runs: "${measure}"}
"""


def ctxext(*words: object) -> int:
    """The command line in this process; its exit code."""
    before, sys.argv = sys.argv, ["ctxext", *map(str, words)]
    try:
        main()
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def inputs(model_dir, tmp_path_factory) -> dict[str, Path]:
    """A model, a text, and outputs of commands that others read."""
    root = tmp_path_factory.mktemp("inputs")
    text = root / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    model = model_dir("llama")
    assert ctxext("finetune", model, *TRAINING, "--data", text, "--out", root / "run") == 0
    assert ctxext("merge", root / "run", "--out", root / "merged") == 0
    evaluated = ["eval", model, "--suite", "perplexity", "--lengths", "32", "--data", text, "--limit", "128"]
    assert ctxext(*evaluated, "--out", root / "eval") == 0
    (root / "pretrain.yaml").write_text(PRETRAIN.replace("TEXT", str(text)))
    (root / "pipeline.yaml").write_text(PIPELINE.replace("TEXT", str(text)).replace("MODEL", str(model)))
    return {"model": model, "text": text} | {path.name: path for path in root.iterdir()}


COMMANDS: dict[str, Callable[[dict[str, Path]], list[object]]] = {
    "convert": lambda x: ["convert", x["model"], "--hybrid", "SSSN", "--sliding-window", "8"],
    "finetune": lambda x: ["finetune", x["model"], *TRAINING, "--data", x["text"]],
    "full": lambda x: ["finetune", x["model"], *TRAINING, "--data", x["text"], "--set", "tuning=full"],
    "multiplier": lambda x: [*COMMANDS["finetune"](x), "--find-multiplier", "--set", "validation.sequences=1"],
    "merge": lambda x: ["merge", x["run"]],
    "eval": lambda x: ["eval", x["model"], "--suite", "perplexity", "--lengths", "32", "--data", x["text"],
                       "--limit", "128"],
    "probe": lambda x: ["probe", x["merged"], "all", "--preset", "smoke", "--length", "128", "--extrapolate",
                        "--data", x["text"]],
    "verify": lambda x: ["verify", x["model"], "--ctx", "48"],
    "report": lambda x: ["report", x["eval"], x["run"]],
    "export": lambda x: ["export", x["merged"]],
    "pretrain": lambda x: ["pretrain", "--preset", x["pretrain.yaml"]],
    "pipeline": lambda x: ["run", x["pipeline.yaml"]],
}  # fmt: skip
GROWS = {"finetune": ["--resume"], "full": ["--resume"], "eval": [], "pipeline": []}  # options that resume the command


CASES = [
    pytest.param(name, share, marks=[pytest.mark.slow] if name in LONG or share != SHARES[0] else [])
    for name in COMMANDS
    for share in SHARES
]


@pytest.mark.parametrize(("name", "share"), CASES)
def test_a_command_whose_output_does_not_fit(name, share, inputs, small_disk, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disk, words = small_disk(32 * 1024**2), COMMANDS[name](inputs)
    out = disk.path / "runs" / "out"
    assert ctxext(*words, "--out", out) == 0, capsys.readouterr().err
    needed, made = disk.used(), {path.relative_to(out) for path in out.rglob("*")}
    shutil.rmtree(disk.path / "runs")

    disk.fill(leave=int(share * needed))
    capsys.readouterr()
    assert ctxext(*words, "--out", out) == 3
    told = capsys.readouterr().err
    full = (
        f"the disk of {disk.path}" in told
        and "is full" in told
        and re.search("hint: (make room|free disk space)", told)
    )
    early = name in ("convert", "pipeline") and f"{out}" in told and "are needed" in told and "larger disk" in told
    assert (full or early) and "Traceback" not in told, told

    # Either nothing is left, or what is left lets the same command resume. No file says that the output is whole.
    left = [path for path in disk.path.rglob("*") if path.name != "filler"]
    assert not [path for path in left if ".partial-" in str(path) or ".bundle-" in str(path) or ".old-" in str(path)]
    if name not in GROWS and name != "pretrain":
        assert left == []
    assert not (out / FILE_NAME).exists() and not (out / "config.json").exists()

    disk.make_room()
    more = GROWS.get(name, []) if out.exists() else ["--force"] if name == "pretrain" and left else []
    words = [words[0]] if more == ["--resume"] else words
    assert ctxext(*words, *more, "--out", out) == 0, capsys.readouterr().err
    assert {path.relative_to(out) for path in out.rglob("*")} == made


def test_a_plan_that_does_not_fit(inputs, small_disk):
    disk = small_disk(1024**2)
    disk.fill()
    with pytest.raises(EnvironmentFault, match="is full"):
        api.plan(inputs["model"], 64, gpu="h100", out=disk.path / "runs" / "plan")
    assert [path.name for path in disk.path.iterdir()] == ["filler"]


def test_a_full_cache_of_hashes_costs_time_and_nothing_else(inputs, small_disk, monkeypatch, tmp_path, capsys):
    disk = small_disk(1024**2)
    (disk.path / "ctxext").mkdir()
    (disk.path / "ctxext/hashes.json").write_text(json.dumps({"format": 1, "files": {}}))
    disk.fill()
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.path))
    assert len(weight_hashes(inputs["model"])) == 1
    assert ctxext(*COMMANDS["convert"](inputs), "--out", tmp_path / "out") == 0, capsys.readouterr().err
    assert json.loads((disk.path / "ctxext/hashes.json").read_text()) == {"format": 1, "files": {}}
    assert [path.name for path in (disk.path / "ctxext").iterdir()] == ["hashes.json"]


def test_a_full_cache_of_tokens_is_named(inputs, small_disk, monkeypatch, tmp_path, capsys):
    disk = small_disk(1024**2)
    disk.fill()
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.path))
    assert ctxext(*COMMANDS["finetune"](inputs), "--out", tmp_path / "runs" / "out") == 3
    told = capsys.readouterr().err
    assert (str(disk.path) in told and "No space left" in told) or "is full" in told, told
    assert not (tmp_path / "runs" / "out").exists() and [path.name for path in disk.path.iterdir()][-1] == "filler"


def test_outcomes_that_a_full_disk_cut_off_are_measured_again(small_disk):
    disk = small_disk(1024**2)
    path = disk.path / "outcomes" / "a.jsonl"
    items = [Outcome(f"item {i}", "task", 32, 1.0, details={"text": "x" * 3000}) for i in range(4)]
    Ledger(path).add(items[:1])
    disk.fill()
    with pytest.raises(OSError, match="No space"):
        Ledger(path).add(items[1:])
    assert path.read_bytes().count(b"\n") < path.stat().st_size  # a line was cut
    # Reading it on the full disk cuts the half line off; it needs no room.
    ledger = Ledger(path)
    assert list(ledger.outcomes) == ["item 0"]
    disk.make_room()
    ledger.add(items)
    assert list(Ledger(path).outcomes) == [item.id for item in items]


def test_cases_that_do_not_fit_leave_the_old_ones(small_disk):
    disk = small_disk(1024**2)
    path = disk.path / "cases" / "a.jsonl"
    old = [Case("0", "task", 32, "question", ("answer",), 4)]
    write_cases(path, old, {})
    disk.fill()
    with pytest.raises(EnvironmentFault, match="is full"):
        write_cases(path, [Case(f"{i}", "task", 32, "x" * 5000, ("answer",), 4) for i in range(9)], {})
    assert read_cases(path)[0] == old and len(os.listdir(path.parent)) == 2
