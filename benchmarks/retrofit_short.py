"""Retrofit short, test long: `tiny` made to work at 8 times its length, with and without one long sequence in training.

    python benchmarks/retrofit_short.py              # about two hours on one CPU thread; goes on where it stopped
    python benchmarks/retrofit_short.py --seeds 1 --steps 4 --out elsewhere

short    converted and healed at the ORIGINAL length alone (preset retrofit-short): SN, and SF as the control that keeps
         RoPE on the full layers
long     all layers full, positions interpolated (linear, or YaRN), trained at the long length with S²-Attn or dense
both     the conversion trained at the long length, from the text

Each at equal tokens, and the long ones again for as many steps as take the CPU time of `SN, short`. Measured with the
attention the model runs with: loss from 1 to 32 times the original length, by position, and passkeys by distance.
"""

from __future__ import annotations

import argparse
import gc
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import Row, Rows, cell, converted, keys_found, machine, middle, table, text_loss, trained

from ctxext.cli import console
from ctxext.model.load import load_model

SHORT, LONG = 512, 4096  # tokens
LENGTHS = tuple(SHORT * 2**i for i in range(6))  # to 32 times
TOKENS_PER_STEP, STEPS = 8192, 80
SMALL = {"lora.alpha": "curvature", "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 5}  # a model this narrow
LONG_ARMS: dict[str, dict[str, Any]] = {
    "linear, S²": {"rope_scaling": "linear", "attention": {"train": "s2"}},
    "linear, dense": {"rope_scaling": "linear", "attention": {"train": "dense"}},
    "YaRN, S²": {"rope_scaling": "yarn", "attention": {"train": "s2"}},
    "YaRN, S² then dense": {"rope_scaling": "yarn", "attention": {"train": "s2", "dense_last": 0.5}},
    "YaRN, dense": {"rope_scaling": "yarn", "attention": {"train": "dense"}},
}


def measure(run: Path, cases: int) -> Row:
    loaded, row = load_model(str(run)), Row()
    for length in LENGTHS:
        row |= text_loss(loaded, length, 32_768)
        row |= keys_found(loaded, (length,), cases if length <= LONG else max(1, cases // 2))
    del loaded
    gc.collect()
    return row


def arm(model: str, preset: str, ctx: int, steps: int, cases: int, out: Path, **changes: Any) -> Row:
    """A run of so many steps of equal tokens, measured."""
    batch = TOKENS_PER_STEP // ctx
    common = {"ctx": ctx, "steps": steps, "global_batch_size": batch, "micro_batch_size": batch}
    row = trained(model, preset, out, **common, memory={"checkpoint": False}, **changes)
    return row | measure(out, cases)


def experiment(rows: Rows, seeds: int, steps: int, cases: int, work: Path) -> None:
    models = {letters: converted("tiny", work / letters, letters, 128) for letters in ("SN", "SF")}
    rows.once("before", "tiny", 0, lambda: measure(Path("presets/models/tiny"), cases))
    for letters, model in models.items():
        rows.once("before", f"{letters}, converted", 0, partial(measure, Path(model), cases))
    out = work / "run"
    for seed in range(seeds):
        for letters, model in models.items():
            given: dict[str, Any] = {"cases": cases, "out": out, "seed": seed}
            short = partial(arm, model, "retrofit-short", SHORT, steps, **given, **SMALL)
            rows.once("equal tokens", f"{letters}, short", seed, short)
            text = partial(arm, model, "demo-hybrid", SHORT, steps, **given)
            rows.once("equal tokens", f"{letters}, short, from the text", seed, text)
            both = partial(arm, model, "demo-hybrid", LONG, steps, **given)
            rows.once("equal tokens", f"{letters}, long", seed, both)
        budget = middle(rows.of("equal tokens")["SN, short"], "cpu_seconds")
        assert budget is not None
        for name, changes in LONG_ARMS.items():
            long = partial(arm, "tiny", "demo-plain", LONG, cases=cases, out=out, seed=seed, **changes)
            rows.once("equal tokens", name, seed, partial(long, steps=steps))
            took = middle(rows.of("equal tokens")[name], "cpu_seconds")
            assert took is not None
            same = max(1, round(steps * budget / took))
            rows.once("equal CPU time", name, seed, partial(long, steps=same))


def report(rows: Rows) -> str:
    lines = [f"Medians over the seeds. {machine()}. {TOKENS_PER_STEP:,} tokens a step."]
    parts = {part: rows.of(part) for part in ("before", "equal tokens", "equal CPU time")}
    arms = [(part, name, found) for part, of_part in parts.items() for name, found in of_part.items()]
    heads = [f"{length:,}" for length in LENGTHS]

    def shown(title: str, names: list[str], form: str, columns: list[str]) -> None:
        made = []
        for part, name, found in arms:
            values = [middle(found, key) for key in names]
            cells = ["" if value is None else form.format(value) for value in values]
            made.append([name, part, *cells, cell(found, "cpu_seconds", "{:.0f}"), str(len(found))])
        lines.extend(["", f"## {title}", "", *table(["", "", *columns, "CPU seconds", "seeds"], made)])

    shown("Passkeys found, by length in tokens", [f"passkey at {n:,}" for n in LENGTHS], "{:.0%}", heads)
    shown("Loss on held-out files, nats a token, by length", [f"loss at {n:,}" for n in LENGTHS], "{:.3f}", heads)
    for length in (SHORT, LONG, LENGTHS[-1]):
        back = [f"{share * length:,.0f} back" for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
        names = [f"passkey at {length:,}, {distance}" for distance in back]
        shown(f"Passkeys at {length:,} tokens, by distance", names, "{:.0%}", back)
    starts = [1, 64, *(64 * 2**i for i in range(1, 8))]
    known = {key for _, _, found in arms for row in found for key in row}
    names = [key for start in starts if (key := f"loss at {LENGTHS[-1]:,} from {start:,}") in known]
    shown(f"Loss at {LENGTHS[-1]:,} tokens, by position", names, "{:.3f}", [name.split(" from ")[1] for name in names])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cases", type=int, default=4, help="passkeys at each of five depths; half beyond 4,096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-retrofit-short"), help="removed at the end")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console.quiet_libraries()
    rows = Rows(options.out / "retrofit-short-cpu.jsonl")
    experiment(rows, options.seeds, options.steps, options.cases, options.work)
    shutil.rmtree(options.work, ignore_errors=True)
    text = report(rows)
    (options.out / "retrofit-short-cpu.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
