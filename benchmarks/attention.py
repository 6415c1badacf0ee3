"""Time and memory of ctxext's attention against the ways it is usually done: one process, repetitions interleaved.

    python benchmarks/attention.py                    # everything for this machine; writes benchmarks/results/
    python benchmarks/attention.py --lengths 4k,32k --dtype bfloat16 --out elsewhere

Batch 1, 8 heads of 64; forward alone without gradients, then forward and backward. Rows:

    S², ctxext                     G = T / 4, grouped views; and with G fixed, for how it grows in T
    S² + first token, ctxext       the same, and every query sees the first token (attention.sinks=1)
    S², roll + masked SDPA         the same rolled, under a mask that undoes what the roll wraps around
    S², roll + eager (leaks)       LongLoRA's way without FlashAttention, written from its description: a plain triangle
                                   after the roll, so the first G / 2 tokens of half the heads see the last G / 2, a
                                   leak of the future that is kept because it is part of what it costs
    sliding 128, ctxext            128 keys, the query's own included
    sliding 128, transformers      its sdpa attention under its T x T mask
    sliding 128, FlexAttention     as its documentation has it, compiled; on a CPU it has no backward
    dense causal SDPA              torch's kernel
    on a GPU also                  ctxext's other backends, and packed documents of 512 to 7,680 tokens

Masks are made before the clock starts, since a model makes them once for all layers; their memory counts. What needs
more memory than there is, by a formula beside each row, is not run.

Memory is what was held at most beyond the inputs: the allocator's peak on a GPU; on a CPU the largest rise of the
process's resident set, sampled every 2 ms in a repetition of its own, with every block of 64 KiB or more mapped afresh
so that nothing is reused unseen (glibc).
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure_attention
import report_attention
import torch
import transformers
from measure_attention import Attention, Cell, D, H, Way
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from ctxext.ops.backends import blocked, choice
from ctxext.ops.masks import Pattern, document_starts
from ctxext.units import parse_tokens

WINDOW, FIXED_GROUP = 128, 2048
DOCUMENTS = (1024, 3072, 512, 7680, 4096)  # tokens of each, over and over
LENGTHS = {"cpu": "4k,8k,16k,32k", "cuda": "16k,32k,64k,128k,256k"}
LONGEST_FP32_GPU = 32 * 1024


def roll_half(x: Tensor, shift: int) -> Tensor:
    """[1, H, T, D] with the second half of the heads rolled along the tokens."""
    return torch.cat((x[:, : H // 2], x[:, H // 2 :].roll(shift, 2)), 1)


def grouped(x: Tensor, G: int) -> Tensor:
    """[1, H, T, D] -> [T / G, H, G, D]."""
    return x.unflatten(2, (-1, G))[0].transpose(0, 1)


def s2_masked_roll(like: Tensor) -> Attention:
    T, G = like.shape[2], like.shape[2] // 4
    mask = torch.ones(T // G, H, G, G, dtype=torch.bool, device=like.device).tril_()
    mask[-1, H // 2 :, G // 2 :, : G // 2] = False  # what was rolled to the end does not see the tokens before it

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (grouped(roll_half(x, -(G // 2)), G) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return roll_half(out.transpose(0, 1).flatten(1, 2)[None], G // 2)

    return attention


def s2_eager_roll(like: Tensor) -> Attention:
    G = like.shape[2] // 4
    triangle = torch.full((G, G), float("-inf"), device=like.device, dtype=like.dtype).triu(1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (grouped(roll_half(x, -(G // 2)), G) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * D**-0.5 + triangle).softmax(-1, dtype=torch.float32).to(q.dtype)
        return roll_half((weights @ v).transpose(0, 1).flatten(1, 2)[None], G // 2)

    return attention


def sliding_transformers(like: Tensor) -> Attention:
    T, function = like.shape[2], sliding_window_causal_mask_function(WINDOW)
    mask = sdpa_mask(1, T, T, mask_function=function, local_size=WINDOW, device=like.device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention_forward(torch.nn.Module(), q, k, v, mask)[0].transpose(1, 2)

    return attention


def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < WINDOW)


compiled_flex = torch.compile(flex_attention, dynamic=False)
compiled_block_mask = torch.compile(create_block_mask, dynamic=False)


def sliding_flex(like: Tensor) -> Attention:
    T = like.shape[2]
    mask = compiled_block_mask(seen, None, None, T, T, device=like.device.type)
    return partial(compiled_flex, block_mask=mask)


def dense(like: Tensor) -> Attention:
    return partial(scaled_dot_product_attention, is_causal=True)


def s2_pattern(T: int) -> Pattern:
    return Pattern(group_size=T // 4)


def s2_sink_pattern(T: int) -> Pattern:
    return Pattern(group_size=T // 4, sink_tokens=1)


def fixed_pattern(T: int) -> Pattern:
    return Pattern(group_size=FIXED_GROUP)


def sliding_pattern(T: int) -> Pattern:
    return Pattern(sliding_window=WINDOW)


def here(pattern: Callable[[int], Pattern], like: Tensor) -> Attention:
    """ctxext's attention on a CPU, and one of its backends on a GPU."""
    return partial(blocked.attention, pattern=pattern(like.shape[2]))


def by_backend(pattern: Callable[[int], Pattern], backend: str, like: Tensor) -> Attention:
    return partial(choice.attention, pattern=pattern(like.shape[2]), backend=backend)


def packed(backend: str, like: Tensor) -> Attention:
    """Dense attention inside documents; where they start is kept on the CPU, as the data loader has it."""
    T, bounds = like.shape[2], [0]
    while bounds[-1] < T:
        bounds.append(bounds[-1] + DOCUMENTS[(len(bounds) - 1) % len(DOCUMENTS)])
    starts = document_starts(bounds[:-1], T)
    return partial(choice.attention, pattern=Pattern(), document_starts=starts, backend=backend)


def roll_mask_bytes(T: int, item: int, backward: bool) -> int:
    """H T G booleans, and the copy in q's dtype that SDPA adds to the scores."""
    return H * T * (T // 4) * (1 + item)


def eager_bytes(T: int, item: int, backward: bool) -> int:
    """H T G scores: three fp32 copies in the backward, and two more in bf16 where they are converted."""
    copies = {(4, False): 8, (4, True): 12, (2, False): 10, (2, True): 16}[item, backward]
    return H * T * (T // 4) * copies


def square_mask_bytes(T: int, item: int, backward: bool) -> int:
    """T x T booleans, and the copy in q's dtype that SDPA adds to the scores; made from three sets of booleans."""
    return T * T * max(3, 1 + item)


def ways(device: str) -> dict[str, Way]:
    """The rows, those of one pattern together."""
    rows = {
        "S², ctxext": Way(partial(here, s2_pattern), "S²"),
        "S² + first token, ctxext": Way(partial(here, s2_sink_pattern), "S²"),
        "S², roll + masked SDPA": Way(s2_masked_roll, "S²", roll_mask_bytes),
        "S², roll + eager (leaks)": Way(s2_eager_roll, "S²", eager_bytes),
        f"S², G = {FIXED_GROUP:,} (fixed), ctxext": Way(partial(here, fixed_pattern), "S² fixed"),
        "sliding 128, ctxext": Way(partial(here, sliding_pattern), "sliding"),
        "sliding 128, transformers": Way(sliding_transformers, "sliding", square_mask_bytes),
        "sliding 128, FlexAttention": Way(sliding_flex, "sliding", compiles=True),
        "dense causal SDPA": Way(dense, "dense"),
    }
    if device == "cuda":
        for backend in ("varlen", "flex"):
            compiles = backend == "flex"
            rows[f"S², ctxext {backend}"] = Way(partial(by_backend, s2_pattern, backend), "S²", compiles=compiles)
            name = f"sliding 128, ctxext {backend}"
            rows[name] = Way(partial(by_backend, sliding_pattern, backend), "sliding", compiles=compiles)
        for backend in ("blocked", "varlen", "flex"):
            name = f"documents, ctxext {backend}"
            rows[name] = Way(partial(packed, backend), "documents", compiles=backend == "flex")
    return dict(sorted(rows.items(), key=lambda row: list(report_attention.COLOURS).index(row[1].family)))


def machine(device: str) -> str:
    """What ran it, without the name of the host."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text("utf-8"), re.MULTILINE) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help="such as 4k,32k")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="one of them; both otherwise")
    parser.add_argument("--repetitions", type=int, default=5, help="at most; slow rows get fewer, the tables say so")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a directory")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [parse_tokens(part) for part in (options.lengths or LENGTHS[device]).split(",")]
    dtypes = [options.dtype] if options.dtype else ["float32", "bfloat16"]
    torch.manual_seed(0)
    rows = ways(device)
    header = (
        f"{H} heads of {D}, batch 1, on {machine(device)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}."
    )
    roofs = (measure_attention.copy_bandwidth(), measure_attention.matmul_flops()) if device == "cuda" else None
    results: report_attention.Results = {(dtype, backward): {} for dtype in dtypes for backward in (False, True)}
    options.out.mkdir(parents=True, exist_ok=True)
    for T in lengths:
        for (dtype, backward), by_length in results.items():
            if device == "cuda" and dtype == "float32" and T > LONGEST_FP32_GPU and options.dtype is None:
                continue
            tensors = measure_attention.inputs(T, getattr(torch, dtype), device)
            by_length[T] = measure_attention.measure(rows, tensors, backward, options.repetitions)
            print(f"T = {T:,}, {dtype}, {'forward + backward' if backward else 'forward'}:", file=sys.stderr)
            for name, cell in by_length[T].items():
                print(f"    {name}: {shown(cell)}", file=sys.stderr, flush=True)
        text = report_attention.report(header, rows, results, roofs)
        (options.out / f"attention-{device}.md").write_text(text, "utf-8")  # after each length: a run may be cut short
    report_attention.plot(options.out / f"attention-{device}.png", header, rows, results)
    print(text)


def shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell.seconds:.4f} s, {cell.memory / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
