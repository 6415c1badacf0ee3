"""The training loop, top to bottom. What it needs is handed in; what it learns goes to metrics.jsonl.

Shapes: b sequences of a micro-batch, T tokens (ctx).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from ctxext.data.mixture import Sequences
from ctxext.data.packing import Packed
from ctxext.errors import CheckFailed, EnvironmentFault, ModelError
from ctxext.ops.masks import check_document_starts
from ctxext.train.checkpoint import TrainingState, discard_after, load_newest, newest_step, save_checkpoint
from ctxext.train.engine import Engine
from ctxext.train.metrics import STEPS, VALIDATIONS, JsonLines, StepMetrics, memory_in_use, peak_flops
from ctxext.train.optimizer import RelativeClip, rate_factor
from ctxext.train.passkey import in_words
from ctxext.train.plan import RunPlan
from ctxext.train.run import way_out
from ctxext.train.sinks import untrained_cost
from ctxext.train.validation import HeldOut, Validation, complaint, validate

LOSS_MEMORY, LOSS_WARM_STEPS = 0.95, 5  # of the running mean that a spike is judged by


@dataclass
class Events:
    """Where a run talks while it works; each is called with what its name says."""

    say: Callable[[str], None] = lambda line: None
    on_step: Callable[[StepMetrics], None] = lambda metrics: None
    on_validation: Callable[[Validation], None] = lambda validation: None


def train(
    engine: Engine,
    sequences: Sequences,
    held_out: HeldOut | None,
    plan: RunPlan,
    run: Path,
    progress: TrainingState,
    events: Events,
) -> tuple[TrainingState, bool]:
    """Train from `progress` to the plan's `stop`, or to Ctrl-C or SIGTERM: (how far it came, whether it was stopped).

    Either way a checkpoint of the last step done lies on the disk. Where it cannot be written, an earlier one costs a
    warning; the one that a later process or the next context starts from raises EnvironmentFault; the last one of the
    run is left to the result, which is written next. A loss or gradient that is not finite and a spike of the loss end
    in a rollback or in CheckFailed, as the spec says. `held_out` None is no validation.
    """
    spec, steps, saved_at, writes = plan.spec, plan.steps, time.monotonic(), engine.rank == 0
    log = JsonLines(run / STEPS, progress.done, writes=writes, say=events.say)
    held_out_log = JsonLines(run / VALIDATIONS, progress.done, writes=writes, say=events.say)

    def flush() -> None:
        # A checkpoint may not be ahead of the lines that tell of its steps.
        held_out_log.flush()
        log.flush()

    peak = engine.world * peak_flops(engine.device, spec.dtype)
    engine.model.train()
    with _interruption() as interrupted, closing(log), closing(held_out_log):
        if held_out and progress.validation is None:
            first = validate(engine, held_out, plan, progress.done)
            held_out_log.append(first.as_dict())
            events.on_validation(first)
            short = first.short if progress.short_first is None else progress.short_first
            progress = replace(progress, validation=first.as_dict(), best_loss=first.loss, short_first=short)
        if progress.done == plan.first and (line := untrained_cost(engine, sequences.sequence(0), plan)):
            events.say(line)
        while progress.done < plan.stop:
            began, step = time.monotonic(), progress.done
            start = step * plan.global_batch_size
            if step > 0 and plan.objective_at(step) != plan.objective_at(step - 1):  # another scale of losses
                progress, engine.clip = progress.at_next_objective(), RelativeClip(spec.optimizer.clip)
            mine = range(start + engine.rank, start + plan.global_batch_size, engine.world)
            loss = forward_backward(engine, [sequences.sequence(i) for i in mine], plan, step)
            if step == 0 and not math.isfinite(loss):
                raise ModelError("the loss is not finite before anything was trained: the model's weights are damaged")
            why, factor = _spike(loss, progress, plan), progress.rate * rate_factor(step, steps, spec.optimizer)
            if why is None:
                norm, scale = engine.step(factor)
                why = None if math.isfinite(norm) else f"the gradient norm is {norm}"
            if why is not None:
                progress = _roll_back(f"step {step + 1}: {why}", engine, progress, plan, run, events)
                log.cut_back(progress.done)
                held_out_log.cut_back(progress.done)
                continue
            progress = _advance(progress, loss, plan)
            seconds, tokens = time.monotonic() - began, plan.tokens_after(progress.done)
            speeds = plan.tokens_per_step / seconds, plan.step_flops / seconds
            mfu = plan.model_flops / seconds / peak if peak else None
            memory = memory_in_use(engine.device)
            metrics = StepMetrics(step + 1, loss, factor, norm, scale, tokens, *speeds, memory, seconds, mfu)
            log.append(metrics.as_dict())
            events.on_step(metrics)
            last, every = progress.done == plan.stop, spec.validation.every_steps
            if held_out and (last or (every is not None and progress.done % every == 0)):
                now = validate(engine, held_out, plan, progress.done)
                held_out_log.append(now.as_dict())
                progress = _note_validation(now, progress, events)
            late = spec.faults.save_minutes is not None and time.monotonic() - saved_at >= 60 * spec.faults.save_minutes
            stop, late = (flag > 0 for flag in engine.total(interrupted(), late))  # one rank's word is every rank's
            best = progress.best_step == progress.done
            if last or stop or late or best or step == 0 or progress.done % spec.faults.save_steps == 0:
                failed = save_checkpoint(run, progress, engine, keep=spec.faults.keep, say=events.say, before=flush)
                saved_at = time.monotonic()
                if failed and (stop or last) and progress.done < steps:
                    raise _not_saved(failed, progress, run, stopped=stop)
            if stop:
                return progress, True
    return progress, False


def _not_saved(why: str, progress: TrainingState, run: Path, *, stopped: bool) -> EnvironmentFault:
    """A run cannot go on without the checkpoint that was to be written now."""
    needed, newest = "the run was stopped" if stopped else "the next context starts from it", newest_step(run)
    before = f"the newest one is of step {newest}" if newest else "there is none before it"
    return EnvironmentFault(
        f"the checkpoint after step {progress.done} was not written, and {needed}: {why}; {before}", hint=way_out(run)
    )


def forward_backward(engine: Engine, batch: list[Packed], plan: RunPlan, step: int) -> float:
    """Add up the gradient of one step over this rank's sequences; the loss of all ranks, in nats a token."""
    spec, device = plan.spec, engine.device
    group_size, shift = plan.attention_at(step)
    (labels_in_step,) = engine.total(sum(int((packed.labels >= 0).sum()) for packed in batch))
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(batch), spec.micro_batch_size):
        micro = batch[start : start + spec.micro_batch_size]
        tokens, starts, labels = (torch.stack(column) for column in zip(*micro, strict=True))  # (b, T)
        check_document_starts(starts, B=len(micro), T=spec.ctx)
        loss_sum = engine.loss(
            tokens.to(device),
            labels.to(device),
            group_size=group_size,
            shift=shift,
            sink_tokens=plan.sink_tokens or 0,
            document_starts=starts if spec.data.document_mask else None,  # read on the CPU, kept there
            backend=spec.attention.backend,
            objective=plan.objective_at(step),
        )
        engine.backward(loss_sum / labels_in_step)  # every token of the step weighs the same
        loss += loss_sum.detach()
    (total,) = engine.total(loss.item())
    return total / labels_in_step


def _spike(loss: float, progress: TrainingState, plan: RunPlan) -> str | None:
    """Why a loss is not to be learned from, in words; None for an ordinary one."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if progress.loss_seen >= LOSS_WARM_STEPS and loss > progress.loss_mean + plan.spec.faults.spike:
        return f"the loss is {loss:.2f}, its running mean {progress.loss_mean:.2f}"
    return None


def _advance(progress: TrainingState, loss: float, plan: RunPlan) -> TrainingState:
    weight = max(1 - LOSS_MEMORY, 1 / (progress.loss_seen + 1))
    mean = progress.loss_mean + weight * (loss - progress.loss_mean)
    first = loss if progress.loss_seen == 0 else progress.first_loss
    return replace(progress, done=progress.done + 1, loss_mean=mean, loss_seen=progress.loss_seen + 1, first_loss=first)


def _note_validation(now: Validation, progress: TrainingState, events: Events) -> TrainingState:
    """Say what it says, and remember the best."""
    events.say(f"step {now.step}: held-out loss {now.loss:.4f}" + (f", {in_words(now.passkey)}" if now.passkey else ""))
    events.on_validation(now)
    if progress.validation and (text := complaint(Validation(**progress.validation), now, progress)):
        events.say(text)
    if progress.best_loss is None or now.loss < progress.best_loss:
        return replace(progress, best_step=now.step, best_loss=now.loss)
    return progress


def _roll_back(
    why: str, engine: Engine, progress: TrainingState, plan: RunPlan, run: Path, events: Events
) -> TrainingState:
    """Back to the newest checkpoint at half the learning rates, once; then, or by policy, stop."""
    hint = "lower optimizer.learning_rate or lora.multiplier; the checkpoints before it are kept"
    if plan.spec.faults.on_divergence == "stop" or progress.rollbacks:
        raise CheckFailed(f"{why}; stopped" + (", having rolled back once" if progress.rollbacks else ""), hint=hint)
    restored = load_newest(run, engine, events.say)
    if restored is None:
        raise CheckFailed(f"{why}; there is no checkpoint to go back to", hint=hint)
    events.say(f"{why}: back to step {restored.done}, with the learning rates halved from here on")
    engine.total()  # no rank is reading any longer
    if engine.rank == 0:
        discard_after(run, restored.done)
    if 0 < restored.done == plan.first:  # of the shorter context before: its losses are none to judge this one by
        restored = restored.at_next_ctx()
    return replace(restored, rate=restored.rate / 2, rollbacks=(*restored.rollbacks, why))


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
