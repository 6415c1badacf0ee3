"""How long a command takes before it works: help, a plan, a refusal, beside Python alone and an import of torch.

    python benchmarks/startup.py                       # a minute; writes benchmarks/results/startup-cpu.md
    python benchmarks/startup.py --repetitions 3 --out elsewhere

Every row is a process of its own, started `--repetitions` times in turns with the others, after one that is not
counted. Wall-clock time of the whole process, and the CPU time of its user code; medians, and the least.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arms import table

PYTHON = {"python -c pass": "pass", "python -c 'import torch'": "import torch"}
CTXEXT = (
    "--help",
    "plan --help",
    "plan llama2-7b --ctx 100k --gpu h100",
    "plan llama2-70b --ctx 64k --gpu h200 --gpus 8",
    "convert missing/ --hybrid full",  # refused
)
ROWS = {name: [sys.executable, "-c", code] for name, code in PYTHON.items()}
ROWS |= {f"ctxext {arguments}": [sys.executable, "-m", "ctxext", *arguments.split()] for arguments in CTXEXT}


def once(command: list[str], place: str) -> tuple[float, float]:
    """Seconds of the clock, and of the processor in user code."""
    before, began = os.times().children_user, time.perf_counter()
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    took = time.perf_counter() - began, os.times().children_user - before
    if done.returncode not in (0, 2) or "Traceback" in done.stderr:
        sys.exit(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as place:
        for repetition in range(options.repetitions + 1):
            for name, command in ROWS.items():
                took = once(command, place)
                if repetition:
                    times[name].append(took)
    rows = []
    for name, each in times.items():
        wall, user = zip(*each, strict=True)
        shown = [f"{value:.2f} s" for value in (statistics.median(wall), min(wall), statistics.median(user), min(user))]
        rows.append([f"`{name}`", *shown])
    about = (
        f"Medians and the least of {options.repetitions}, in turns; {os.cpu_count()} CPU cores "
        f"({platform.machine()}), Python {platform.python_version()}. How it was measured: benchmarks/startup.py."
    )
    text = "\n".join([about, "", *table(["", "clock", "least", "user CPU", "least"], rows)])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "startup-cpu.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
