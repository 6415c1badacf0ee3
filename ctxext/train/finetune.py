"""Runs a RunPlan: tokenises the data, builds the model, trains and saves. One directory holds the whole run.

run/spec.yaml       the model and the resolved spec; with it a run can be resumed or repeated
run/metrics.jsonl   one line per step
run/wandb-id.txt    the run's id at Weights & Biases, where telemetry.wandb is set (train/telemetry.py)
run/checkpoints/    the newest few, and the best by held-out loss
run/...             the bundle (train/bundle.py), written when the last step is done
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ctxext.config.output import disk_faults, environment_fault
from ctxext.data.mixture import Sequences
from ctxext.data.store import tokenizer_hash
from ctxext.errors import EnvironmentFault, InputError
from ctxext.model.adapters import attach
from ctxext.model.load import build_model, check_source, load_model, load_tokenizer
from ctxext.model.relayout import relayout
from ctxext.ops.backends.choice import AttentionCall, choose
from ctxext.train import metrics, recompute
from ctxext.train.bundle import save_bundle
from ctxext.train.checkpoint import TrainingState, discard_after, load_newest, newest_step
from ctxext.train.distill import TeacherModel
from ctxext.train.engine import Engine, LocalEngine
from ctxext.train.loop import Events, train
from ctxext.train.memory_options import explaining_out_of_memory
from ctxext.train.passkey import grid_cases
from ctxext.train.prepare import prepare_data, readings, training_device
from ctxext.train.run_directory import resume_hint
from ctxext.train.run_plan import RunPlan
from ctxext.train.same_data import changes_of_data
from ctxext.train.sink_tokens import sinks_of
from ctxext.train.teacher import teacher_weights
from ctxext.train.telemetry import with_writers
from ctxext.train.validation import HeldOut, check_short
from ctxext.train.zero import ZeroEngine, join
from ctxext.units import counted

NO_CHECKPOINT = "the run has no checkpoint; it starts at its first step"


@dataclass(frozen=True)
class FinetuneReport:
    """The result of a run. `finished` is False when the run was interrupted; memory in bytes.

    first_loss, final_loss  of the first and the last step at the last ctx and with the last objective
    held_out   loss on held-out text before the first and after the last step at ctx, under the attention of inference
    spikes     steps whose gradient norm was far above its running mean and was scaled down (optimizer.RelativeClip)
    rollbacks  times the run went back to a checkpoint because the loss or the gradient diverged
    seconds_per_step   the median; the first step is left out where there are more
    read       for each source the files, documents and tokens that were read, and what was skipped
    """

    out: str
    finished: bool
    steps_done: int
    steps: int
    first_loss: float | None
    final_loss: float | None
    held_out: tuple[float, float] | None
    seconds: float
    peak_memory: int
    spikes: int
    rollbacks: int
    trained_tensors: int | None
    seconds_per_step: float | None = None
    read: list[dict[str, Any]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        return asdict(self)


def run_finetune(
    plan: RunPlan,
    run: Path,
    *,
    resume: bool = False,
    events: Events | None = None,
    zero: Mapping[str, Any] | None = None,
) -> FinetuneReport:
    """Trains and saves a run. Returns its report.

    Ctrl-C ends the run early with a checkpoint. `resume` continues exactly from the newest checkpoint. `zero` is
    DeepSpeed's configuration: with it, this process is one of several of the run (train/launch.py).
    """
    began = time.monotonic()
    # Only rank 0 logs and writes telemetry.
    talks = zero is None or os.environ["RANK"] == "0"
    writers = with_writers(events or Events(), plan, run) if talks else nullcontext(Events())
    with disk_faults(run, hint=resume_hint(run)), writers as events:
        engine, sequences, progress, sink_tokens = _train_stages(plan, run, resume, events, zero)
        count = None
        # An interrupted run has no bundle yet: it is resumed.
        if progress.done == plan.steps:
            known = {
                "data": sequences.store.meta.source,
                "read": readings(sequences),
                "seconds": time.monotonic() - began,
                "sink_tokens": sink_tokens,
            }
            count = finish(plan, run, engine, progress, events, known)
        return report(plan, run, progress, count, time.monotonic() - began, readings(sequences))


def _train_stages(
    plan: RunPlan, run: Path, resume: bool, events: Events, zero: Mapping[str, Any] | None
) -> tuple[Engine, Sequences, TrainingState, int]:
    """Trains at each context in turn. Returns the last engine, its training data, the state and the sink tokens."""
    done, before = newest_step(run) if resume else 0, TrainingState()
    while True:
        # A stage is one context; most runs have one.
        stage = plan.stage_of(done)
        engine: Any = None
        # Free the memory of the stage before this one.
        gc.collect()
        with explaining_out_of_memory(stage):
            engine, sequences, held_out, sink_tokens = set_up(stage, events, zero)
            progress = load_newest(run, engine, events.say) if resume or done else None
        if resume:
            events.say(f"resuming after step {progress.done} of {plan.steps}" if progress else NO_CHECKPOINT)
        progress = progress or TrainingState()
        if resume:
            # Checkpoints later than the one loaded are damaged. Delete them once no rank reads any longer.
            engine.total()
            if engine.rank == 0:
                discard_after(run, progress.done)
        else:
            # A rollback into an earlier stage changed these after the checkpoint was written.
            progress = replace(progress, rate=before.rate, rollbacks=before.rollbacks)
        if plan.stage_of(progress.done) is not stage:
            # The newest checkpoint is damaged, and the one before it belongs to an earlier stage: set that one up.
            done = progress.done
            engine.close()
            continue
        # The losses in a state of a shorter context are not comparable with those of this one.
        if 0 < progress.done == stage.first or (progress.validation or {}).get("ctx", stage.spec.ctx) != stage.spec.ctx:
            progress = progress.at_next_ctx()
        stage = replace(stage, sink_tokens=sink_tokens)
        with explaining_out_of_memory(stage):
            progress, stopped = train(engine, sequences, held_out, stage, run, progress, events)
        done, before, resume = progress.done, progress, False
        if stopped or done >= plan.steps:
            return engine, sequences, progress, sink_tokens
        engine.close()


def set_up(
    plan: RunPlan, events: Events, zero: Mapping[str, Any] | None
) -> tuple[Engine, Sequences, HeldOut | None, int]:
    """Builds everything that the loop needs at one context.

    Returns (the engine with the model, the training sequences, the held-out data or None, the number of sink tokens of
    S²-Attn). Raises InputError where nothing is held out and validation.passkey or validation.max_short_ppl_increase is
    set.
    """
    torch.manual_seed(plan.spec.seed)
    device, dtype = training_device(plan)
    events.say(f"attention: {backends(plan, device, dtype)} ({device.type}, {str(dtype).removeprefix('torch.')})")
    _check_tokenizer(plan)
    # Join before the model loads: ZeRO-3 partitions a model while it loads.
    ranks = None if zero is None else join(zero, plan, dtype)
    # One rank of each host tokenises; the others then find the tokens in the cache.
    with ranks.one_a_host_first() if ranks else nullcontext():
        cases = grid_cases(plan)
        sequences, held = prepare_data(plan, events)
    wanted = {"passkey": cases, "max_short_ppl_increase": plan.spec.validation.max_short_ppl_increase}
    if held is None and (given := [name for name, value in wanted.items() if value]):
        message = f"validation.{given[0]}: there is no held-out text"
        raise InputError(message, hint="give longer text, or leave this field out")
    model = _model(plan, device, dtype)
    for note in recompute.enable(model, plan.spec.memory, plan.patterns):
        events.say(f"warning: {note}")
    teacher = _teacher(plan, model, dtype)
    engine = ZeroEngine(model, plan, ranks, teacher) if ranks else LocalEngine(model, plan.spec.optimizer, teacher)
    # The model has not trained yet. A resumed run loads its checkpoint later, so that it measures the same value here.
    sink_tokens = sinks_of(plan, engine, events.say)
    if device.type == "cuda":  # the peak of training, not of loading
        torch.cuda.reset_peak_memory_stats(device)
    return engine, sequences, HeldOut(held, cases) if held is not None else None, sink_tokens


def finish(
    plan: RunPlan, run: Path, engine: Engine, progress: TrainingState, events: Events, known: dict[str, Any]
) -> int | None:
    """Checks the limits of the spec, writes the bundle and removes the checkpoints unless the spec keeps them.

    Returns how many trained tensors were read back from disk and compared; None on ranks other than 0. Raises
    CheckFailed where perplexity at the original length rose by too much, EnvironmentFault where the disk is full or
    cannot be written.
    """
    spec, validations = plan.spec.validation, metrics.read(run / metrics.VALIDATIONS)
    if validations:
        check_short(progress.short_first, validations[-1]["short"], spec.max_short_ppl_increase)
    step = progress.done
    # `best`: load the weights of the best step, where this is not the last one. If none was better than the start, or
    # its checkpoint is gone, keep the last weights and warn.
    if spec.result == "best" and progress.validation and progress.best_step != step:
        if progress.best_step is not None and load_newest(run, engine, events.say, step=progress.best_step):
            step = progress.best_step
            events.say(f"the result is step {step}, which has the lowest held-out loss ({progress.best_loss:.4f})")
        else:
            why = "no step had a lower held-out loss than the start"
            if progress.best_step is not None:
                why = f"the checkpoint of step {progress.best_step}, the best by held-out loss, is missing or damaged"
            events.say(f"warning: {why}; the last weights are the result")
    # A collective call: every rank takes part before the others return.
    masters = engine.masters()
    if engine.rank > 0:  # another host may not see yet what rank 0 has written
        return None
    # A full disk may have kept the last lines out of the file. Without them the facts of the result are wrong.
    lines = metrics.read(run / metrics.STEPS)
    if not lines or lines[-1]["step"] != progress.done:
        raise _no_result(run, progress, f"{run / metrics.STEPS} lacks the last steps, because the disk was full")
    facts = {
        "first_loss": _comparable(plan, lines)[0]["loss"],
        "final_loss": lines[-1]["loss"],
        "steps": progress.done,
        "result_step": step,
        "tokens": plan.tokens,
        "seconds": round(known["seconds"], 1),
        "peak_memory": max(line["memory"] for line in lines),
        "rollbacks": list(progress.rollbacks),
        "sink_tokens": known["sink_tokens"],
        "validation": [progress.validation, validations[-1]] if progress.validation and validations else None,
        "data": {
            "source": plan.spec.data.described,
            "fingerprint": known["data"],
            "read": known["read"],
            "changed": list(changes_of_data(run)),
        },
    }
    try:
        count = save_bundle(run, plan, engine.model, masters, facts)
    except Exception as error:
        fault = error if isinstance(error, EnvironmentFault) else environment_fault(error, run)
        if fault is None:
            raise
        raise _no_result(run, progress, fault.message) from error
    if not plan.spec.faults.keep_at_end:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return count


def _no_result(run: Path, progress: TrainingState, why: str) -> EnvironmentFault:
    saved = newest_step(run)
    kept = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint"
    return EnvironmentFault(
        f"the result of {counted(progress.done, 'step')} was not written: {why}; {kept}", hint=resume_hint(run)
    )


def report(
    plan: RunPlan,
    run: Path,
    progress: TrainingState,
    count: int | None,
    seconds: float,
    read: list[dict[str, Any]] | None = None,
) -> FinetuneReport:
    """Builds the report of a run from its files. `count`: trained tensors; `read`: the result of `readings`."""
    lines = metrics.read(run / metrics.STEPS)
    validations = metrics.read(run / metrics.VALIDATIONS)
    # Losses at a shorter context are not comparable.
    held_out = [line["loss"] for line in validations if line["ctx"] == plan.spec.ctx]
    return FinetuneReport(
        out=str(run),
        finished=progress.done == plan.steps,
        steps_done=progress.done,
        steps=plan.steps,
        first_loss=_comparable(plan, lines)[0]["loss"] if lines else None,
        final_loss=lines[-1]["loss"] if lines else None,
        held_out=(held_out[0], held_out[-1]) if held_out else None,
        seconds=round(seconds, 1),
        peak_memory=max((line["memory"] for line in lines), default=0),
        spikes=sum(line["gradient_scale"] < 1.0 for line in lines),
        rollbacks=len(progress.rollbacks),
        trained_tensors=count,
        seconds_per_step=statistics.median(line["seconds"] for line in lines[1:] or lines) if lines else None,
        read=read,
    )


def _comparable(plan: RunPlan, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps whose losses are comparable with the last one's: the same ctx and the same objective."""
    last = lines[-1]["step"] - 1
    first, objective = plan.stage_of(last).first, plan.objective_at(last)
    return [line for line in lines if line["step"] > first and plan.objective_at(line["step"] - 1) == objective]


def backends(plan: RunPlan, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the attention backend of each kind of layer, in words.

    Raises EnvironmentFault where the backend that the spec names cannot run here.
    """
    described, spec = list[str](), plan.spec
    for pattern in sorted(set(plan.patterns), key=lambda pattern: pattern.sliding_window or plan.spec.ctx):
        W, G = pattern.sliding_window, pattern.group_size
        name = f"sliding {W}" if W else f"S² {G}" if G else "full layers"
        call = AttentionCall(device, dtype, plan.source.shape.head_dim, pattern, packed=spec.data.document_mask)
        described.append(f"{name} by {choose(call, spec.attention.backend)}")
    return ", ".join(described)


def _model(plan: RunPlan, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with its new positions and with its trainable parts attached, on the device it trains on."""
    quantize = plan.spec.memory.quantize
    check_source(plan.source)
    model: Any = build_model(plan.source.directory, plan.config, dtype, quantize=quantize, device=device)
    if plan.spec.tuning == "lora":
        # Loading may use the random state. Seed again, so that the adapter is the same on every rank.
        torch.manual_seed(plan.spec.seed)
        model = attach(model, plan.trainables, plan.spec.lora.rank, str(plan.source.directory.absolute()))
    else:
        model.requires_grad_(True)
    return model if quantize != "none" else model.to(device)  # bitsandbytes has already put a quantised one there


def _teacher(plan: RunPlan, model: Any, dtype: torch.dtype) -> TeacherModel | None:
    """The teacher of the plan: the model's own weights in their original layout, or a second model; None without."""
    teacher = plan.teacher
    if teacher is None:
        return None
    if teacher.source is None:
        return TeacherModel(relayout(model, teacher.config), teacher.length)
    found = teacher_weights(teacher, plan.spec)
    assert found is not None
    device = str(next(model.parameters()).device)
    other = load_model(found, dtype=str(dtype).removeprefix("torch."), device=device)
    return TeacherModel(other.model.requires_grad_(False), teacher.length)


def _check_tokenizer(plan: RunPlan) -> None:
    """Raises InputError where a second model as the teacher has another tokenizer."""
    found = teacher_weights(plan.teacher, plan.spec)
    if found is None:
        return
    theirs, mine = (tokenizer_hash(load_tokenizer(source.directory)) for source in (found, plan.source))
    if theirs != mine:
        raise InputError(f"distill.teacher: {found.name} has another tokenizer than {plan.source.name}")
