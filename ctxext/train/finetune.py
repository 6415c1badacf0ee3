"""A RunPlan carried out: data tokenised, model built, trained, saved. One directory is the whole run.

run/spec.yaml       the model and the resolved spec; with it a run can be resumed or repeated
run/metrics.jsonl   one line a step
run/checkpoints/    the newest two
run/...             the bundle (train/bundle.py), written when the last step is done
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ctxext.data import corpus, synthetic
from ctxext.data.documents import EMBEDDED, Document, fingerprint, read_documents
from ctxext.data.packing import PackedSequences, attended_share, tokenise, tokenizer_hash
from ctxext.errors import InputError
from ctxext.model.adapters import attach
from ctxext.model.load import build_model, load_tokenizer
from ctxext.ops.backends.choice import Call, choose
from ctxext.ops.masks import Pattern
from ctxext.train import metrics
from ctxext.train.bundle import save_bundle
from ctxext.train.checkpoint import Progress, load_newest
from ctxext.train.engine import LocalEngine
from ctxext.train.loop import Events, train
from ctxext.train.plan import RunPlan
from ctxext.units import format_duration, format_flops

NO_CHECKPOINT = "no checkpoint was written before the run ended: it starts from its first step"
LITTLE_HISTORY = 0.05  # of the tokens; below this share a run at this ctx teaches next to nothing long
MATMUL_SHARE = 0.5  # of a large matmul's speed that a step reaches, as a first guess; the progress bar knows better
MOST_CHARACTERS = 64_000_000  # of the embedded corpus tokenised at once; longer runs repeat it


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did. `finished` is False when it was interrupted; memory in bytes.

    spikes     steps whose gradient was far above its running norm and was scaled down (optimizer.RelativeClip)
    rollbacks  times it went back to a checkpoint because the loss or the gradient went wrong
    """

    out: str
    finished: bool
    steps_done: int
    steps: int
    first_loss: float | None
    final_loss: float | None
    seconds: float
    peak_memory: int
    spikes: int
    rollbacks: int
    trained_tensors: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_finetune(plan: RunPlan, run: Path, *, resume: bool = False, events: Events | None = None) -> FinetuneReport:
    """Train and save. Ctrl-C ends it early with a checkpoint; `resume` goes on from the newest one, exactly."""
    events = events or Events()
    began = time.monotonic()
    torch.manual_seed(plan.spec.seed)
    device, dtype = training_device(plan)
    events.say(f"attention: {backends(plan, device, dtype)} ({device.type}, {str(dtype).removeprefix('torch.')})")
    sequences = prepare_data(plan, events)
    model = _model(plan, device, dtype)
    engine = LocalEngine(model, plan.spec.optimizer)
    progress = load_newest(run, engine, events.say) if resume else None
    if resume:
        events.say(f"resuming after step {progress.done} of {plan.steps}" if progress else NO_CHECKPOINT)
    progress = progress or Progress()
    rate = MATMUL_SHARE * _matmul_rate(next(model.parameters()))
    estimate = (plan.steps - progress.done) * plan.step_flops / rate
    events.say(
        f"estimated time: {format_duration(estimate)} (at {format_flops(rate)}/s, half of a matmul's speed here)"
    )
    progress = train(engine, sequences, plan, run, progress, events)
    done, lines = progress.done, metrics.read(run)
    first, last = (lines[0]["loss"], lines[-1]["loss"]) if lines else (None, None)
    peak = max((line["memory"] for line in lines), default=0)
    spikes = sum(line["gradient_scale"] < 1.0 for line in lines)
    finished = done == plan.steps
    count = None
    if finished:
        facts = {
            "first_loss": first,
            "final_loss": last,
            "steps": done,
            "tokens": done * plan.tokens_per_step,
            "seconds": round(time.monotonic() - began, 1),
            "peak_memory": peak,
            "rollbacks": list(progress.rollbacks),
            "data": {"source": plan.spec.data.source, "fingerprint": sequences.store.meta.source},
        }
        count = save_bundle(run, plan, model, engine.masters(), facts)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return FinetuneReport(
        out=str(run),
        finished=finished,
        steps_done=done,
        steps=plan.steps,
        first_loss=first,
        final_loss=last,
        seconds=round(time.monotonic() - began, 1),
        peak_memory=peak,
        spikes=spikes,
        rollbacks=len(progress.rollbacks),
        trained_tensors=count,
    )


def prepare_data(plan: RunPlan, events: Events) -> PackedSequences:
    """Tokenise what the spec names, once, into the user's cache; sequences of exactly ctx tokens."""
    spec = plan.spec
    tokenizer = load_tokenizer(plan.source.directory)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{plan.source.name}: its tokenizer has no EOS token, which ends every document")
    documents, print_ = _documents(plan, tokenizer)
    key = hashlib.sha256(f"{print_} {tokenizer_hash(tokenizer)}".encode()).hexdigest()[:24]
    store = tokenise(documents, tokenizer, _cache() / key, eos_id=tokenizer.eos_token_id, source_fingerprint=print_)
    if spec.data.source == EMBEDDED:
        events.say(
            f"data: the embedded corpus (this Python's standard library, {spec.data.synthetic_fraction:.0%} of it "
            f"synthetic: {', '.join(spec.data.synthetic_kinds)})"
        )
    share = attended_share(store, spec.ctx)
    if spec.data.document_mask and share < LITTLE_HISTORY:
        events.say(
            f"warning: only {share:.1%} of the tokens see half of ctx: the documents are short, little of "
            f"{spec.ctx:,} tokens will be learned; longer documents, or data.document_mask=false"
        )
    return PackedSequences(store, spec.ctx, seed=spec.seed, document_mask=spec.data.document_mask)


def _documents(plan: RunPlan, tokenizer: Any) -> tuple[Iterator[Document], str]:
    """What to tokenise, and a hash of it."""
    data = plan.spec.data
    if data.source != EMBEDDED:
        return read_documents(data.source, text_field=data.text_field), fingerprint(
            data.source, text_field=data.text_field
        )
    sample = "".join(document.text for document in corpus.stdlib_documents("held-out")[:8])
    per_token = len(sample) / len(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
    needed = plan.steps * plan.tokens_per_step * per_token * 1.2 + plan.spec.ctx * per_token
    arguments: dict[str, Any] = {
        "seed": plan.spec.seed,
        "synthetic_fraction": data.synthetic_fraction,
        "kinds": data.synthetic_kinds,
        "span_chars": max(int(plan.spec.ctx * per_token), synthetic.MIN_SPAN_CHARS),
        "max_chars": int(min(needed, MOST_CHARACTERS)),
    }
    print_ = hashlib.sha256(f"{corpus.fingerprint()['sha256']} {arguments}".encode()).hexdigest()
    return corpus.corpus_documents("train", **arguments), print_


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxext" / "tokens"


def _matmul_rate(like: torch.Tensor) -> float:
    """FLOP/s of a large matmul in the dtype and on the device that train: the ceiling of a run."""
    a = torch.randn(1024, 1024, device=like.device).to(like.dtype)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()  # item waits for the device
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best


def training_device(plan: RunPlan) -> tuple[torch.device, torch.dtype]:
    """Where a plan trains here, and in what."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, default if plan.spec.dtype == "auto" else getattr(torch, plan.spec.dtype)


def backends(plan: RunPlan, device: torch.device, dtype: torch.dtype) -> str:
    """What serves each kind of layer, in words. Raises EnvironmentFault where the backend that was named cannot."""
    said, spec = list[str](), plan.spec
    for window in sorted({kind.sliding_window for kind in plan.kinds}, key=lambda W: (W is None, W)):
        pattern = Pattern(window, plan.group_size if window is None else None)
        call = Call(device, dtype, plan.source.shape.head_dim, pattern, packed=spec.data.document_mask)
        name = "full layers" if pattern == Pattern() else f"sliding {window}" if window else f"S² {plan.group_size}"
        said.append(f"{name} by {choose(call, spec.attention.backend)}")
    return ", ".join(said)


def _model(plan: RunPlan, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with its new positions and what trains attached, on the device it trains on."""
    model: Any = build_model(plan.source.directory, plan.config, dtype)
    if plan.spec.memory.checkpoint:
        # transformers renamed it within the versions supported here
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if plan.spec.tuning == "lora":
        model = attach(model, plan.trainables, plan.spec.lora.rank, str(plan.source.directory.absolute()))
    else:
        model.requires_grad_(True)
    return model.to(device)
