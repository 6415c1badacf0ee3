"""Processes that write one output, one run or one cache at once, and processes that end while they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxext.config.manifest import FILE_NAME, weight_hashes
from ctxext.train.metrics import read

COMMAND = [sys.executable, "-c", "from ctxext.cli import main; main()"]
LONG = 300.0  # seconds to wait for a process before it counts as hung


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(4000)))
    return path


def begin(*words: object) -> subprocess.Popen[str]:
    # A process that a shell starts in the background ignores SIGINT, and so do its children: undo that.
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    told = process.communicate(timeout=LONG)[1]
    return process.returncode, told


def wait_for(process: subprocess.Popen[str], ready) -> None:
    until = time.monotonic() + LONG
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "the process did not come so far"
        time.sleep(0.005)


def training(model: Path, text: Path, run: Path, *more: object) -> list[object]:
    """A run of so many steps that it is still on when the second process looks."""
    return ["finetune", model, "--ctx", 64, "--steps", 2000, "--set", "global_batch_size=1", "--data", text,
            "--set", "faults.save_steps=1000", "--set", "data.min_tokens=null", "--out", run, *more]  # fmt: skip


def test_a_run_that_is_trained_is_refused_to_others_by_name(model_dir, text, tmp_path):
    run = tmp_path / "runs" / "run"
    first = begin(*training(model_dir(), text, run))
    try:
        wait_for(first, lambda: len(read(run / "metrics.jsonl")) > 2)
        others = [
            begin(*training(model_dir(), text, run)),
            begin(*training(model_dir(), text, run, "--force")),
            begin("finetune", "--resume", "--out", run),
            begin("convert", model_dir(), "--hybrid", "SN", "--sliding-window", 8, "--out", run, "--force"),
        ]
        told = [end(other) for other in others]
        assert first.poll() is None, "the first one ended too early for this test"
        assert [code for code, _ in told] == [2, 2, 2, 2], told
        assert "exists" in told[0][1] and all("is being written by another" in said for _, said in told[1:]), told
        assert not any("Traceback" in said for _, said in told)
        first.send_signal(signal.SIGTERM)
        code, said = end(first)
        assert code == 130 and "go on with" in said, said
    finally:
        first.kill()
    steps = [line["step"] for line in read(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "another process wrote into the run"
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_two_trainings_that_begin_one_run_at_once(model_dir, text, tmp_path):
    """Neither deletes the other's work, and one trains."""
    run = tmp_path / "runs" / "run"
    both = [begin(*training(model_dir(), text, run, "--steps", 2)) for _ in range(2)]
    told = [end(one) for one in both]
    assert sorted(code for code, _ in told) == [0, 2], told
    (refusal,) = [said for code, said in told if code == 2]
    assert "is being written by another" in refusal or "exists" in refusal
    assert (run / FILE_NAME).is_file() and len(read(run / "metrics.jsonl")) == 2


CACHER = """
import sys
from pathlib import Path
from ctxext.config.manifest import weight_hashes
for path in sorted(Path(sys.argv[1]).iterdir()):
    weight_hashes(path)
"""


def test_a_cache_that_processes_share_is_whole(tmp_path):
    """The last one wins: entries may be lost, and none is wrong."""
    models = tmp_path / "models"
    for number in range(30):
        (models / f"{number}").mkdir(parents=True)
        (models / f"{number}" / "model.safetensors").write_bytes(bytes([number]) * 100)
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [sys.executable, "-c", CACHER, str(models)]
    racers = [subprocess.Popen(words, env=environ, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    cache, seen = tmp_path / "cache/ctxext/hashes.json", 0
    while any(racer.poll() is None for racer in racers):
        if cache.exists():
            seen += bool(json.loads(cache.read_bytes())["files"])
    assert [racer.communicate()[1] for racer in racers] == [""] * 4 and seen
    files = json.loads(cache.read_bytes())["files"]
    for number in range(30):
        entry = files.get(str(models / f"{number}" / "model.safetensors"))
        assert entry is None or entry[2] == weight_hashes(models / f"{number}")["model.safetensors"]
    assert [path.name for path in cache.parent.iterdir()] == ["hashes.json"]


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param(
            command, number, marks=[] if (command, number) == ("convert", signal.SIGTERM) else pytest.mark.slow
        )
        for command in ("convert", "export", "eval")
        for number in SIGNALS
    ],
)
def test_a_process_that_ends_while_it_writes(command, number, text, tmp_path):
    """What it leaves is hidden or resumable, and does not block the same command."""
    out = tmp_path / "runs" / "out"
    words = {
        "convert": ["convert", "tiny", "--hybrid", "swa128-nope", "--no-gate"],
        "export": ["export", "tiny"],
        "eval": ["eval", "tiny", "--suite", "perplexity", "--lengths", 256, "--data", text, "--limit", 8192],
    }[command]
    # Whatever it writes first beside or in its output: the signal comes while it writes.
    begun = (lambda: (out / "outcomes").is_dir()) if command == "eval" else (lambda: any(tmp_path.glob("runs/.out*")))
    victim = begin(*words, "--out", out)
    try:
        wait_for(victim, begun)
        victim.send_signal(number)
        code, told = end(victim)
    finally:
        victim.kill()
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], told
    assert "Traceback" not in told and not (out / FILE_NAME).exists()
    if command != "eval":
        left = [path.name for path in tmp_path.glob("runs/*")] + [path.name for path in tmp_path.glob("runs/.*")]
        assert all(name.startswith(".out.partial-") for name in left)
        assert not left or number == signal.SIGKILL
    code, told = end(begin(*words, "--out", out))
    assert code == 0, told
    assert (out / FILE_NAME).is_file() and [path.name for path in out.parent.iterdir()] == ["out"]
