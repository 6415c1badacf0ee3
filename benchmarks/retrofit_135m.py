"""A real model converted without and with sinks, healed at a short length, and used at a longer one.

    python benchmarks/retrofit_135m.py MODEL BOOKS           # many hours on two CPU cores; goes on where it stopped
    python benchmarks/retrofit_135m.py MODEL BOOKS --arms "SF, sinks" --tokens 100k

MODEL is SmolLM2-135M-Instruct, or another llama. BOOKS has three novels; one is trained on, two are held out. Each arm
is measured in parts (loss by length and position on both held-out novels, passkeys, needles); a part that is in
benchmarks/results/retrofit-135m-cpu.jsonl is not measured again. A training that was stopped is resumed, as long as its
directory under --work is there.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import Row, Rows, cell, machine, table

from ctxext import api
from ctxext.cli import console
from ctxext.config import manifest
from ctxext.data.documents import read_documents
from ctxext.evals import niah, passkey, perplexity
from ctxext.evals.eval_spec import Niah, Passkey
from ctxext.evals.item_runner import Ledger, run_job
from ctxext.model.load import LoadedModel, load_model
from ctxext.units import format_tokens, parse_tokens

TRAINED_ON, HELD_OUT = "eliot_daniel_deronda.md", ("norris_the_octopus.md", "grant_personal_memoirs.md")
WINDOW = 128  # tokens
HEALED_AT, BATCH = 1024, 2  # tokens of a row, rows of a step
TEXT = 16_384  # tokens of each held-out novel
LENGTHS = (2048, 4096, 8192)
# Rates for a model of this width (benchmarks/results/retrofit-cpu.md); the preset's own are for wide models.
HEAL: dict[str, Any] = {
    "lora.alpha": "curvature",
    "lora.embeddings": "frozen",
    "optimizer.learning_rate": 1e-3,
    "optimizer.sinks_learning_rate": 3e-3,
    "optimizer.warmup_steps": 5,
    "memory.checkpoint": False,
    "validation.every_steps": None,
    "faults.save_minutes": 10.0,
    "faults.save_steps": 10**6,
}


@dataclass(frozen=True)
class Arm:
    """layout: None is the source. sinks: auto or none. healed: trained by `heal` at HEALED_AT. full_layers: a list."""

    layout: str | None = None
    sinks: str = "none"
    healed: bool = False
    full_layers: str | None = None


# The eight of 30 layers of SmolLM2-135M whose heads attend most to the answers of passkeys.
RETRIEVAL = "14,17,18,20,21,22,23,24"
ARMS = {
    "source": Arm(),
    "SF": Arm("SF"),
    "SF, sinks": Arm("SF", "auto"),
    "8 F, by heads, sinks": Arm("SF", "auto", full_layers=RETRIEVAL),
    "8 F, by heads, sinks, healed": Arm("SF", "auto", healed=True, full_layers=RETRIEVAL),
    "8 N, by heads, sinks": Arm("SN", "auto", full_layers=RETRIEVAL),
    "8 N, by heads, sinks, healed": Arm("SN", "auto", healed=True, full_layers=RETRIEVAL),
    "SF, sinks, healed": Arm("SF", "auto", healed=True),
    "SSSN, sinks": Arm("SSSN", "auto"),
    "SSSN, sinks, healed": Arm("SSSN", "auto", healed=True),
    "SF, healed": Arm("SF", healed=True),
}


def label(name: str, tokens: int) -> str:
    """The arm's name in the file of rows: a healed one with its tokens."""
    return f"{name}, {format_tokens(tokens)}" if ARMS[name].healed else name


def made(model: Path, books: Path, name: str, tokens: int, rows: Rows, work: Path) -> Path:
    """The arm's model: converted, and trained where it is to be."""
    arm = ARMS[name]
    if arm.layout is None:
        return model
    out = work / "-".join([arm.layout, *(arm.full_layers or "").split(","), arm.sinks])
    if not out.exists():
        options: dict[str, Any] = {"sliding_window": WINDOW, "full_layers": arm.full_layers, "sinks": arm.sinks}
        api.convert(model, arm.layout, out=out, model_class="granite_swa", gate=False, say=console.say, **options)
    if not arm.healed:
        return out
    run = work / f"{out.name}-healed-{tokens}"
    if not (run / manifest.FILE_NAME).exists():
        trained = heal(out, books, tokens, run)
        rows.once("training", label(name, tokens), 0, lambda: trained)
    return run


def heal(model: Path, books: Path, tokens: int, run: Path) -> Row:
    """A run of `heal` for so many tokens, begun or resumed."""
    settings = HEAL | {"global_batch_size": BATCH, "micro_batch_size": BATCH, "steps": tokens // (HEALED_AT * BATCH)}
    began = time.process_time()
    options: dict[str, Any] = {"resume": True} if (run / "spec.yaml").exists() else {}
    report = api.finetune(model, ctx=HEALED_AT, preset="heal", data=str(books / TRAINED_ON), settings=settings,
                          out=run, say=console.say, **options)  # fmt: skip
    if not report.finished:
        raise SystemExit("stopped; the same command resumes the training")
    return {"tokens": tokens, "final_loss": report.final_loss, "cpu_seconds": round(time.process_time() - began)}


def text_loss(loaded: LoadedModel, books: Path, length: int) -> Row:
    """Nats a token on each held-out novel, and of the tokens of each position bucket of the two together."""
    found, row = [], Row()
    for name in HELD_OUT:
        texts = perplexity.encode(read_documents(str(books / name)), loaded.tokenizer, max_tokens=TEXT)
        found.append(perplexity.perplexity(loaded, texts, length))
        row[name] = found[-1].nats_per_token
    for buckets in zip(*(each.buckets for each in found), strict=True):
        losses = [bucket.nats_per_token for bucket in buckets if bucket.nats_per_token is not None]
        if losses:
            row[f"from {buckets[0].start}"] = sum(losses) / len(losses)
    return row


def passkeys(loaded: LoadedModel, length: int, cases: int) -> Row:
    """The share of passkeys found."""
    (row,) = passkey.passkey(loaded, Passkey(lengths=(length,), cases=cases))
    return {"found": row.value, "cases": row.n}


def needles(loaded: LoadedModel, length: int, cases: int, place: Path) -> Row:
    """The share of single needles found."""
    job = niah.job(loaded, Niah(lengths=(length,), cases=cases), place)
    (row,) = run_job(job, Ledger(), 16_384, lambda *_: None)
    return {"found": row.value, "cases": row.n}


def experiment(
    rows: Rows, model: Path, books: Path, names: list[str], lengths: list[int], tokens: int, cases: int, work: Path
) -> None:
    """Measure every part of every arm that is not in the file, the shorter length first."""
    for name in names:
        path = made(model, books, name, tokens, rows, work)
        loaded = load_model(str(path))
        for length in lengths:
            parts: dict[str, Callable[[], Row]] = {
                "text": partial(text_loss, loaded, books, length),
                "passkeys": partial(passkeys, loaded, length, cases),
                "needles": partial(needles, loaded, length, cases, work),
            }
            for part, measure in parts.items():
                rows.once(f"{part} at {length:,}", label(name, tokens), 0, measure)
        del loaded
        gc.collect()


def report(rows: Rows, model: Path) -> str:
    """Markdown: an arm a line."""
    lines = [
        f"{model.name}, converted to GraniteSWA with windows of {WINDOW} tokens. Healed: `heal` at {HEALED_AT:,} "
        f"tokens with the rates in the script. {TEXT:,} tokens of each of two held-out novels; one seed. {machine()}.",
        "",
        "`python benchmarks/retrofit_135m.py MODEL BOOKS`",
        "",
    ]
    heads, lines_of_arms = ["", "healing tokens"], []
    for length in LENGTHS:
        heads += [f"loss at {length:,}: {HELD_OUT[0]}", HELD_OUT[1], f"passkeys at {length:,}", "needles"]
    for name in dict.fromkeys(row["arm"] for row in rows.rows):
        own = {part: [row for row in rows.rows if row["part"] == part and row["arm"] == name] for part in _parts(rows)}
        cells = [name, cell(own.get("training", []), "tokens", "{:,.0f}")]
        for length in LENGTHS:
            text = own.get(f"text at {length:,}", [])
            cells += [cell(text, book) for book in HELD_OUT]
            cells += [cell(own.get(f"{part} at {length:,}", []), "found", "{:.0%}") for part in ("passkeys", "needles")]
        lines_of_arms.append(cells)
    return "\n".join(lines + table(heads, lines_of_arms)) + "\n"


def _parts(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["part"] for row in rows.rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("books", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--tokens", default="1m", help="that healing trains on")
    parser.add_argument("--cases", type=int, default=2, help="passkeys and needles at each of five depths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-retrofit-135m"), help="kept, to be resumed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console.quiet_libraries()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "retrofit-135m-cpu.jsonl")
    experiment(
        rows, given.model, given.books, given.arms, given.lengths, parse_tokens(given.tokens), given.cases, given.work
    )
    text = report(rows, given.model)
    (given.out / "retrofit-135m-cpu.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
