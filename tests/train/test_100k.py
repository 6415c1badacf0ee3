"""100k tokens are real: one whole finetune run of one step on the CPU, in a process whose memory is measured."""

import json
import resource
import subprocess
import sys

import pytest

CTX = 102_400


@pytest.mark.slow
def test_one_step_at_102400_tokens_in_under_4_gb(write_model, tmp_path):
    model = write_model(tmp_path / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    (tmp_path / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * (CTX // 50))
    ctxext = [sys.executable, "-c", "from ctxext.cli import main; main()"]
    subprocess.run(
        [*ctxext, "convert", str(model), "--hybrid", "swa128-nope", "--out", "hybrid"], cwd=tmp_path, check=True
    )
    command = ["finetune", "hybrid", "--ctx", "100k", "--preset", "smoke", "--steps", "1", "--data", "text.txt"]
    subprocess.run([*ctxext, *command, "--out", "run"], cwd=tmp_path, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["tokens"] == CTX
    assert peak < 4 * 1024**3, f"{peak / 1024**3:.2f} GiB"
