"""Memory of the layer planner (`convert --full-layers auto`) as a model gets deeper: one layer of it at a time.

    python benchmarks/planner_memory.py           # some twenty minutes on one CPU thread

Random Llamas of a 1B's width (TinyLlama's: 2048, 5632, 32 heads, 4 of keys, 32,000 rows of embedding), planned in a
process of their own. Held: the kernel's high-water mark of that process, less what it held before. Random weights say
nothing about which layers matter; the work and the memory do not depend on that.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arms import machine

LAYERS, LENGTH, WINDOW = (4, 22), 256, 64
WIDTH = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
         "vocab_size": 32_000}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "planner-memory-cpu.md"
GB = 10**9


def write_model(layers: int, out: Path) -> None:
    """Random weights, in fp32, beside the tokenizer of `tiny`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctxext.model.companions import copy_companions
    from ctxext.model.source import resolve

    torch.manual_seed(0)
    config = LlamaConfig(**WIDTH, num_hidden_layers=layers, max_position_embeddings=LENGTH)
    LlamaForCausalLM(config).save_pretrained(out)
    copy_companions(resolve("tiny").directory, out)


def plan_layers(model: str) -> dict[str, float]:
    """Bytes held at most beyond what importing everything takes, and the seconds."""
    from ctxext.model.convert import plan_conversion
    from ctxext.retrofit.layers import plan_request
    from ctxext.retrofit.planner import choose_layers

    plan = plan_conversion(model, "SN", sliding_window=WINDOW)
    request = plan_request(
        plan.source.shape, plan.source.kinds, plan.hybrid, LENGTH,
        budget="1", length=None, calibration=None, tokens=LENGTH, i_know=False,
    )  # fmt: skip
    before, began = high_water(), time.process_time()
    choose_layers(plan, request, device="cpu")
    return {"held": high_water() - before, "cpu_seconds": time.process_time() - began}


def high_water() -> int:
    """Bytes of this process's resident set at most, since it began (getrusage's goes on from the parent's)."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    if model := parser.parse_args().plan:
        print(json.dumps(plan_layers(model)))
        return
    lines = [f"One layer to stay full is chosen. {machine()}.", ""]
    lines += ["| layers | weights, GB | held at most, GB | CPU seconds |", "|---|---|---|---|"]
    for layers in LAYERS:
        place = Path(tempfile.mkdtemp(prefix="planner-"))
        try:
            write_model(layers, place)
            weights = sum(file.stat().st_size for file in place.glob("*.safetensors"))
            command = [sys.executable, __file__, "--plan", str(place)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
        finally:
            shutil.rmtree(place)
        row = f"| {layers} | {weights / GB:.2f} | {found['held'] / GB:.2f} | {found['cpu_seconds']:.0f} |"
        lines.append(row)
        print(row, flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
