"""Memory of probes at 16k tokens on a 1B model's shape: the largest resident set of a process that runs one of them.

    python benchmarks/probes.py                    # some fifteen minutes on one CPU thread; writes benchmarks/results/
    python benchmarks/probes.py --length 2k --out elsewhere

2,048 wide, 32 heads of 64, 8 key heads, 8,192 in the MLP, vocabulary 128,256, random weights in bfloat16, all layers
full; 2 layers of its 16, because a CPU takes minutes for each. What 14 more layers hold is added by arithmetic: their
weights, and for gradient-influence their inputs, which it keeps. One text or question each. Linux (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arms import table

from ctxext.units import format_bytes, format_duration, parse_tokens

WIDE, HEADS, KEY_HEADS, MLP, VOCABULARY = 2048, 32, 8, 8192, 128_256
LAYERS, MEASURED = 16, 2
BYTES = 2  # of a bfloat16
PROBES: dict[str, dict[str, Any]] = {
    "attention-distance": {"lengths": [], "rows": 32},
    "retrieval-heads": {},
    "receptive-field": {"restrict": ["full"], "visible": [1024], "tokens": 1024},
    "gradient-influence": {},
}


def write_model(place: Path, length: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctxext.model.companions import copy_companions
    from ctxext.model.source import resolve

    config = LlamaConfig(
        hidden_size=WIDE, num_hidden_layers=MEASURED, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
        intermediate_size=MLP, vocab_size=VOCABULARY, max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    copy_companions(resolve("tiny").directory, place)


def one(model: str, name: str, length: int) -> dict[str, float]:
    """Seconds and the peak of this process, which is made for this."""
    import torch

    from ctxext.probes import run_probes
    from ctxext.probes.plan_probes import plan_probe

    torch.set_num_threads(1)
    fields = {"length": length, "samples": 1, "dtype": "bfloat16", **PROBES[name]}
    if "lengths" in fields:
        fields["lengths"] = [length]
    plan = plan_probe(model, [name], fields, out=Path(model) / "unused")
    began = time.monotonic()
    run_probes.measure(plan)
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held when it forked
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": time.monotonic() - began, "peak": peak * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=parse_tokens, default=16_384)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "PROBE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options.length)))
        return
    layer = BYTES * (2 * WIDE * WIDE + 2 * WIDE * WIDE * KEY_HEADS // HEADS + 3 * WIDE * MLP)
    kept = BYTES * options.length * WIDE
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place), options.length)
        for name in PROBES:
            command = [sys.executable, __file__, "--length", str(options.length), "--one", place, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            more = (LAYERS - MEASURED) * (layer + (kept if name == "gradient-influence" else 0))
            cells = [format_bytes(found["peak"]), format_bytes(found["peak"] + more), format_duration(found["seconds"])]
            rows.append([name, *cells])
            print(rows[-1], flush=True)
    import torch

    heads = ["probe", f"{MEASURED} layers, measured", f"{LAYERS} layers, by arithmetic", f"time, {MEASURED} layers"]
    about = f"{options.length:,} tokens, one text; 1 CPU thread ({platform.machine()}), torch {torch.__version__}."
    text = "\n".join(
        [about, "Largest resident set of the process, libraries and weights included.", "", *table(heads, rows)]
    )
    (options.out / "probes-cpu.md").write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
