"""What a retrofit costs and what healing gives back: damage by layout, healing by recipe, LongLoRA's ablations.

    python benchmarks/retrofit.py                    # some three hours on one CPU thread; goes on where it stopped
    python benchmarks/retrofit.py --part heal --seeds 1 --steps 10 --out elsewhere

heal      stories260K at W = 32 on its own samples (512 tokens, temperature 1): nats above the SOURCE GIVEN THE SAME
          TRAINING, with KL to the self-teacher and with plain cross entropy, the same data, steps and trainables
tiny      the embedded model healed at its own length, by layout and window: loss and passkeys, to 8 times its length
ablation  tiny at four times its length: what trains, and with which attention, as LongLoRA's tables 2 and 6 ask it

shared/data (stories260K) is looked for beside the checkout; the part that needs it says so and is left out.
"""

from __future__ import annotations

import argparse
import gc
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import (
    Row,
    Rows,
    cell,
    converted,
    keys_found,
    machine,
    middle,
    own_samples,
    row_loss,
    table,
    text_loss,
    trained,
)

from ctxext.cli import console
from ctxext.model.load import load_model

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K"
TEMPERATURE = 1.0  # of the samples: text as the source says it; at less it would be sharper than its teacher
SAMPLED, HELD_OUT = 1_600_000, 120_000  # tokens to train on and to measure on
HEAL_STEPS, HEAL_BATCH = 140, 16  # 1.1M tokens: under three CPU minutes with a teacher
SMALL = {"lora.alpha": "curvature", "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 10}  # models this narrow
LAYOUTS = {"SN": ("SN", None), "full layer 2": ("SN", "2"), "full layer 4": ("SN", "4")}
TARGETS = {"SN": 0.20, "full layer 2": 0.12, "full layer 4": 0.08}
SHORT, LONG = 512, 2048
TINY = {
    "SN, 32": ("SN", 32),
    "SN, 64": ("SN", 64),
    "SN, 128": ("SN", 128),
    "SSSN, 128": ("SSSN", 128),
    "SF, 128": ("SF", 128),
}
ABLATION: dict[str, dict[str, Any]] = {
    "everything": {"tuning": "full"},
    "LoRA": {"lora.embeddings": "frozen", "lora.norms": "frozen"},
    "LoRA, embeddings": {"lora.norms": "frozen"},
    "LoRA, norms": {"lora.embeddings": "frozen"},
    "LoRA, embeddings, norms": {},
}


def measured(run: Path, measure: Any) -> Row:
    loaded = load_model(str(run))
    found: Row = measure(loaded)
    del loaded
    gc.collect()
    return found


def heal(rows: Rows, seeds: int, steps: int | None, work: Path) -> None:
    """Every arm of stories260K; one row each for what is not trained."""
    if not STORIES.is_dir():
        console.say(f"heal is left out: {STORIES} is absent")
        return
    held_out = own_samples(str(STORIES), HELD_OUT, SHORT, 77, TEMPERATURE)
    measure = lambda loaded: {"loss": row_loss(loaded, held_out)}  # noqa: E731
    full = converted(str(STORIES), work / "full", "F", None)  # of the class and the file that the others have
    layouts = {"source": full} | {
        name: converted(str(STORIES), work / name.replace(" ", "-"), pattern, 32, layers)
        for name, (pattern, layers) in LAYOUTS.items()
    }
    for name, model in layouts.items():
        rows.once("heal, untrained", name, 0, partial(measured, Path(model), measure))
    common = {
        "ctx": SHORT,
        "steps": steps or HEAL_STEPS,
        "global_batch_size": HEAL_BATCH,
        "micro_batch_size": HEAL_BATCH,
        "memory": {"checkpoint": False},
        **SMALL,
        "data.source": "self",
        "data.samples": {"tokens": SAMPLED, "temperature": TEMPERATURE, "batch": 256},
    }

    def arm(model: str, **changes: Any) -> Row:
        out = work / "run"
        cost = trained(model, "heal", out, **common, **changes)
        return cost | measured(out, measure)

    trained(full, "heal", work / "run", **common | {"steps": 1}, distill=None)  # samples the text, which is not counted
    for seed in range(seeds):
        rows.once("heal", "source", seed, partial(arm, full, distill=None, seed=seed))
        for name in LAYOUTS:
            rows.once("heal", f"{name}, KL", seed, partial(arm, layouts[name], seed=seed))
            rows.once("heal", f"{name}, text", seed, partial(arm, layouts[name], distill=None, seed=seed))


def tiny(rows: Rows, seeds: int, steps: int | None, work: Path) -> None:
    """tiny, healed at the length it was trained at, and looked at beyond."""

    def measure(loaded: Any) -> Row:
        return text_loss(loaded, SHORT, 32_768) | keys_found(loaded, (SHORT, LONG, 2 * LONG), 8)

    full = converted("tiny", work / "tiny-full", "F", None)
    models = {name: converted("tiny", work / name.replace(", ", "-"), *layout) for name, layout in TINY.items()}
    for name, model in {"source": full, **models}.items():
        rows.once("tiny, untrained", name, 0, partial(measured, Path(model), measure))

    def arm(model: str, **changes: Any) -> Row:
        out = work / "run"
        common = SMALL | {"ctx": SHORT, "steps": steps or 120, "global_batch_size": 16, "micro_batch_size": 16}
        cost = trained(model, "heal", out, **common, memory={"checkpoint": False}, **changes)
        return cost | measured(out, measure)

    for seed in range(seeds):
        rows.once("tiny", "source", seed, partial(arm, full, distill=None, seed=seed))
        for name, model in models.items():
            rows.once("tiny", f"{name}, KL", seed, partial(arm, model, seed=seed))
        rows.once("tiny", "SN, 128, text", seed, partial(arm, models["SN, 128"], distill=None, seed=seed))


def ablation(rows: Rows, seeds: int, steps: int | None, work: Path) -> None:
    """What trains x which attention, at equal tokens; measured with dense attention, as it runs."""

    def measure(loaded: Any) -> Row:
        losses = text_loss(loaded, SHORT, 32_768) | text_loss(loaded, LONG, 32_768)
        return losses | keys_found(loaded, (SHORT, LONG), 8)

    def arm(**changes: Any) -> Row:
        out = work / "run"
        if changes.get("tuning") == "full":  # of two rates, the better: as large a one as LoRA's undoes it
            changes = {"optimizer.learning_rate": 3e-4} | changes
        cost = trained("tiny", "demo-plain", out, steps=steps or 30, **changes)
        return cost | measured(out, measure)

    for seed in range(seeds):
        for name, changes in ABLATION.items():
            for attention in ("s2", "dense"):
                given = changes | {"attention.train": attention, "seed": seed}
                rows.once("ablation", f"{name}, {attention}", seed, partial(arm, **given))


def report(rows: Rows) -> str:
    """The tables."""
    lines = [f"Medians over the seeds, and their range. {machine()}."]
    healed, before = rows.of("heal"), rows.of("heal, untrained")
    if healed.get("source"):
        same = middle(healed["source"], "loss")
        raw = before["source"][0]["loss"]
        assert same is not None
        lines += ["", "## stories260K, W = 32, own samples of 512 tokens", ""]
        lines += [f"The source: {raw:.4f} nats a token untrained, {same:.4f} given the same training."]
        lines += ["Nats above the source given the same training:", ""]
        made = []
        for name in LAYOUTS:
            arms = [
                [r | {"above": r["loss"] - same} for r in healed.get(f"{name}, {kind}", [])] for kind in ("KL", "text")
            ]
            untrained = before[name][0]["loss"] - same
            cpu = ", ".join(cell(arm, "cpu_seconds", "{:.0f}") for arm in arms)
            made.append([name, f"{untrained:.3f}", *(cell(arm, "above") for arm in arms), f"{TARGETS[name]:.2f}", cpu])
        lines += table(["layout", "untrained", "KL to itself", "text alone", "target", "CPU seconds"], made)
    for part, title in (("tiny", "tiny, healed at 512 tokens"), ("ablation", "tiny at 2,048 tokens: what trains")):
        if rows.of(part):
            untrained = {f"{name}, untrained": found for name, found in rows.of(f"{part}, untrained").items()}
            lines += ["", f"## {title}", "", *_by_arm(untrained | rows.of(part))]
    return "\n".join(lines) + "\n"


def _by_arm(arms: dict[str, list[Row]]) -> list[str]:
    names = [name for name in next(reversed(arms.values()))[0] if name.startswith(("loss at", "passkey at"))]
    names = [name for name in names if " from " not in name and " back" not in name]
    names = [name for name in names if all(name in row for rows in arms.values() for row in rows)]
    shown = {name: "{:.0%}" if name.startswith("passkey") else "{:.3f}" for name in names}
    made = [
        [arm, *(cell(rows, name, shown[name]) for name in names), cell(rows, "cpu_seconds", "{:.0f}"), str(len(rows))]
        for arm, rows in arms.items()
    ]
    return table(["", *names, "CPU seconds", "seeds"], made)


PARTS = {"heal": heal, "tiny": tiny, "ablation": ablation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated [default: all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every run, instead of its own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-retrofit"), help="removed at the end")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console.quiet_libraries()
    rows = Rows(options.out / "retrofit-cpu.jsonl")
    for part in options.part or PARTS:
        PARTS[part](rows, options.seeds, options.steps, options.work / part)
    shutil.rmtree(options.work, ignore_errors=True)
    text = report(rows)
    (options.out / "retrofit-cpu.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
