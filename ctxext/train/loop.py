"""The training loop, top to bottom. The caller passes everything it needs; each step's numbers go to metrics.jsonl.

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
from ctxext.train.run_directory import resume_hint
from ctxext.train.run_plan import RunPlan
from ctxext.train.sink_tokens import untrained_cost
from ctxext.train.token_weights import step_weights
from ctxext.train.validation import HeldOut, Validation, complaint, validate

LOSS_MEMORY, LOSS_WARM_STEPS = 0.95, 5  # decay and warm-up of the running mean that a spike is compared with


@dataclass
class Events:
    """Callbacks of a run: `say` for each log line, `on_step` after each step, `on_validation` after each validation."""

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
    """Trains from `progress` to the plan's `stop`, or to Ctrl-C or SIGTERM.

    Returns (the state after the last step done, whether a signal stopped the run). In both cases it writes a checkpoint
    of the last step done. After a rollback to a checkpoint of an earlier context it returns the state of that
    checkpoint, before `plan.first`: the caller trains that context again. What happens when a checkpoint cannot be
    written depends on its use:

        a later process or the next context starts from it    raises EnvironmentFault
        the last one of the run                               a warning: the result is written next
        any other                                             a warning

    A loss or gradient norm that is not finite, or a spike of the loss, causes a rollback or raises CheckFailed, as the
    spec says. A first loss that is not finite raises ModelError. `held_out` None: the run has no validation.
    """
    spec, steps, saved_at, writes = plan.spec, plan.steps, time.monotonic(), engine.rank == 0
    log = JsonLines(run / STEPS, progress.done, writes=writes, say=events.say)
    held_out_log = JsonLines(run / VALIDATIONS, progress.done, writes=writes, say=events.say)

    def flush() -> None:
        # The log lines of a step must be on disk before a checkpoint that includes this step.
        held_out_log.flush()
        log.flush()

    peak = engine.world * peak_flops(engine.device, spec.dtype)  # FLOP/s of all devices; 0 where unknown
    engine.model.train()
    with _interruption() as interrupted, closing(log), closing(held_out_log):
        # Baseline of this context, before its first step. Later validations are compared with it. A resumed run has it
        # in its checkpoint. `short_first` keeps the value of the first context.
        if held_out and progress.validation is None:
            first = validate(engine, held_out, plan, progress.done)
            held_out_log.append(first.as_dict())
            events.on_validation(first)
            short = first.short if progress.short_first is None else progress.short_first
            progress = replace(progress, validation=first.as_dict(), best_loss=first.loss, short_first=short)
        # Log how much worse the training attention makes the model before any step at this context.
        if progress.done == plan.first and (line := untrained_cost(engine, sequences.sequence(0), plan)):
            events.say(line)
        # A rollback can go back into an earlier context, which has another plan: leave the loop.
        while plan.first <= progress.done < plan.stop:
            began, step = time.monotonic(), progress.done
            start = step * plan.global_batch_size
            # A new objective has losses and gradients of another scale: restart both running means.
            if step > 0 and plan.objective_at(step) != plan.objective_at(step - 1):
                progress, engine.clip = progress.at_next_objective(), RelativeClip(spec.optimizer.clip)
            # Ranks take the step's sequences in turn. The step alone decides which sequences it reads.
            mine = range(start + engine.rank, start + plan.global_batch_size, engine.world)
            loss = forward_backward(engine, [sequences.sequence(i) for i in mine], plan, step)
            if step == 0 and not math.isfinite(loss):
                raise ModelError("the loss is not finite before the first update: the model's weights are damaged")
            # Check the loss before the update: the gradient of a bad loss must not reach the weights.
            why, factor = _spike(loss, progress, plan), progress.rate * rate_factor(step, steps, spec.optimizer)
            if why is None:
                norm, scale = engine.step(factor)
                why = None if math.isfinite(norm) else f"the gradient norm is {norm}"
            if why is not None:
                progress = _roll_back(f"step {step + 1}: {why}", engine, progress, plan, run, events)
                # The run repeats the steps after the checkpoint: remove their lines from both files.
                log.cut_back(progress.done)
                held_out_log.cut_back(progress.done)
                continue
            progress = _advance(progress, loss, plan)
            # Measure and log the step. `seconds` does not include validation and checkpoint.
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
            # All-reduce, so that all ranks stop or save together.
            stop, late = (flag > 0 for flag in engine.total(interrupted(), late))
            best = progress.best_step == progress.done
            # The first step is always saved, so that an early rollback finds a checkpoint.
            if last or stop or late or best or step == 0 or progress.done % spec.faults.save_steps == 0:
                failed = save_checkpoint(run, progress, engine, keep=spec.faults.keep, say=events.say, before=flush)
                saved_at = time.monotonic()
                # The run cannot continue later without this checkpoint. The last one of the run is not needed.
                if failed and (stop or last) and progress.done < steps:
                    raise _not_saved(failed, progress, run, stopped=stop)
            if stop:
                return progress, True
    return progress, False


def _not_saved(why: str, progress: TrainingState, run: Path, *, stopped: bool) -> EnvironmentFault:
    """The error for a checkpoint that a later process or the next context needs and that was not written."""
    needed, newest = "the run was stopped" if stopped else "the next context starts from it", newest_step(run)
    before = f"the newest checkpoint is of step {newest}" if newest else "there is no earlier checkpoint"
    return EnvironmentFault(
        f"the checkpoint after step {progress.done} was not written, and {needed}: {why}; {before}",
        hint=resume_hint(run),
    )


def forward_backward(engine: Engine, batch: list[Packed], plan: RunPlan, step: int) -> float:
    """Accumulates the gradient of one step over this rank's sequences.

    Returns the mean loss of the step over all ranks, in nats a token.
    """
    spec, device = plan.spec, engine.device
    group_size, shift = plan.attention_at(step)
    micros = [
        tuple(torch.stack(column) for column in zip(*batch[start : start + spec.micro_batch_size], strict=True))
        for start in range(0, len(batch), spec.micro_batch_size)
    ]  # tokens, document starts and labels, (b, T) each
    attention = {
        "group_size": group_size,
        "shift": shift,
        "sink_tokens": plan.sink_tokens or 0,
        "backend": spec.attention.backend,
    }
    weights = step_weights(spec, engine, micros, attention)
    # The divisor counts the scored labels of all ranks and micro-batches, so that every token of the step weighs the
    # same. It must be known before the first backward pass.
    (divisor,) = engine.total(
        sum(
            int((labels >= 0).sum()) if weight is None else float(weight[labels >= 0].double().sum())
            for (_, _, labels), weight in zip(micros, weights, strict=True)
        )
    )
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for (tokens, starts, labels), weight in zip(micros, weights, strict=True):
        check_document_starts(starts, B=len(tokens), T=spec.ctx)
        loss_sum = engine.loss(
            tokens.to(device),
            labels.to(device),
            document_starts=starts if spec.data.document_mask else None,  # stays on the CPU, where it is read
            objective=plan.objective_at(step),
            token_weights=None if weight is None else weight.to(device),
            **attention,
        )
        engine.backward(loss_sum / divisor)
        loss += loss_sum.detach()
    (total,) = engine.total(loss.item())
    return total / divisor


def _spike(loss: float, progress: TrainingState, plan: RunPlan) -> str | None:
    """The reason not to train on this loss, in words; None for an ordinary loss.

    A spike is a loss above the running mean by more than `faults.spike`, after LOSS_WARM_STEPS steps.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if progress.loss_seen >= LOSS_WARM_STEPS and loss > progress.loss_mean + plan.spec.faults.spike:
        return f"the loss is {loss:.2f}, its running mean {progress.loss_mean:.2f}"
    return None


def _advance(progress: TrainingState, loss: float, plan: RunPlan) -> TrainingState:
    # The running mean is the mean of all losses at first, then exponential with a decay of LOSS_MEMORY.
    weight = max(1 - LOSS_MEMORY, 1 / (progress.loss_seen + 1))
    mean = progress.loss_mean + weight * (loss - progress.loss_mean)
    first = loss if progress.loss_seen == 0 else progress.first_loss
    return replace(progress, done=progress.done + 1, loss_mean=mean, loss_seen=progress.loss_seen + 1, first_loss=first)


def _note_validation(now: Validation, progress: TrainingState, events: Events) -> TrainingState:
    """Logs a validation, warns where the held-out loss rises while the training loss falls, and records the best."""
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
    """Loads the newest checkpoint and halves the learning rates. Returns the state to continue from.

    Raises CheckFailed where the spec says stop, at the second divergence of a run, or where there is no checkpoint.
    """
    hint = "lower optimizer.learning_rate or lora.multiplier; the earlier checkpoints are kept"
    if plan.spec.faults.on_divergence == "stop" or progress.rollbacks:
        raise CheckFailed(f"{why}; stopped" + (" after one rollback" if progress.rollbacks else ""), hint=hint)
    restored = load_newest(run, engine, events.say)
    if restored is None:
        raise CheckFailed(f"{why}; there is no checkpoint to return to", hint=hint)
    events.say(f"{why}: training continues from the checkpoint of step {restored.done}, at half the learning rates")
    engine.total()  # a barrier: rank 0 deletes checkpoints only after every rank has read its own
    if engine.rank == 0:
        discard_after(run, restored.done)
    # This checkpoint ends the shorter context. Its losses are not comparable with those of this context, whose baseline
    # was measured with the weights of this checkpoint.
    if 0 < restored.done == plan.first:
        baseline = progress.validation
        best = None if baseline is None else baseline["loss"]
        restored = replace(restored.at_next_ctx(), validation=baseline, best_loss=best)
    return replace(restored, rate=restored.rate / 2, rollbacks=(*restored.rollbacks, why))


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGINT or SIGTERM arrived.

    The first signal is only recorded, so that the loop can save. A second one of the same kind goes to the previous
    handler, which acts at once.
    """
    arrived: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    # The handler restores the previous one, so that a second signal of this kind goes there.
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
