"""Predicted against measured: the memory that a rank of ZeRO holds, over stages and what trains, two ranks on the CPU.

    python benchmarks/zero_memory.py   # ten minutes on two cores; writes results/zero-memory-cpu.md

Seen from outside: `ctxext finetune --zero N --nproc 2` of a random llama-shaped model, as a user types it. When a rank
has made its second step the kernel's high-water mark of its resident set is set back (proc(5), clear_refs), and read
after the fourth. The same is done with a model of next to no size; the difference of the two is what is compared, so
that interpreter, libraries and communication, which are in both, fall out. Blocks of 64 KiB and more are mapped afresh
(glibc), so that the mark is that of what is held. The larger of the two ranks counts. Predicted is the difference of
the two plans.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from arms import machine

RESULTS = Path(__file__).parent / "results" / "zero-memory-cpu.md"
MODELS = {
    "large": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 8, "vocab_size": 16_384},
    "none": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 2048},
}  # fmt: skip
CTX, RANKS, STEPS = 512, 2, 8
FROM, TO = 2, 4  # steps between which the high-water mark is that of a step
ROWS: list[tuple[str, str, str | None]] = [  # tuning, dtype, ZeRO
    *(("full", "float32", zero) for zero in (None, "1", "2", "3")),
    *(("lora", "float32", zero) for zero in (None, "1", "2", "3")),
    *(("lora", "bfloat16", zero) for zero in (None, "1", "2", "3")),
]
FRESH_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def build_models(place: Path) -> None:
    """Both models and a text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctxext.model.companions import copy_companions
    from ctxext.model.source import resolve

    for name, sizes in MODELS.items():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=CTX)).save_pretrained(place / name)
        copy_companions(resolve("tiny").directory, place / name)
    (place / "text.txt").write_text(" ".join(str(number) for number in range(100_000)), "utf-8")


def words(place: Path, model: str, tuning: str, dtype: str, zero: str | None) -> list[str]:
    """The command, less where its output goes."""
    settings: dict[str, Any] = {"tuning": tuning, "dtype": dtype, "steps": STEPS, "global_batch_size": RANKS}
    settings |= {"validation.every_steps": "null", "attention.train": "dense", "data.source": place / "text.txt"}
    settings |= {"lora.rank": 8, "lora.alpha": 16.0} if tuning == "lora" else {}
    more = [] if zero is None else ["--zero", zero, "--nproc", str(RANKS)]
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [
        str(Path(sys.executable).with_name("ctxext")),
        "finetune",
        str(place / model),
        "--ctx",
        str(CTX),
        *sets,
        *more,
    ]


def predicted(command: list[str]) -> int:
    """Bytes of a rank as the command's own plan has them, but for the constant."""
    done = subprocess.run([*command, "--plan", "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    memory: dict[str, int] = json.loads(done.stdout)["memory"]
    return sum(size for name, size in memory.items() if name not in ("runtime", "total"))


def measured(command: list[str], out: Path) -> int:
    """Bytes that the largest of the ranks held at most between two steps, beginning with nothing."""
    with (out.parent / "log.txt").open("w+") as log:
        process = subprocess.Popen([*command, "--out", str(out)], env=os.environ | FRESH_BLOCKS, stdout=log, stderr=log)
        try:
            wait(out, FROM, process, log)
            ranks = trainers(process.pid)
            for rank in ranks:
                Path(f"/proc/{rank}/clear_refs").write_text("5")
            wait(out, TO, process, log)
            held = max(high_water(rank) for rank in ranks)
        finally:
            process.wait()
    return held


def wait(run: Path, step: int, process: subprocess.Popen[bytes], log: Any) -> None:
    """Until a run has told of a step."""
    lines = run / "metrics.jsonl"
    while not lines.exists() or len(lines.read_text("utf-8").splitlines()) < step:
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"it ended before step {step}:\n{log.read()[-3000:]}")
        time.sleep(0.005)


def trainers(launcher: int) -> list[int]:
    """The processes that train: the ranks a launcher started, or itself."""
    children = psutil.Process(launcher).children(recursive=True)
    return [child.pid for child in children if "LOCAL_RANK" in child.environ()] or [launcher]


def high_water(process: int) -> int:
    """Bytes of its resident set at most since the mark was set back."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    lines = [
        f"What a rank holds of {CTX}-token rows, MiB beyond the same with a model of next to no size; {RANKS} ranks, "
        f"or one process without ZeRO. {machine()}. How it was measured: benchmarks/zero_memory.py.",
        "",
        "| trains | dtype | ZeRO | measured | predicted | |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        build_models(place)
        for number, (tuning, dtype, zero) in enumerate(ROWS):
            held, meant = [0, 0], [0, 0]
            for index, model in enumerate(MODELS):
                command = words(place, model, tuning, dtype, zero)
                meant[index] = predicted(command)
                held[index] = measured(command, place / f"run-{number}-{model}")
            found, planned = (pair[0] - pair[1] for pair in (held, meant))
            row = f"| {'all weights' if tuning == 'full' else 'LoRA, embeddings, norms'} | {dtype} | {zero or 'none'} "
            row += f"| {found / 2**20:,.0f} | {planned / 2**20:,.0f} | {planned / found - 1:+.0%} |"
            print(row, flush=True)
            lines.append(row)
    RESULTS.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
