"""Which alpha, at which rank and learning rate: LoRA by four rules, and full fine-tuning, at equal steps on equal text.

    python benchmarks/alpha.py                       # about 190 runs of 28 steps; writes benchmarks/results/
    python benchmarks/alpha.py --model tiny --data embedded --seeds 1 --ranks 8 --steps 4 --out elsewhere

Rules, as what multiplies B A x (alpha / rank):

    sqrt        256 / sqrt(rank)               second-hand from arXiv 2606.12883; ctxext's default
    curvature   sqrt(3 fan-in / rank)          ours (ops/low_rank.py)
    2r          2                              alpha = 2 rank, the usual advice
    rsLoRA      16 / sqrt(rank)                arXiv 2312.03732 at alpha = 16, which recipes of LoRA take most often
                                               (LongLoRA's among them); sqrt is the same rule at 256

Each runs at 2e-5, the rate of full fine-tuning that sqrt is meant for, and at its own tuned rate. Tuned: on one seed,
2e-5, 2e-4 and 2e-3, then half decades around the best until it has worse ones on both sides: five rates or more. That
seed is not among those reported. A rule judged at one rate alone is judged by that rate: 2r at 2e-5 hardly moves.

The task: a model adapted to text unlike its own, at its own length, by what a sequence of held-out text then costs.
LoRA sits on all seven linear layers and trains alone: embeddings and norms are frozen, so that the scale is all that
differs between rules. Full fine-tuning trains everything, which is more than any of these adapters can reach. What is
held out of a text is the same for all seeds; of the embedded corpus it is drawn by the seed, and it is tiny's own text.

Every run is a line of alpha-<device>.jsonl as soon as it is done; started again, the script goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
import transformers

from ctxext.cli import console
from ctxext.config.loader import build
from ctxext.data.documents import EMBEDDED
from ctxext.model.adapter_plan import ATTENTION, MLP
from ctxext.model.source import resolve
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.multiplier import run_trial
from ctxext.train.run_plan import plan_run
from ctxext.units import format_duration

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHARED = Path(__file__).parents[2] / "shared" / "data"
MODEL = str(SHARED / "stories260K") if SHARED.is_dir() else "tiny"
DATA = str(SHARED / "books" / "eliot_daniel_deronda.md") if SHARED.is_dir() else EMBEDDED
RATE, DECADES = 2e-5, (0, 2, 4)  # a rate is RATE * 10 ** (k / 2)
TUNED_ON = 0  # the seed; those reported are 1, 2, ...
FULL = "full fine-tuning"
RULES: dict[str, Callable[[int], str | float]] = {  # what lora.alpha is at a rank
    "sqrt": lambda rank: "sqrt",
    "curvature": lambda rank: "curvature",
    "2r": lambda rank: 2.0 * rank,
    "rsLoRA": lambda rank: 16.0 * sqrt(rank),
}
Arm = tuple[str, int]  # (rule, rank); full fine-tuning has rank 0
CAVEAT = """\
Read at one rate, this table ranks scales: what is far too small at 2e-5 learns next to nothing in so few steps. Read at
tuned rates, it says what is left of the differences. It says nothing about wide models: sqrt's coefficient of 256 was
found on models thousands wide, the curvature rule asks for {ratio:.0f} times less at a width of {width}, and what suits
such a model does not suit a 7B. One model, one text, few steps, rates to half a decade that were tuned on one seed by
the held-out text that is reported. Ranks above a layer's narrower side ({narrow} in k_proj and v_proj) add parameters
and no freedom. Full fine-tuning also trains embeddings and norms, which are frozen beside the adapters."""


class Lab:
    """Runs that are done, on disk line by line, and the making of others."""

    def __init__(self, options: argparse.Namespace, path: Path):
        self.options, self.path, self.source = options, path, resolve(options.model)
        self.of = {"model": self.source.name, "data": Path(options.data).name, "steps": options.steps}
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.done = {self._key(line): line for line in map(json.loads, lines)}

    def loss(self, arm: Arm, k: int, seed: int) -> float:
        """Held-out nats a token after the last step; infinite for a run that diverged."""
        wanted = self.of | {"alpha": self.alpha(arm), "rank": arm[1], "k": k, "seed": seed}
        line = self.done.get(self._key(wanted))
        if line is None:
            line = wanted | self._run(arm, k, seed)
            self.done[self._key(line)] = line
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = line["stopped"] or f"{line['before']:.4f} -> {line['loss']:.4f}"
            console.say(f"{name(arm)}, rate {rate(k):.2g}, seed {seed}: {shown} ({line['seconds']:.1f} s)")
        return math.inf if line["loss"] is None else line["loss"]

    def alpha(self, arm: Arm) -> str | float:
        return FULL if arm[0] == FULL else RULES[arm[0]](arm[1])

    def plan(self, arm: Arm, k: int, seed: int):
        lora = {"rank": arm[1], "alpha": self.alpha(arm), "target_modules": [*ATTENTION, *MLP],
                "embeddings": "frozen", "norms": "frozen"}  # fmt: skip
        fields = {
            "ctx": self.source.original_length,
            "steps": self.options.steps,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "tuning": "full" if arm[0] == FULL else "lora",
            "lora": {} if arm[0] == FULL else lora,
            "attention": {"train": "dense"},
            "data": {"source": self.options.data},
            "optimizer": {"learning_rate": rate(k), "warmup_steps": self.options.steps // 8, "schedule": "wsd"},
            "validation": {"every_steps": self.options.steps, "sequences": 16},
            "memory": {"checkpoint": False},
            "faults": {"on_divergence": "stop", "save_steps": self.options.steps},
            "seed": seed,
        }
        return plan_run(self.source, build(FinetuneSpec, fields, source="benchmark"))

    def _run(self, arm: Arm, k: int, seed: int) -> dict[str, Any]:
        began, plan = time.monotonic(), self.plan(arm, k, seed)
        with tempfile.TemporaryDirectory() as scratch:
            trial = run_trial(plan, Path(scratch) / "run")
        scale = plan.trainables.lora[0].scale if plan.trainables.lora else None
        return {"scale": scale, "before": trial.held_out[0][1], "loss": trial.final, "stopped": trial.stopped,
                "seconds": round(time.monotonic() - began, 2)}  # fmt: skip

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[field] for field in ("alpha", "rank", "k", "seed", "model", "data", "steps"))


def rate(k: int) -> float:
    return RATE * 10 ** (k / 2)


def name(arm: Arm) -> str:
    return arm[0] if arm[0] == FULL else f"{arm[0]}, rank {arm[1]}"


def tune(loss: Callable[[int], float]) -> dict[int, float]:
    """{k: loss} of every rate tried; the lowest has a higher one on both sides."""
    tried = {k: loss(k) for k in DECADES}
    while True:
        best = min(tried, key=lambda k: tried[k])
        missing = [k for k in (best - 1, best + 1) if k not in tried]
        if not missing:
            return tried
        tried |= {k: loss(k) for k in missing}


def measure(lab: Lab, arms: list[Arm], seeds: range) -> dict[str, Any]:
    """By arm: the rates tried, the best one, and the losses of `seeds` at 2e-5 and at the best rate."""
    results = {}
    for arm in arms:
        tried = tune(lambda k, arm=arm: lab.loss(arm, k, TUNED_ON))
        best = min(tried, key=lambda k: tried[k])
        losses = {label: [lab.loss(arm, k, seed) for seed in seeds] for label, k in (("small", 0), ("tuned", best))}
        line = next(iter(line for key, line in lab.done.items() if key[:2] == (lab.alpha(arm), arm[1])))
        results[name(arm)] = {"rule": arm[0], "rank": arm[1], "scale": line["scale"], "best": best, "tried": tried}
        results[name(arm)] |= losses | {"before": line["before"]}
    return results


def table(results: dict[str, Any]) -> str:
    """A row an arm: medians over the seeds, and their range."""
    lines = ["| | alpha / rank in q_proj | at 2e-5 | tuned rate | at the tuned rate | rates tried |"]
    lines.append("|---|---|---|---|---|---|")
    for label, row in results.items():
        scale = "" if row["scale"] is None else f"{row['scale']:.3g}"
        cells = [scale, spread(row["small"]), f"{rate(row['best']):.2g}", spread(row["tuned"]), str(len(row["tried"]))]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    failed = sum(math.isinf(value) for value in values)
    if failed:
        return f"{failed} of {len(values)} diverged"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def plot(results: dict[str, Any], title: str, target: Path) -> None:
    """Left: held-out loss against the rate, on the seed that tunes, at the lowest rank; right: medians by rank."""
    figure, (by_rate, by_rank) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    lowest = min(row["rank"] for row in results.values() if row["rank"])
    for number, rule in enumerate([*RULES, FULL]):
        rows = [row for row in results.values() if row["rule"] == rule]
        look = {"color": f"C{number}", "marker": "osD^P"[number]}
        tried = next(row["tried"] for row in rows if row["rank"] in (0, lowest))
        points = sorted((rate(int(k)), loss) for k, loss in tried.items() if math.isfinite(loss))
        by_rate.plot(*zip(*points, strict=True), label=rule, **look)
        for kind, style in (("small", "--"), ("tuned", "-")):
            medians = [statistics.median(row[kind]) for row in rows]
            if rule == FULL:
                by_rank.axhline(medians[0], color=look["color"], linestyle=style)
            else:
                by_rank.plot([row["rank"] for row in rows], medians, style, **look)
    before = next(iter(results.values()))["before"]
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats a token", ylim=(None, before + 0.1))
    by_rate.set_title(f"rank {lowest}, the seed that tunes (above the frame: worse than untrained)", fontsize=9)
    by_rank.set(xscale="log", xlabel="rank", xticks=sorted({row["rank"] for row in results.values() if row["rank"]}))
    by_rank.xaxis.set_major_formatter("{x:g}")
    by_rank.minorticks_off()
    by_rank.set_title("medians of the seeds: dashed at 2e-5, solid at the tuned rate", fontsize=9)
    for axes in (by_rate, by_rank):
        axes.axhline(before, color="0.6", linestyle=":")
        axes.grid(alpha=0.3)
    figure.legend(*by_rate.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title, fontsize=8, wrap=True)
    figure.savefig(target, dpi=110)


def write(lab: Lab, results: dict[str, Any], stem: Path) -> str:
    """The table, the plot and every number."""
    options, shape = lab.options, lab.source.shape
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"{lab.source.name} on {Path(options.data).name}: held-out loss (nats a token, 16 sequences) after "
        f"{options.steps} steps of 2 x {lab.source.original_length} tokens, {results[FULL]['before']:.3f} before; "
        f"medians and ranges, seeds: {options.seeds}, fp32, on {device} ({platform.machine()}), "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}."
    )
    ratio = 256 / sqrt(3 * shape.hidden_size)
    narrow = shape.num_kv_heads * shape.head_dim
    caveat = CAVEAT.format(ratio=ratio, width=shape.hidden_size, narrow=narrow)
    text = f"{title}\n\n{table(results)}\n{caveat}\n"
    stem.with_suffix(".md").write_text(text, "utf-8")
    raw = {"title": title, "results": results, "runs": list(lab.done.values())}
    raw = json.loads(json.dumps(raw), parse_constant=lambda _: None)  # JSON has no infinity
    stem.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", "utf-8")
    plot(results, title, stem.with_suffix(".png"))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="[default: ../shared/data/stories260K, or tiny]")
    parser.add_argument("--data", default=DATA, help="text, or embedded [default: ../shared/data's novel, or embedded]")
    parser.add_argument("--ranks", default="8,16,32,64")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    console.quiet_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"alpha-{'cuda' if torch.cuda.is_available() else 'cpu'}"
    lab, seeds = Lab(options, stem.with_suffix(".jsonl")), range(1, 1 + options.seeds)
    arms = [(FULL, 0), *((rule, int(rank)) for rank in options.ranks.split(",") for rule in RULES)]
    began, runs = time.monotonic(), len(arms) * (5 + 2 * options.seeds)
    lab.loss(arms[0], 0, TUNED_ON)
    left = (runs - len(lab.done)) * (time.monotonic() - began if len(lab.done) == 1 else 0)
    console.say(
        f"{lab.source.name} on {options.data}: {len(arms)} arms, about {runs} runs, {len(lab.done)} of them done"
    )
    console.say(f"estimated time: {format_duration(left)}" if left else "going on with an earlier start")
    text = write(lab, measure(lab, arms, seeds), stem)
    stem.with_suffix(".jsonl").unlink()
    print(text)


if __name__ == "__main__":
    main()
