"""What S²-Attn teaches and unlearns: `tiny` at four times its length, by training attention, at equal tokens.

    python benchmarks/s2_schedule.py                 # about 25 minutes on two CPU cores; writes benchmarks/results/
    python benchmarks/s2_schedule.py --seeds 1 --steps 4 --cases 2 --out elsewhere

Every arm starts from the same model, sees the same tokens in the same order, and is measured with dense attention
(sliding where the layer is sliding), as it will run: perplexity at 512 and 2,048 tokens, and passkeys at 2,048 by the
distance between key and question. Two models: `tiny` with YaRN, every layer full; and its swa128-nope conversion.
"""

from __future__ import annotations

import argparse
import gc
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ctxext.cli import console
from ctxext.config import presets
from ctxext.config.loader import build
from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.evals import passkey, perplexity
from ctxext.evals.eval_spec import Passkey
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run

SHORT, LONG, TEXT = 512, 2048, 16_384  # tokens
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"train": "dense"},
    "s2": {"train": "s2"},
    "s2, random shift": {"train": "s2", "shift": "random"},
    "s2, groups grow": {"train": "s2", "group_size": 256, "grow": True},
    "s2, last 25% dense": {"train": "s2", "dense_last": 0.25},
    "s2, last 50% dense": {"train": "s2", "dense_last": 0.5},
}
Row = dict[str, float]


def measure(model: str, cases: int) -> Row:
    """Perplexity at both lengths; the share of passkeys found, by distance in tokens."""
    loaded = load_model(model)
    texts = perplexity.encode(read_documents(EMBEDDED, split="held-out"), loaded.tokenizer, max_tokens=TEXT)
    row = {f"perplexity at {T:,}": perplexity.perplexity(loaded, texts, T).perplexity for T in (SHORT, LONG)}
    (found,) = passkey.passkey(loaded, Passkey(lengths=(LONG,), cases=cases))
    shares = found.details["by_depth"].items()
    row |= {f"passkey, {(1 - float(depth)) * LONG:,.0f} back": share for depth, share in shares}
    del loaded
    gc.collect()
    return row


def train(model: str, preset: str, attention: dict[str, Any], seed: int, steps: int | None, out: Path) -> None:
    """A finetune run, at `out`."""
    fields = dict(presets.find("finetune", preset).data) | {"attention": attention, "seed": seed}
    fields |= {"validation": {"every_steps": None}} | ({"steps": steps} if steps else {})
    plan = plan_run(resolve(model), build(FinetuneSpec, fields, source=preset))
    start_run(plan, out)
    run_finetune(plan, out)


def report(results: dict[str, dict[str, list[Row]]], title: str) -> str:
    """A table for each model; the mean over the seeds, and their range where there are several."""
    lines = [title]
    for model, rows in results.items():
        names = list(list(rows.values())[-1][0])
        lines += ["", f"## {model}", "", "| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for arm, of_seeds in rows.items():
            cells = []
            for name in names:
                values = [row[name] for row in of_seeds if name in row]
                shown = [f"{value:.0%}" if "passkey" in name else f"{value:.2f}" for value in values]
                mean = statistics.mean(values) if values else 0.0
                cells.append((f"{mean:.0%}" if "passkey" in name else f"{mean:.2f}") if values else "")
                if len(values) > 1:
                    cells[-1] += f" ({', '.join(shown)})"
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="instead of the presets' (30 and 40)")
    parser.add_argument("--cases", type=int, default=10, help="passkeys at each of five distances")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    console.quiet_libraries()
    work = Path(tempfile.mkdtemp())
    hybrid = work / "hybrid"
    run_conversion(plan_conversion("tiny", "swa128-nope", out=hybrid), gate=False)
    results: dict[str, dict[str, list[Row]]] = {}
    models = {"tiny, YaRN": ("tiny", "demo-plain"), "tiny-swa128-nope": (str(hybrid), "demo-hybrid")}
    for name, (model, preset) in models.items():
        rows = results[name] = {"before": [measure(model, options.cases)]}
        for arm, attention in ARMS.items():
            for seed in range(options.seeds):
                out = work / "run"
                train(model, preset, attention, seed, options.steps, out)
                row = measure(str(out), options.cases)
                rows.setdefault(arm, []).append(row)
                shutil.rmtree(out)
                console.say(f"{name}, {arm}, seed {seed}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
    shutil.rmtree(work)
    title = (
        f"`tiny` finetuned at {LONG:,} tokens by training attention, equal tokens, measured with the attention it runs "
        f"with; {options.seeds} seeds, {5 * options.cases} passkeys each, {torch.get_num_threads()} CPU threads "
        f"({platform.machine()}), torch {torch.__version__}, transformers {transformers.__version__}."
    )
    text = report(results, title)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "s2-schedule.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
