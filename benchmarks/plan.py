"""Predicted against measured: peak memory and seconds of a step, over configurations on the CPU.

    ctxext plan tiny --calibrate                # once, on a machine as quiet as it can be
    python benchmarks/plan.py                   # every row of ROWS; writes benchmarks/results/plan-cpu.{jsonl,md}
    python benchmarks/plan.py --only 3,7        # some rows; the others of the .jsonl are kept

Each row is a random llama-shaped model through the real training loop (run_finetune), one thread, in processes of its
own, two a row:

    time    process CPU seconds from step to step, the median (one thread: what a quiet machine's clock would say)
    memory  the kernel's high-water mark of the resident set over steps 3 and 4, less what the process held before the
            model, when a step of `tiny` had imported everything. Blocks of 64 KiB and more are mapped afresh (glibc),
            so that the mark is that of what is held, not of what the allocator keeps for later; not timed. The last
            column is the mark of the timed process, whose malloc is as it comes.

The prediction is `ctxext plan`'s with the stored calibration, without the item `runtime`, which is in neither number.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
              "num_key_value_heads": 8, "vocab_size": 4096},
    "wide": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 2, "vocab_size": 8192},
}  # fmt: skip
LAYOUTS = {"F": None, "SN": "swa128-nope", "SSSN": "SSSN"}
DENSE, S2 = {"train": "dense"}, {"train": "s2"}
NONE: dict[str, Any] = {"checkpoint": False}
ROWS: list[tuple[str, str, int, dict[str, Any]]] = [  # (shape, layout, T, fields of the spec)
    ("small", "F", 2048, {"attention": DENSE}),
    ("small", "F", 8192, {"attention": DENSE}),
    ("small", "F", 4096, {"attention": S2}),
    ("small", "F", 8192, {"attention": S2}),
    ("small", "F", 2048, {"attention": S2, "memory": NONE}),
    ("small", "F", 4096, {"attention": S2, "memory": {"checkpoint": 3}}),
    ("small", "F", 8192, {"attention": S2, "memory": {"tiles": 2048}}),
    ("small", "F", 4096, {"attention": DENSE, "memory": {"keep": "attention"}}),
    ("small", "F", 2048, {"attention": DENSE, "tuning": "full"}),
    ("small", "SN", 4096, {"attention": DENSE}),
    ("small", "SN", 8192, {"attention": S2}),
    ("small", "SN", 8192, {"attention": S2, "memory": {"tiles": 1024}}),
    ("small", "SSSN", 8192, {"attention": DENSE, "memory": {"tiles": 2048}}),
    ("wide", "F", 4096, {"attention": DENSE}),
    ("wide", "F", 4096, {"attention": S2}),
    ("wide", "SN", 2048, {"attention": DENSE, "memory": NONE}),
    ("wide", "SSSN", 4096, {"attention": DENSE, "tuning": "full"}),
    ("wide", "SSSN", 4096, {"attention": S2, "memory": {"tiles": 1024}}),
    ("small", "SN", 4096, {"attention": DENSE, "dtype": "bfloat16"}),
    ("wide", "F", 4096, {"attention": S2, "dtype": "bfloat16"}),
    ("wide", "SSSN", 4096, {"attention": DENSE, "dtype": "bfloat16"}),
]
STEPS = {"time": 6, "memory": 4}
SETTLED = 2  # the first step makes the optimizer's moments, and is followed by a checkpoint
FRESH_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def spec_of(row: int) -> dict[str, Any]:
    T, fields = ROWS[row][2:]
    return {"ctx": T, "global_batch_size": 1, "lora": {"rank": 8, "alpha": 16.0}, "validation": {"every_steps": None},
            **fields}  # fmt: skip


def build_models(place: Path) -> None:
    """Every model of ROWS, and one long document, as files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctxext.model.companions import copy_companions
    from ctxext.model.convert import plan_conversion, run_conversion
    from ctxext.model.source import resolve

    for shape, sizes in SHAPES.items():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16_384)).save_pretrained(place / f"{shape}-F")
        copy_companions(resolve("tiny").directory, place / f"{shape}-F")
        for layout, hybrid in LAYOUTS.items():
            if hybrid is not None:
                window = {} if hybrid != "SSSN" else {"sliding_window": 256}
                out = place / f"{shape}-{layout}"
                run_conversion(plan_conversion(str(place / f"{shape}-F"), hybrid, out=out, **window), gate=False)
    (place / "text.txt").write_text(" ".join(str(number) for number in range(100_000)), "utf-8")


def worker(row: int, what: str, place: Path) -> None:
    """One row in this process; prints what was measured as JSON."""
    import torch

    torch.set_num_threads(1)
    from ctxext.cli import console
    from ctxext.config.loader import build
    from ctxext.model.source import resolve
    from ctxext.train.finetune import run_finetune
    from ctxext.train.finetune_spec import FinetuneSpec
    from ctxext.train.loop import Events
    from ctxext.train.run_directory import start_run
    from ctxext.train.run_plan import plan_run

    console.quiet_libraries()
    run, long = place / f"run-{row}-{what}", {"steps": STEPS[what], "data": {"source": str(place / "text.txt")}}
    shape, layout = ROWS[row][:2]
    tiny = build(FinetuneSpec, spec_of(row) | long | {"ctx": 64, "steps": 1, "memory": {}}, source="benchmark")
    warm = place / f"warm-{row}-{what}"  # all that is imported and made once is there afterwards
    start_run(plan_run(resolve("tiny"), tiny), warm)
    run_finetune(plan_run(resolve("tiny"), tiny), warm, events=Events())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, ends = resident("VmRSS"), list[float]()

    def on_step(metrics: Any) -> None:
        ends.append(time.process_time())
        if metrics.step == SETTLED:
            Path("/proc/self/clear_refs").write_text("5")  # the mark starts from what is held now (proc(5))
        if metrics.step == STEPS[what]:
            spans = [after - at for at, after in zip(ends[SETTLED - 1 :], ends[SETTLED:], strict=False)]
            print(json.dumps({"peak": resident("VmHWM") - before, "before": before, "seconds": spans}), flush=True)

    plan = plan_run(
        resolve(str(place / f"{shape}-{layout}")), build(FinetuneSpec, spec_of(row) | long, source="benchmark")
    )
    start_run(plan, run)
    run_finetune(plan, run, events=Events(lambda line: None, on_step))


def resident(field: str) -> int:
    """Bytes of VmRSS, what is resident, or VmHWM, the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(row: int, place: Path) -> dict[str, Any]:
    """Both processes of a row."""
    found: dict[str, Any] = {}
    for what in STEPS:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (FRESH_BLOCKS if what == "memory" else {})
        command = [sys.executable, __file__, "--worker", str(row), what, str(place)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise SystemExit(f"row {row}, {what}: {done.stderr[-3000:]}")
        found[what] = json.loads(lines[-1])
    return {
        "seconds": statistics.median(found["time"]["seconds"]),
        "memory": found["memory"]["peak"],
        "plain_malloc": found["time"]["peak"],
        "runtime": found["memory"]["before"],
    }


def predict(row: int, place: Path) -> dict[str, Any]:
    """Seconds and bytes as `ctxext plan` has them, and the largest items."""
    from ctxext.config.loader import build
    from ctxext.model.source import resolve
    from ctxext.planning.calibrate import stored
    from ctxext.planning.time import estimate
    from ctxext.train.finetune_spec import FinetuneSpec
    from ctxext.train.run_plan import plan_run

    shape, layout = ROWS[row][:2]
    spec = build(FinetuneSpec, spec_of(row) | {"steps": STEPS["time"]}, source="benchmark")
    plan = plan_run(resolve(str(place / f"{shape}-{layout}")), spec, gpu=False)
    calibration = stored(plan.dtype, gpu=False)
    if calibration is None:
        raise SystemExit("this machine was not calibrated: OMP_NUM_THREADS=1 ctxext plan tiny --calibrate")
    memory = {name: size for name, size in plan.memory.items() if name != "runtime"}
    rates = calibration.as_rates()
    return {"predicted_seconds": estimate(plan, rates).seconds, "predicted_memory": sum(memory.values()),
            "items": memory, "calibration": rates.source}  # fmt: skip


def table(rows: dict[int, dict[str, Any]]) -> str:
    """The committed page: every row, and how many are within the targets."""
    lines = [
        f"Predicted against measured, CPU seconds of one thread and MiB beyond what the process held before the model. "
        f"Predicted with {rows[min(rows)]['calibration']}. How it was measured: benchmarks/plan.py.",
        "",
        "| | seconds a step | predicted | | MiB | predicted | | MiB resident, plain malloc |",
        "|---|---|---|---|---|---|---|---|",
    ]
    errors = {"time": list[float](), "memory": list[float]()}
    for row, found in sorted(rows.items()):
        shape, layout, T, fields = ROWS[row]
        words = ", ".join(f"{name} {value}" for name, value in flat(fields).items())
        ratios = {"time": found["predicted_seconds"] / found["seconds"],
                  "memory": found["predicted_memory"] / found["memory"]}  # fmt: skip
        for what, ratio in ratios.items():
            errors[what].append(abs(ratio - 1))
        lines.append(
            f"| {shape} {layout}, T = {T:,}, {words} | {found['seconds']:.2f} | {found['predicted_seconds']:.2f} "
            f"| {ratios['time'] - 1:+.0%} | {found['memory'] / 2**20:,.0f} | {found['predicted_memory'] / 2**20:,.0f} "
            f"| {ratios['memory'] - 1:+.0%} | {found['plain_malloc'] / 2**20:,.0f} |"
        )
    lines.append("")
    for what, most in (("memory", 0.15), ("time", 0.25)):
        within = sum(error <= most for error in errors[what])
        worst, median = max(errors[what]), statistics.median(errors[what])
        lines.append(
            f"- {what}: {within} of {len(rows)} within {most:.0%}, median {median:.0%} off, the worst {worst:.0%}"
        )
    return "\n".join(lines) + "\n"


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """A row's fields by their own names; `train` is the attention."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value) if isinstance(value, dict) else {name: value}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows by number, such as 3,7 [default: all]")
    parser.add_argument("--predict", action="store_true", help="measure nothing, predict what was measured anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    path = options.out / "plan-cpu.jsonl"
    known = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    rows: dict[int, dict[str, Any]] = {entry["row"]: entry for entry in known}
    wanted = [int(row) for row in options.only.split(",")] if options.only else list(range(len(ROWS)))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        build_models(place)
        for row in wanted:
            measured = {} if options.predict else measure(row, place)
            if measured or row in rows:
                rows[row] = rows.get(row, {}) | {"row": row, "what": ROWS[row]} | measured | predict(row, place)
                path.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)), "utf-8")
    text = table({row: found for row, found in rows.items() if "predicted_seconds" in found})
    path.with_suffix(".md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        main()
