"""Writes a run's numbers to TensorBoard and Weights & Biases, where the spec requests them and they are installed.

metrics.jsonl and validation.jsonl are always written and are the reference; these writers are for watching a run. A
writer that fails causes a warning and is not used again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from ctxext.config.output import write_whole
from ctxext.errors import EnvironmentFault
from ctxext.train.loop import Events
from ctxext.train.metrics import StepMetrics
from ctxext.train.run_plan import RunPlan
from ctxext.train.validation import Validation

WANDB_ID = "wandb-id.txt"  # the file in a run that holds its id at Weights & Biases
STEP = "step"  # the field of Weights & Biases that is the x axis of all others


class Writer(Protocol):
    """A destination of numbers."""

    name: str

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Writes numbers by name. `step` may have been written before, since a rollback repeats steps."""

    def close(self) -> None:
        """Ends the writing."""


@contextmanager
def with_writers(events: Events, plan: RunPlan, run: Path) -> Iterator[Events]:
    """Yields `events` that also write to the destinations of the spec; the writers close when the block ends or fails.

    Raises EnvironmentFault for a package that is not installed.
    """
    spec, writers = plan.spec.telemetry, list[Writer]()

    # Telemetry must not stop a run: a writer that raises is removed, with a warning.
    def guarded(act: Callable[[Writer], None]) -> None:
        for writer in list(writers):
            try:
                act(writer)
            except Exception as error:  # from the network, the disk, or another library
                writers.remove(writer)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                events.say(f"warning: {writer.name} failed and stops here ({reason}); metrics.jsonl has all numbers")

    def on_step(metrics: StepMetrics) -> None:
        numbers = {f"train/{name}": float(value) for name, value in metrics.as_dict().items() if name != "step"}
        guarded(lambda writer: writer.write(metrics.step, numbers))
        events.on_step(metrics)

    def on_validation(now: Validation) -> None:
        numbers = {"held-out/loss": now.loss} | {f"held-out/from {at}": x for at, x in now.by_position.items()}
        numbers |= {} if now.short is None else {"held-out/at the original length": now.short}
        if now.passkey is not None:
            numbers |= {f"passkey/{name}": now.passkey[name] for name in ("accuracy", "answer_nats")}
        guarded(lambda writer: writer.write(now.step, numbers))
        events.on_validation(now)

    try:
        if spec.tensorboard:
            writers.append(_TensorBoard(run))
        if spec.wandb is not None:
            writers.append(_WandB(spec.wandb, plan, run))
        yield replace(events, on_step=on_step, on_validation=on_validation) if writers else events
    finally:
        guarded(lambda writer: writer.close())


class _TensorBoard:
    name = "telemetry.tensorboard"

    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing(self.name, "tensorboard", error) from error
        self._make, self._last = SummaryWriter, dict[str, int]()
        self._place = str(run / "tensorboard")
        self._writer = SummaryWriter(self._place)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if any(self._last.get(name, -1) >= step for name in numbers):
            # After a rollback, only a new file with `purge_step` makes TensorBoard drop the old values of a step.
            self._writer.close()
            self._writer = self._make(self._place, purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
            self._last[name] = step
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    name = "telemetry.wandb"

    def __init__(self, project: str, plan: RunPlan, run: Path):
        try:
            import wandb
        except ImportError as error:
            raise _missing(self.name, "wandb", error) from error
        config: dict[str, Any] = asdict(plan.spec)
        named: dict[str, Any] = {"project": project, "name": run.name, "id": _wandb_id(run), "resume": "allow"}
        self._run = wandb.init(dir=str(run), config=config, **named)
        # The step of Weights & Biases only grows: what is logged at an earlier step is dropped. A rollback or a resumed
        # run repeats steps, so the run's step is logged as a field of its own.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers | {STEP: step})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run: Path) -> str:
    """The id of a run at Weights & Biases: drawn once and kept in the run, so that no other run has it.

    A run of an older version has no file, but the client's directory: its id is its name.
    """
    path = run / WANDB_ID
    if not path.is_file():
        write_whole(path, f"{run.name if (run / 'wandb').is_dir() else uuid.uuid4().hex}\n")
    return path.read_text("utf-8").strip()


def _missing(field: str, package: str, error: ImportError) -> EnvironmentFault:
    return EnvironmentFault(
        f"{field} needs {package}, which is not installed ({error})",
        hint=f"install {package}, or leave {field} out: metrics.jsonl is always written",
    )
