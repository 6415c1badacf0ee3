"""The stations that every checkpoint of the zoo goes through, each compared with stock transformers.

A station is a function of a `Subject`. It returns `YES` or the refusal, and raises AssertionError where a result
differs from transformers'. Logits of one class under transformers' own attention have to be identical. ctxext's own
attention adds in another order: `ROUNDING` allows for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ctxext import api
from ctxext.doctor.model import model as examine
from ctxext.errors import CtxextError
from ctxext.evals.verify import plan_launch, verify
from ctxext.export.write import export, plan_export
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model, load_tokenizer
from ctxext.model.source import resolve
from tests.zoo.build import build
from tests.zoo.checkpoint import Checkpoint
from tests.zoo.tokenization import LEARNED_FROM, TEXT

YES = "yes"
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CONVERTIBLE = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = 48  # of the row that logits are compared on: three windows of the smallest model with one
# Sums of some hundred products in fp32 in another order, through at most six layers: observed are up to 2e-6 of the
# largest logit. A wrong mask, position or weight moves logits by more than a tenth of it.
ROUNDING = 2e-5
CHAT_PROBE = [
    {"role": "user", "content": "How many boats came home?"},
    {"role": "assistant", "content": "<think>\n12 and 7\n</think>\n\nNineteen boats."},
    {"role": "user", "content": "  And on the day of the fog?\n"},
]


@dataclass
class Subject:
    """One checkpoint, small, in `place`, and what the stations made of it."""

    row: Checkpoint
    place: Path
    made: dict[str, Path] = field(default_factory=dict)

    @property
    def supported(self) -> bool:
        return self.row.model_type in SUPPORTED

    @cached_property
    def path(self) -> Path:
        """The model directory; of an unsupported family the small files alone, for no weight of it is read."""
        return build(self.row, self.place / self.row.slug, weights=self.supported)

    @cached_property
    def logits(self) -> torch.Tensor:
        """Stock transformers' logits of the checkpoint."""
        return stock_logits(self.path, self.ids)

    @cached_property
    def ids(self) -> torch.Tensor:
        """A row of random tokens [1, TOKENS]."""
        size = resolve(str(self.path), weights=False).config.shape.vocab_size - self.row.spare_rows
        return torch.randint(0, size, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    @cached_property
    def text(self) -> Path:
        """A file of some hundred tokens."""
        path = self.place / "text.txt"
        path.write_text(LEARNED_FROM * 3, "utf-8")
        return path


def stock_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, T, V] of a directory in fp32, by transformers' own classes and attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


def same_ids(path: Path, file: Path) -> None:
    """Text, and a conversation, become the ids that `file` (a tokenizer.json) gives."""
    tokenizer: Any = load_tokenizer(path)
    stock = Tokenizer.from_file(str(file))
    found, meant = tokenizer(TEXT)["input_ids"], stock.encode(TEXT).ids
    assert found == meant, f"text: {stock.decode(found)!r:.80} for {stock.decode(meant)!r:.80}"
    if tokenizer.chat_template:
        shown = tokenizer.apply_chat_template(CHAT_PROBE, tokenize=False, add_generation_prompt=True)
        found = tokenizer.apply_chat_template(CHAT_PROBE, add_generation_prompt=True, return_dict=True)["input_ids"]
        meant = stock.encode(shown, add_special_tokens=False).ids
        assert found == meant, "a conversation becomes other ids than tokenizer.json gives"


def close(found: torch.Tensor, meant: torch.Tensor) -> None:
    difference, largest = float((found - meant).abs().max()), float(meant.abs().max())
    assert difference <= ROUNDING * largest, f"logits differ by {difference:.2g} of {largest:.2g}"


def first_line(error: CtxextError, subject: Subject) -> str:
    text = error.message.splitlines()[0].partition(";")[0].removeprefix(f"{subject.path}: ")
    return f"refused: {text}"


# The quick half.
def doctor(subject: Subject) -> str:
    found = {finding.name: finding for finding in examine(str(subject.path)) if finding.status == "failure"}
    if not subject.supported and set(found) == {"config"}:
        return f"refused: {found['config'].found.partition(';')[0]}"
    assert not found, "; ".join(f"{name}: {finding.found}" for name, finding in found.items())
    return YES


def plan(subject: Subject) -> str:
    answer = api.plan(subject.path, "8k", gpu="h100")
    assert answer.as_dict()
    return YES


def ids(subject: Subject) -> str:
    same_ids(subject.path, subject.path / "tokenizer.json")
    return YES


def logits(subject: Subject) -> str:
    loaded = load_model(str(subject.path), device="cpu")
    with torch.no_grad():
        close(loaded.model(subject.ids, use_cache=False).logits, subject.logits)
    return YES


def convert(subject: Subject) -> str:
    """The layout that the source has, in the class of a conversion: the source's logits, to the last bit."""
    kinds, out = resolve(str(subject.path)).kinds, subject.place / "same-layout"
    window = max((kind.sliding_window or 0 for kind in kinds), default=0) or None
    pattern = "".join(kind.letter for kind in kinds)
    run_conversion(plan_conversion(str(subject.path), pattern, sliding_window=window, out=out), gate=False)
    found = stock_logits(out, subject.ids)
    assert torch.equal(found, subject.logits), f"logits differ by {float((found - subject.logits).abs().max()):.2g}"
    subject.made["same layout"] = out
    return YES


def converted_ids(subject: Subject) -> str:
    if "same layout" not in subject.made:
        convert(subject)
    same_ids(subject.made["same layout"], subject.path / "tokenizer.json")
    return YES


# The slow half.
def retrofit(subject: Subject) -> str:
    """A hybrid layout with its gate: identity 0, and equal to the walk by hand."""
    out = subject.place / "hybrid"
    letter = "F" if subject.row.model_type == "qwen3" else "N"
    report = api.convert(subject.path, f"S{letter}", sliding_window=8, out=out)
    assert report.gate is not None and report.gate["identity_max_diff"] == 0
    subject.made["hybrid"] = out
    return YES


def certify(subject: Subject) -> str:
    certificate = verify(plan_launch(str(subject.path), ctx=96), device="cpu")
    assert not certificate.failed, certificate.failed
    return YES


def evaluate(subject: Subject) -> str:
    """Perplexity of one window, against exp of the mean loss of stock transformers on tokenizer.json's ids."""
    report = api.evaluate(
        subject.path, suite="perplexity", lengths=[128], limit=128, data=str(subject.text), protocol="truncate",
        dtype="float32", out=subject.place / "eval",
    )  # fmt: skip
    stock = Tokenizer.from_file(str(subject.path / "tokenizer.json"))
    meant = torch.tensor([stock.encode(subject.text.read_text("utf-8"), add_special_tokens=False).ids[:128]])
    scores = torch.log_softmax(stock_logits(subject.path, meant)[0, :-1], -1)
    losses = -scores.gather(1, meant[0, 1:, None])
    found, loss = report.rows()[0]["value"], float(losses.mean())
    assert math.isclose(math.log(found), loss, rel_tol=1e-5), f"perplexity {found:.6g}, stock {math.exp(loss):.6g}"
    return YES


def finetune(subject: Subject) -> str:
    """One step, and the adapter opened again."""
    run = subject.place / "run"
    api.finetune(subject.path, ctx=128, preset="smoke", steps=1, data=str(subject.text), out=run)
    subject.made["run"] = run
    same_ids(run, subject.path / "tokenizer.json")
    return YES


def merge(subject: Subject) -> str:
    """The merged model in stock transformers, against the live adapter."""
    if "run" not in subject.made:
        finetune(subject)
    out = subject.place / "merged"
    api.merge(subject.made["run"], out=out, dtype="float32")
    loaded = load_model(str(subject.made["run"]), device="cpu")
    with torch.no_grad():
        close(stock_logits(out, subject.ids), loaded.model(subject.ids, use_cache=False).logits)
    same_ids(out, subject.path / "tokenizer.json")
    subject.made["merged"] = out
    return YES


def give_away(subject: Subject) -> str:
    """The export for transformers: the same logits and ids as what was exported."""
    out = subject.place / "export"
    export(plan_export(str(subject.path), "hf", out))
    assert torch.equal(stock_logits(out, subject.ids), subject.logits)
    same_ids(out, subject.path / "tokenizer.json")
    return YES


Station = Callable[[Subject], str]
QUICK: dict[str, Station] = {
    "doctor": doctor, "plan": plan, "ids": ids, "logits": logits, "convert": convert,
    "ids after convert": converted_ids,
}  # fmt: skip
SLOW: dict[str, Station] = {
    "retrofit": retrofit, "verify": certify, "eval": evaluate, "finetune": finetune, "merge": merge,
    "export": give_away,
}  # fmt: skip
STATIONS = QUICK | SLOW


def outcome(station: str, subject: Subject) -> str:
    """`YES`, or the refusal of this station."""
    try:
        return STATIONS[station](subject)
    except CtxextError as error:
        return first_line(error, subject)
