"""What windows cost a model that hangs on its first token, before any training, and what fitted sinks give back.

    python benchmarks/sinks.py MODEL TEXT      # some 20 minutes for SmolLM2-135M on two CPU cores

MODEL is a llama, mistral or qwen2 directory, TEXT a file it was not calibrated on (sinks are fitted to the embedded
corpus). Each layout is converted to GraniteSWA without and with sinks, and opened in stock transformers (eager): nats
a token on rows of TEXT, the tokens within one window and those beyond apart, and passkeys at two lengths by ctxext.
One outcome a line in benchmarks/results/sinks-cpu.jsonl; arms that are there are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from ctxext import api
from ctxext.cli import console
from ctxext.evals import passkey
from ctxext.evals.eval_spec import Passkey
from ctxext.model.load import load_model, load_tokenizer

LAYOUTS = ("F", "SF", "SSSF", "S", "SSSN")
T = 1024  # tokens of a row
RESULTS = Path(__file__).parent / "results"


def rows_of(model: Path, text: Path, count: int) -> Tensor:
    """The first `count` rows of a text, ids [count, T]."""
    ids = load_tokenizer(model)(text.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * T]).view(count, T)


@torch.no_grad()
def losses(model: Path, rows: Tensor, window: int) -> tuple[float, float]:
    """Nats a token in stock transformers: of the tokens within the first window of a row, and of those after it."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    each = []
    for row in rows:
        scores = loaded(row[None]).logits[0, :-1].log_softmax(-1)
        each.append(-scores.gather(-1, row[1:, None])[:, 0])
    loss = torch.stack(each)
    return float(loss[:, : window - 1].mean()), float(loss[:, window - 1 :].mean())


def passkeys(model: Path, lengths: tuple[int, ...], cases: int) -> dict[str, float]:
    """The share of passkeys found, by length in tokens."""
    loaded = load_model(model)
    found = passkey.passkey(loaded, Passkey(lengths=lengths, cases=cases))
    del loaded
    gc.collect()
    return {str(row.length): row.value for row in found}


def measure(model: Path, layout: str, sinks: str, rows: Tensor, window: int, cases: int) -> dict[str, Any]:
    """One arm: convert, and measure what came out."""
    with tempfile.TemporaryDirectory() as place:
        out, options = Path(place) / "out", {} if layout == "F" else {"sliding_window": window}
        api.convert(
            model, layout, out=out, model_class="granite_swa", sinks=sinks, gate=False, say=console.say, **options
        )
        within, beyond = losses(out, rows, window)
        found = passkeys(out, (1024, 2048), cases) if cases else {}
    return {"layout": layout, "sinks": sinks, "within": within, "beyond": beyond, "passkeys": found}


def table(outcomes: list[dict[str, Any]], title: str) -> str:
    """Markdown: an arm a line."""
    lengths = sorted({length for each in outcomes for length in each["passkeys"]}, key=int)
    names = ["layout", "sinks", "first window, nats a token", "beyond it", *(f"passkeys at {n}" for n in lengths)]
    lines = [title, "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for each in outcomes:
        cells = [each["layout"], each["sinks"], f"{each['within']:.3f}", f"{each['beyond']:.3f}"]
        cells += [f"{each['passkeys'][n]:.0%}" if n in each["passkeys"] else "" for n in lengths]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--cases", type=int, default=1, help="passkeys at each depth; 0: none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    console.quiet_libraries()

    path = given.out / "sinks-cpu.jsonl"
    outcomes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = rows_of(given.model, given.text, given.rows)
    for layout in LAYOUTS:
        for sinks in ("none", "auto") if "S" in layout else ("none",):
            if any((each["layout"], each["sinks"]) == (layout, sinks) for each in outcomes):
                continue
            outcomes.append(measure(given.model, layout, sinks, rows, given.window, given.cases))
            with path.open("a") as file:
                file.write(json.dumps(outcomes[-1]) + "\n")
            versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} CPU"
            title = (
                f"Untrained conversions of {given.model.name} to GraniteSWA, W = {given.window}, in stock transformers "
                f"(fp32, eager): {len(rows)} rows of {T:,} tokens of {given.text.name}. {versions}.\n\n"
                f"`python benchmarks/sinks.py {given.model.name} {given.text.name}`"
            )
            (given.out / "sinks-cpu.md").write_text(table(outcomes, title))


if __name__ == "__main__":
    main()
