"""Seconds and bytes of a training step: ctxext against transformers + PEFT as a user would write it.

    python benchmarks/train.py                       # everything for this machine; writes benchmarks/results/
    python benchmarks/train.py --lengths 4k --repetitions 1 --out elsewhere

One process, one random model (8 layers x 384, 6 heads of 64, SwiGLU 1,024, vocabulary 32,000 untied, frozen head; on a
GPU llama2-7b's shape), one sequence a step, LoRA of rank 8 on q, k, v, o, embeddings and norms trained, AdamW. Rows:

    transformers + PEFT, dense             LlamaForCausalLM, SDPA, gradient checkpointing, the loss from logits
    transformers + PEFT, S² masked roll    the same; S²-Attn as a roll, SDPA under a mask that undoes its wrap, a roll
    transformers + PEFT, swa128-nope       the converted layout in stock SmolLM3, SDPA under its masks
    ctxext, ...                            plain S² (G = T / 4); swa128-nope with S² or dense full layers; with tiles

Memory is what a step holds at most beyond the weights (peak.py), taken in its first run, which is no repetition: the
optimizer's moments of the trained weights are in it, alike in all rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peak import held_at_most
from peft import LoraConfig, get_peft_model
from report_train import plot, verdicts
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ctxext.cli import console
from ctxext.config.loader import build
from ctxext.data.packing import Packed
from ctxext.model.companions import copy_companions
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import resolve
from ctxext.train import recompute
from ctxext.train.engine import LocalEngine
from ctxext.train.finetune import _model, training_device
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import forward_backward
from ctxext.train.run_plan import plan_run
from ctxext.units import format_tokens, parse_tokens

SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
         "num_key_value_heads": 6}  # fmt: skip
LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32}  # fmt: skip
TRAINED_LENGTH, TILE, BUDGET = 4096, 4096, 60.0  # tokens; tokens; seconds for the repetitions of one row
LENGTHS = {"cpu": "4k,16k,32k", "cuda": "16k,32k,100k"}
BASELINE = "transformers + PEFT, dense"
LONGEST_ALL = 16 * 1024  # tokens; beyond, on a CPU, a step of one of SLOWEST takes minutes, and they are left out
SLOWEST = ("transformers + PEFT, S² masked roll", "transformers + PEFT, swa128-nope", "ctxext, dense")
Step = Callable[[], float]


def stock(directory: Path, T: int, attention: str, device: torch.device, dtype: torch.dtype) -> Step:
    """One step as the libraries' own examples have it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).to(device)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    norms = [name for name, module in model.named_modules() if name.endswith("norm")]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                        modules_to_save=["model.embed_tokens", *norms], task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, fused=True)
    ids = tokens(T).to(device)[None]

    def step() -> float:
        return timed(device, lambda: (model(input_ids=ids, labels=ids).loss.backward(), optimizer.step(),
                                      optimizer.zero_grad()))  # fmt: skip

    return step


def ours(directory: Path, T: int, device: torch.device, **fields: Any) -> Step:
    """One step of ctxext's loop, as its spec says."""
    given = {"ctx": T, "global_batch_size": 1, "steps": 10, "lora": {"rank": 8, "alpha": 16.0}, **fields}
    plan = plan_run(resolve(str(directory)), build(FinetuneSpec, given, source="benchmark"))
    model = _model(plan, *training_device(plan))
    recompute.enable(model, plan.spec.memory, plan.patterns)
    engine = LocalEngine(model, plan.spec.optimizer)
    engine.model.train()
    ids = tokens(T)
    packed = Packed(ids, torch.zeros(T, dtype=torch.int64), ids.roll(-1))

    def step() -> float:
        return timed(device, lambda: (forward_backward(engine, [packed], plan, 0), engine.step(1.0)))

    return step


def tokens(T: int) -> Tensor:
    return torch.randint(3, 32_000, (T,), generator=torch.Generator().manual_seed(T))


def timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 4096) -> float:
    """FLOPs a second of a matrix product of n x n, the best of five."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind()
    return max(2 * n**3 / timed(device, lambda: a @ b) for _ in range(5))


@lru_cache(maxsize=1)
def roll_mask(T: int, H: int, device: torch.device) -> Tensor:
    """[4, H, G, G]: causal in each group; what the roll carried to the end does not see the tokens before it."""
    G = T // 4
    mask = torch.ones(4, H, G, G, dtype=torch.bool, device=device).tril()
    mask[-1, H // 2 :, G - G // 2 :, : G - G // 2] = False
    return mask


def masked_roll(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """S²-Attn, G = T / 4, [1, H, T, D]: the second half of the heads rolled by G // 2, in groups, and rolled back."""
    H, T = q.shape[1:3]

    def grouped(x: Tensor) -> Tensor:  # [4, H, G, D]
        x = torch.cat((x[:, : H // 2], x[:, H // 2 :].roll(-(T // 8), 2)), 1)
        return x.unflatten(2, (4, -1))[0].transpose(0, 1)

    out = scaled_dot_product_attention(*map(grouped, (q, k, v)), attn_mask=roll_mask(T, H, q.device), scale=scaling)
    out = out.transpose(0, 1).flatten(1, 2)[None]
    return torch.cat((out[:, : H // 2], out[:, H // 2 :].roll(T // 8, 2)), 1).transpose(1, 2).contiguous(), None


def rows(plain: Path, hybrid: Path, T: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    s2, dense = {"attention": {"train": "s2"}}, {"attention": {"train": "dense"}}
    tiled = {"memory": {"tiles": TILE}}
    made = {
        BASELINE: partial(stock, plain, T, "sdpa", device, dtype),
        "transformers + PEFT, S² masked roll": partial(stock, plain, T, "masked_roll", device, dtype),
        "transformers + PEFT, swa128-nope": partial(stock, hybrid, T, "sdpa", device, dtype),
        "ctxext, dense": partial(ours, plain, T, device, **dense),
        "ctxext, S²": partial(ours, plain, T, device, **s2),
        "ctxext, swa128-nope, dense full layers": partial(ours, hybrid, T, device, **dense),
        "ctxext, swa128-nope + S²": partial(ours, hybrid, T, device, **s2),
        f"ctxext, swa128-nope + S², tiles of {TILE:,}": partial(ours, hybrid, T, device, **s2, **tiled),
    }
    long = device.type == "cpu" and T > LONGEST_ALL
    return {name: make for name, make in made.items() if not (long and name in SLOWEST)}


def measure(made: dict[str, Callable[[], Step]], most: int, gpu: bool) -> dict[str, tuple[float, int, int] | str]:
    """{row: (median seconds, bytes, repetitions) or why there are none}: a first run each, then all in turn.

    On a GPU each row is measured whole and let go before the next: all models together would not fit.
    """
    steps, memory, counts, results = {}, {}, {}, dict[str, Any]()
    for name, make in made.items():
        try:
            step = make()
            memory[name], first = held_at_most(step, gpu)
        except (RuntimeError, MemoryError) as error:
            results[name] = f"does not fit ({' '.join(str(error).split())[:60]})"
            continue
        steps[name], counts[name] = step, max(1, min(most, round(BUDGET / first)))
        console.say(f"{name}: first step {first:.1f} s, {memory[name] / 2**20:,.0f} MiB")
        if gpu:
            results[name] = (statistics.median(step() for _ in range(counts[name])), memory[name], counts[name])
            del step, steps[name]
            gc.collect()
            torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(most):
        for name, step in steps.items():
            if repetition < counts[name]:
                seconds[name].append(step())
    results |= {name: (statistics.median(seconds[name]), memory[name], counts[name]) for name in steps}
    return {name: results[name] for name in made}


def table(results: dict[int, dict[str, Any]], title: str) -> str:
    """Markdown: seconds, MiB, and both against the first row."""
    lines = [title, "", "| | " + " | ".join(f"T = {format_tokens(T)}" for T in results) + " |"]
    lines.append("|---|" + "---|" * len(results))
    for name in next(iter(results.values())):
        cells = []
        for of_length in results.values():
            cell, base = of_length.get(name, "not run"), of_length[BASELINE]
            if isinstance(cell, str):
                cells.append(cell)
                continue
            text = f"{cell[0]:.2f} s ({cell[2]}), {cell[1] / 2**20:,.0f} MiB"
            if name != BASELINE and not isinstance(base, str):
                text += f": {base[0] / cell[0]:.2f}x faster, {cell[1] / base[1]:.2f}x the memory"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    console.quiet_libraries()
    gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    AttentionInterface.register("masked_roll", masked_roll)  # without a mask function transformers gives no mask
    torch.manual_seed(0)
    results: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        plain, hybrid = Path(scratch) / "plain", Path(scratch) / "hybrid"
        shape = LLAMA2_7B if gpu else SMALL
        config = LlamaConfig(**shape, vocab_size=32_000, max_position_embeddings=TRAINED_LENGTH)
        LlamaForCausalLM(config).to(dtype).save_pretrained(plain)
        copy_companions(resolve("tiny").directory, plain)  # a conversion wants one; the tokens here are drawn
        run_conversion(plan_conversion(str(plain), "swa128-nope", out=hybrid), gate=False)
        for T in map(parse_tokens, (options.lengths or LENGTHS[device.type]).split(",")):
            console.say(f"T = {T:,}")
            results[T] = measure(rows(plain, hybrid, T, device, dtype), options.repetitions, gpu)
            gc.collect()
            machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
            title = (
                f"A training step of one sequence, medians (of as many repetitions), {str(dtype)[6:]}, on {machine} "
                f"({platform.machine()}), torch {torch.__version__}, transformers {transformers.__version__}."
            )
            options.out.mkdir(parents=True, exist_ok=True)
            raw = {"title": title, "baseline": BASELINE, "flops_per_second": matmul_rate(device, dtype),
                   "shape": asdict(resolve(str(plain)).shape), "results": results}  # fmt: skip
            path = options.out / f"train-{device.type}.json"
            path.write_text(json.dumps(raw, indent=1) + "\n", "utf-8")
            raw = json.loads(path.read_text("utf-8"))
            text = table(results, title) + ("" if gpu else "\n" + verdicts(raw))
            path.with_suffix(".md").write_text(text, "utf-8")
            plot(raw, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
