"""The training loop, top to bottom. What it needs is handed in; what it learns goes to metrics.jsonl.

Shapes: b sequences of a micro-batch, T tokens (ctx), E model width, V vocabulary.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from ctxext.data.packing import PackedSequences
from ctxext.errors import CheckFailed, ModelError
from ctxext.model.load import hidden_states, output_weight
from ctxext.ops.masks import check_document_starts
from ctxext.train.checkpoint import save_checkpoint
from ctxext.train.loss import linear_cross_entropy
from ctxext.train.optimizer import MasterAdamW, RelativeClip, rate_factor
from ctxext.train.plan import RunPlan


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Loss in nats a token, norm before clipping, memory in bytes, seconds of this step."""

    step: int
    loss: float
    learning_rate_factor: float
    gradient_norm: float
    gradient_scale: float
    tokens: int
    tokens_per_second: float
    memory: int
    seconds: float


def train(
    model: Any,
    optimizer: MasterAdamW,
    clip: RelativeClip,
    sequences: PackedSequences,
    plan: RunPlan,
    run: Path,
    *,
    done: int = 0,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
) -> int:
    """Train from step `done` to the plan's last; returns the number of steps done.

    Ctrl-C (or SIGTERM) finishes the step at hand, saves a checkpoint and returns early. Raises CheckFailed when the
    loss or a gradient is no longer finite; the last checkpoint is then the one to go back to.
    """
    spec, device = plan.spec, next(model.parameters()).device
    model.train()
    metrics_file = _metrics_file(run, done)
    with _interruption() as interrupted, metrics_file.open("a", encoding="utf-8") as log:
        for step in range(done, plan.steps):
            began = time.monotonic()
            first = step * plan.global_batch_size
            batch = [sequences.sequence(first + i) for i in range(plan.global_batch_size)]
            labels_in_step = sum(int((packed.labels >= 0).sum()) for packed in batch)
            loss = 0.0
            for start in range(0, len(batch), spec.micro_batch_size):
                micro = batch[start : start + spec.micro_batch_size]
                tokens, starts, labels = (torch.stack(column) for column in zip(*micro, strict=True))  # (b, T)
                check_document_starts(starts, B=len(micro), T=spec.ctx)
                hidden = hidden_states(
                    model,
                    tokens.to(device),
                    group_size=plan.group_size,
                    document_starts=starts if spec.data.document_mask else None,  # read on the CPU, kept there
                    backend=spec.attention.backend,
                )  # (b, T, E)
                target = labels.flatten().to(device)
                loss_sum, _ = linear_cross_entropy(hidden.flatten(0, 1), output_weight(model), target)
                (loss_sum / labels_in_step).backward()  # every token of the step weighs the same
                loss += loss_sum.item() / labels_in_step
            norm = optimizer.gradient_norm()
            if step == 0 and not math.isfinite(loss):
                raise ModelError("the loss is not finite before anything was trained: the model's weights are damaged")
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise CheckFailed(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}",
                    hint="lower optimizer.learning_rate or lora.multiplier, then resume or start anew",
                )
            factor, scale = rate_factor(step, plan.steps, spec.optimizer), clip.scale(norm)
            optimizer.step(factor, scale)
            seconds = time.monotonic() - began
            count = plan.tokens_per_step
            metrics = StepMetrics(
                step + 1, loss, factor, norm, scale, (step + 1) * count, count / seconds, _memory(device), seconds
            )
            log.write(json.dumps(asdict(metrics)) + "\n")
            log.flush()
            on_step(metrics)
            if interrupted():
                save_checkpoint(run, step + 1, optimizer, clip)
                return step + 1
            if (step + 1) % spec.save_every == 0 or step + 1 == plan.steps:
                save_checkpoint(run, step + 1, optimizer, clip)
    return plan.steps


def _metrics_file(run: Path, done: int) -> Path:
    """metrics.jsonl cut back to the steps done, so that a resumed run writes each step once."""
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= done), "utf-8")
    return path


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGINT or SIGTERM arrived; a second one acts at once, as it always did."""
    arrived: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    for number in signals:
        signal.signal(number, note)
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _memory(device: torch.device) -> int:
    """Bytes in use: the process's resident set on a CPU, the allocator's peak on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
