"""What the training experiments share: runs of a recipe from a model, what is measured on them, and a file of rows.

A row is one arm under one seed: {"part", "arm", "seed", ...numbers}. Rows are written as they come, and an experiment
that was stopped goes on with those that are missing. CPU seconds are those of this process, all threads together.
"""

from __future__ import annotations

import gc
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from ctxext.cli import console
from ctxext.config import presets
from ctxext.config.loader import build, set_value
from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.data.samples import sample_documents
from ctxext.evals import passkey, perplexity
from ctxext.evals.eval_spec import Passkey
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import LoadedModel, hidden_states, load_model, output_weight
from ctxext.model.source import resolve
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loss import token_losses
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run

Row = dict[str, Any]


class Rows:
    """The rows of an experiment, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def once(self, part: str, arm: str, seed: int, measure: Callable[[], Row]) -> None:
        """A row, measured where it is not in the file yet."""
        if any((row["part"], row["arm"], row["seed"]) == (part, arm, seed) for row in self.rows):
            return
        row = {"part": part, "arm": arm, "seed": seed} | measure()
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = [f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in list(row.items())[3:]]
        console.say(f"{part}, {arm}, seed {seed}: " + ", ".join(said))

    def of(self, part: str) -> dict[str, list[Row]]:
        """A part's rows by arm, in the order they were measured first."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row["part"] == part:
                found.setdefault(row["arm"], []).append(row)
        return found


def middle(rows: Iterable[Row], name: str) -> float | None:
    """The median over the seeds."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None


def cell(rows: list[Row], name: str, shown: str = "{:.3f}") -> str:
    """The median over the seeds and, where there are several, their range."""
    values = sorted(row[name] for row in rows if row.get(name) is not None)
    if not values:
        return ""
    text = shown.format(statistics.median(values))
    if len(values) > 1 and values[0] != values[-1]:
        text += f" ({shown.format(values[0])} to {shown.format(values[-1])})"
    return text


def table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Markdown lines."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def machine() -> str:
    """What measured it."""
    return (
        f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()}), torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def converted(model: str, out: Path, pattern: str, window: int | None, full_layers: str | None = None) -> str:
    """A conversion at `out`, made once."""
    if not out.exists():
        plan = plan_conversion(model, pattern, out=out, sliding_window=window, full_layers=full_layers)
        run_conversion(plan, gate=False)
    return str(out)


def trained(model: str, preset: str, out: Path, **changes: Any) -> Row:
    """A finetune run of a preset with changes by dotted path, at `out`: CPU seconds, tokens."""
    fields = dict(presets.find("finetune", preset).data)
    quiet = {"validation.every_steps": None, "faults.save_steps": 10**6, "faults.save_minutes": None}
    for path, value in (quiet | changes).items():
        set_value(fields, path, value)
    shutil.rmtree(out, ignore_errors=True)
    plan = plan_run(resolve(model), build(FinetuneSpec, fields, source=preset))
    start_run(plan, out)
    began = time.process_time()
    run_finetune(plan, out)
    seconds = time.process_time() - began
    gc.collect()
    return {"cpu_seconds": round(seconds, 1), "tokens": plan.tokens}


def own_samples(model: str, tokens: int, length: int, seed: int, temperature: float) -> torch.Tensor:
    """Rows [n, length + 1] that a model wrote, BOS first; those that it ended earlier are left out."""
    loaded = load_model(model)
    documents = sample_documents(
        loaded.model, loaded.tokenizer, tokens=tokens, length=length + 2, batch=128, temperature=temperature, seed=seed
    )
    return torch.tensor([document.ids[: length + 1] for document in documents if len(document.ids or ()) > length])


@torch.no_grad()
def row_loss(loaded: LoadedModel, rows: torch.Tensor) -> float:
    """Mean loss of rows [n, T + 1], in nats a token."""
    total = 0.0
    for batch in rows.split(16):
        hidden = hidden_states(loaded.model, batch[:, :-1])  # (16, T, E)
        labels = batch[:, 1:].flatten()
        total += float(token_losses(hidden.flatten(0, 1), output_weight(loaded.model), labels).double().sum())
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def text_loss(loaded: LoadedModel, length: int, tokens: int) -> dict[str, float]:
    """Loss on held-out files of the embedded corpus (hf-stride), in nats a token: of all, and by position bucket."""
    texts = perplexity.encode(read_documents(EMBEDDED, split="held-out"), loaded.tokenizer, max_tokens=tokens)
    result = perplexity.perplexity(loaded, texts, length)
    buckets = {f"loss at {length:,} from {b.start:,}": b.nats_per_token for b in result.buckets if b.nats_per_token}
    return {f"loss at {length:,}": result.nats_per_token} | buckets


def keys_found(loaded: LoadedModel, lengths: tuple[int, ...], cases: int) -> dict[str, float]:
    """The share of passkeys found at each length, and by the distance in tokens from key to question."""
    found: dict[str, float] = {}
    for row in passkey.passkey(loaded, Passkey(lengths=lengths, cases=cases)):
        found[f"passkey at {row.length:,}"] = row.value
        for depth, share in row.details["by_depth"].items():
            found[f"passkey at {row.length:,}, {(1 - float(depth)) * row.length:,.0f} back"] = share
    return found
