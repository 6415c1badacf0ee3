"""Bytes of the cache and tokens a second of decoding against the tokens before: a source and its conversions.

    python benchmarks/decode.py                        # 1k to 64k; writes benchmarks/results/decode-*
    python benchmarks/decode.py --lengths 1k,4k --repetitions 2 --out elsewhere

One process, one random model (8 layers x 384, 6 heads of 64; on a GPU llama2-7b's attention in 8 layers), fp32 on a
CPU and bf16 on a GPU, one row. Each layout is run in stock transformers (SDPA, DynamicCache) and in ctxext (its
attention, and a cache with room reserved). The cache is filled with random keys and values, not by a prefill: what a
step costs does not depend on them, and a prefill at 64k would take most of the time. Bytes are those of the tensors
that the cache holds, counted, not computed; speed is the median over repetitions, in turns, of `STEPS` greedy steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from ctxext.cli import console
from ctxext.model.attention import register
from ctxext.model.companions import copy_companions
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.decode import reserved_cache
from ctxext.model.source import resolve
from ctxext.units import format_tokens, parse_tokens

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
         "num_key_value_heads": 6}  # fmt: skip
LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32,
         "num_key_value_heads": 32}  # fmt: skip
LAYOUTS = ("source", "swa128-nope", "rnope-swa4096", "swa128 everywhere")
STEPS, WARM = 16, 2


@torch.inference_mode()
def filled(model: Any, T: int, ours: bool) -> DynamicCache:
    """A cache as after T tokens: ctxext's reserves room for the steps to come."""
    config = model.config
    cache = reserved_cache(config, T + WARM + STEPS) if ours else DynamicCache(config=config)
    D = config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, T, D)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in "kv"), layer)
    return cache


def held(cache: DynamicCache) -> int:
    """Bytes of the tensors in it, with what stands behind their views."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))  # not views


@torch.inference_mode()
def decode(model: Any, cache: DynamicCache, steps: int) -> float:
    """Seconds of a greedy step, one row."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def build(scratch: Path, shape: dict[str, int], longest: int) -> dict[str, Path]:
    """The directories of the layouts."""
    config = LlamaConfig(**shape, vocab_size=32_000, max_position_embeddings=longest + 1024)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(scratch / "source")
    copy_companions(resolve("tiny").directory, scratch / "source")
    found = {"source": scratch / "source"}
    for name, window in zip(LAYOUTS[1:], (None, None, 128), strict=True):
        out = scratch / name.replace(" ", "-")
        pattern = "S" if window else name
        run_conversion(plan_conversion(str(found["source"]), pattern, out=out, sliding_window=window), gate=False)
        found[name] = out
    return found


def measure(directories: dict[str, Path], lengths: list[int], repetitions: int, device: str) -> dict[str, Any]:
    """{row: {T: [tokens/s, bytes]}}."""
    models = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for layout, directory in directories.items():
        for engine, name in (("transformers", "sdpa"), ("ctxext", register())):
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=name)
            models[f"{layout}, {engine}"] = model.to(device).eval()
    results: dict[str, Any] = {row: {} for row in models}
    for T in lengths:
        seconds: dict[str, list[float]] = {row: [] for row in models}
        sizes = {}
        for _ in range(repetitions):
            for row, model in models.items():
                cache = filled(model, T, row.endswith("ctxext"))
                decode(model, cache, WARM)
                seconds[row].append(decode(model, cache, STEPS))
                sizes[row] = held(cache)
        for row in models:
            results[row][T] = [1 / statistics.median(seconds[row]), sizes[row]]
        console.say(f"T = {T:,}: " + ", ".join(f"{row} {results[row][T][0]:.1f}/s" for row in models))
    return results


def table(results: dict[str, Any], title: str) -> str:
    lengths = list(next(iter(results.values())))
    lines = [title, "", "| tokens a second, MiB of cache | " + " | ".join(format_tokens(T) for T in lengths) + " |"]
    lines.append("|---|" + "---|" * len(lengths))
    for row, cells in results.items():
        lines.append(f"| {row} | " + " | ".join(f"{v:.1f}, {b / 2**20:.1f}" for v, b in cells.values()) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], title: str, target: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for number, (row, cells) in enumerate(results.items()):
        style = {
            "marker": "osD^"[number // 2],
            "linestyle": "--" if number % 2 == 0 else "-",
            "color": f"C{number // 2}",
        }
        for axes, index, unit in zip(panels, (0, 1), (1.0, 2.0**20), strict=True):
            axes.plot(list(cells), [cell[index] / unit for cell in cells.values()], label=row, **style)
    for axes, name in zip(panels, ("tokens a second", "MiB of cache"), strict=True):
        axes.set(xscale="log", yscale="log", title=name, xlabel="tokens before")
        axes.set_xticks(list(cells), [format_tokens(T) for T in cells])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.suptitle(title, fontsize=8)
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1k,2k,4k,8k,16k,32k,64k")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    console.quiet_libraries()
    gpu = torch.cuda.is_available()
    lengths = [parse_tokens(part) for part in options.lengths.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        directories = build(Path(scratch), LARGE if gpu else SMALL, max(lengths))
        results = measure(directories, lengths, options.repetitions, "cuda" if gpu else "cpu")
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    title = f"Greedy decoding of one row, {'bf16' if gpu else 'fp32'}, {machine}, medians of {options.repetitions} "
    title += f"x {STEPS} steps, torch {torch.__version__}, transformers {transformers.__version__}."
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"decode-{'cuda' if gpu else 'cpu'}.json"
    path.write_text(json.dumps({"title": title, "results": results}, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(text := table(results, title), "utf-8")
    plot(results, title, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
