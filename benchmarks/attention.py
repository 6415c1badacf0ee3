"""Time and memory of ctxext's attention against the ways it is usually done: one process, repetitions interleaved.

    python benchmarks/attention.py                    # fp32, T = 4k, 8k, 16k; writes benchmarks/results/
    python benchmarks/attention.py --lengths 4k,32k --dtype bfloat16

Rows: S² here (G = T / 4, grouped views); S² as a roll and masked SDPA; S² eager after a roll, LongLoRA's way without
FlashAttention, written from its description: a plain triangle after the roll, so the first G / 2 tokens of half the
heads see the last G / 2, a leak of the future that is kept because it is part of what it costs; sliding 128 here;
sliding 128 as transformers does it (SDPA under a T x T mask); dense causal SDPA. Batch 1, 8 heads of 64.

Memory is what was held at most beyond the inputs: the allocator's peak on a GPU; on a CPU the largest rise of the
process's resident set, sampled every 2 ms in a repetition of its own, with every block of 64 KiB or more mapped afresh
so that nothing is reused unseen (glibc).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxext.ops.backends import blocked
from ctxext.ops.masks import Pattern
from ctxext.units import format_tokens, parse_tokens

H, D, WINDOW = 8, 64, 128
M_MMAP_THRESHOLD = -3  # malloc.h
LARGEST_EAGER = 16 * 1024  # tokens; H T G scores and their gradients do not fit beyond
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def roll_half(x: Tensor, shift: int) -> Tensor:
    """[1, H, T, D] with the second half of the heads rolled along the tokens."""
    return torch.cat((x[:, : H // 2], x[:, H // 2 :].roll(shift, 2)), 1)


def grouped(x: Tensor, G: int) -> Tensor:
    """[1, H, T, D] -> [T / G, H, G, D]."""
    return x.unflatten(2, (-1, G))[0].transpose(0, 1)


def s2_masked_roll(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, G = q.shape[2], q.shape[2] // 4
    q, k, v = (grouped(roll_half(x, -(G // 2)), G) for x in (q, k, v))
    mask = torch.ones(T // G, H, G, G, dtype=torch.bool, device=q.device).tril()
    mask[-1, H // 2 :, G // 2 :, : G // 2] = False  # what was rolled to the end does not see the tokens before it
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return roll_half(out.transpose(0, 1).flatten(1, 2)[None], G // 2)


def s2_eager_roll(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    G = q.shape[2] // 4
    q, k, v = (grouped(roll_half(x, -(G // 2)), G) for x in (q, k, v))
    triangle = torch.full((G, G), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    weights = (q @ k.transpose(-1, -2) * D**-0.5 + triangle).softmax(-1, dtype=torch.float32).to(q.dtype)
    return roll_half((weights @ v).transpose(0, 1).flatten(1, 2)[None], G // 2)


def sliding_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    mask = (i[:, None] >= i) & (i[:, None] - i < WINDOW)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def s2_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return blocked.attention(q, k, v, Pattern(group_size=q.shape[2] // 4))


def sliding_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return blocked.attention(q, k, v, Pattern(sliding_window=WINDOW))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


METHODS: dict[str, tuple[Attention, str]] = {  # name: (attention, the row its ratio is to)
    "S², ctxext": (s2_here, "S², ctxext"),
    "S², roll + masked SDPA": (s2_masked_roll, "S², ctxext"),
    "S², roll + eager (leaks)": (s2_eager_roll, "S², ctxext"),
    "sliding 128, ctxext": (sliding_here, "sliding 128, ctxext"),
    "sliding 128, SDPA + T x T mask": (sliding_masked, "sliding 128, ctxext"),
    "dense causal SDPA": (dense, "S², ctxext"),
}


def inputs(T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output, laid out [1, T, H, D] in memory as projections are."""
    made = [torch.randn(1, T, H, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(4)]
    return [x.requires_grad_() for x in made[:3]] + [made[3]]


def step(attention: Attention, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> float:
    """Seconds of one forward and backward."""
    if q.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.autograd.grad(attention(q, k, v), (q, k, v), weight)
    if q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(attention: Attention, tensors: list[Tensor]) -> int:
    """Bytes held at most beyond what was held before, in one forward and backward."""
    gc.collect()
    if tensors[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(attention, *tensors)
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    libc.malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    seen = [before]

    def watch() -> None:
        while not done.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(attention, *tensors)
    done.set()
    watcher.join()
    libc.mallopt(M_MMAP_THRESHOLD, 32 * 1024**2)
    return max(seen) - before


def measure(T: int, dtype: torch.dtype, device: str, repetitions: int) -> dict[str, tuple[float, int]]:
    """{method: (median seconds, bytes)}; one warm-up each, then the methods in turn."""
    tensors = inputs(T, dtype, device)
    methods = {name: fn for name, (fn, _) in METHODS.items() if fn is not s2_eager_roll or T <= LARGEST_EAGER}
    memory = {name: peak_memory(attention, tensors) for name, attention in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repetitions):
        for name, attention in methods.items():
            seconds[name].append(step(attention, *tensors))
    return {name: (statistics.median(seconds[name]), memory[name]) for name in methods}


def report(lengths: list[int], results: dict[int, dict[str, tuple[float, int]]], title: str) -> str:
    """A Markdown table: seconds and MiB, and the ratio of each to ctxext's row for the same pattern."""
    lines = [title, "", "| | " + " | ".join(f"T = {format_tokens(T)}" for T in lengths) + " |"]
    lines.append("|---|" + "---|" * len(lengths))
    for name, (_, against) in METHODS.items():
        cells = []
        for T in lengths:
            if name not in results[T]:
                cells.append("does not fit")
                continue
            (seconds, memory), (base_seconds, base_memory) = results[T][name], results[T][against]
            ratio = (
                "" if name == against else f", {seconds / base_seconds:.1f}x time, {memory / base_memory:.1f}x memory"
            )
            cells.append(f"{seconds:.3f} s, {memory / 2**20:.0f} MiB{ratio}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    sliding = [results[T]["dense causal SDPA"][0] / results[T]["sliding 128, ctxext"][0] for T in lengths]
    lines += ["", "Dense against sliding 128, ctxext: " + ", ".join(f"{r:.1f}x" for r in sliding) + " the time."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4k,8k,16k")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    lengths = [parse_tokens(part) for part in options.lengths.split(",")]
    results = {}
    for T in lengths:
        results[T] = measure(T, getattr(torch, options.dtype), device, options.repetitions)
        print(f"T = {T}: " + ", ".join(f"{name} {s:.3f} s" for name, (s, _) in results[T].items()), flush=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"Forward and backward, {H} heads of {D}, batch 1, {options.dtype}, median of {options.repetitions}, "
        f"on {machine} ({platform.machine()}), torch {torch.__version__}, transformers {transformers.__version__}."
    )
    text = report(lengths, results, title)
    out = options.out or Path(__file__).parent / "results" / f"attention-{device}-{options.dtype}.md"
    out.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
