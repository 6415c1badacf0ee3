"""Where else a run's numbers go: TensorBoard and Weights & Biases, when asked for and installed.

metrics.jsonl and validation.jsonl are always written and are the truth; these are for watching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ctxext.errors import EnvironmentFault
from ctxext.train.loop import Events
from ctxext.train.metrics import StepMetrics
from ctxext.train.plan import RunPlan
from ctxext.train.validation import Validation

Writer = Callable[[int, dict[str, float]], None]  # (step, numbers by name)


def telling(events: Events, plan: RunPlan, run: Path) -> Events:
    """`events` that also write to what the spec names. Raises EnvironmentFault for what is not installed."""
    spec, writers = plan.spec.telemetry, list[Writer]()
    if spec.tensorboard:
        writers.append(_tensorboard(run))
    if spec.wandb is not None:
        writers.append(_wandb(spec.wandb, plan, run))
    if not writers:
        return events

    def on_step(metrics: StepMetrics) -> None:
        numbers = {f"train/{name}": float(value) for name, value in metrics.as_dict().items() if name != "step"}
        for write in writers:
            write(metrics.step, numbers)
        events.on_step(metrics)

    def on_validation(now: Validation) -> None:
        numbers = {"held-out/loss": now.loss} | {f"held-out/from {at}": x for at, x in now.by_position.items()}
        numbers |= {} if now.short is None else {"held-out/at the original length": now.short}
        if now.passkey is not None:
            numbers |= {f"passkey/{name}": now.passkey[name] for name in ("accuracy", "answer_nats")}
        for write in writers:
            write(now.step, numbers)
        events.on_validation(now)

    return replace(events, on_step=on_step, on_validation=on_validation)


def _tensorboard(run: Path) -> Writer:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("telemetry.tensorboard", "tensorboard", error) from error
    writer = SummaryWriter(str(run / "tensorboard"))

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(project: str, plan: RunPlan, run: Path) -> Writer:
    try:
        import wandb
    except ImportError as error:
        raise _missing("telemetry.wandb", "wandb", error) from error
    config: dict[str, Any] = asdict(plan.spec)
    live = wandb.init(project=project, name=run.name, dir=str(run), config=config, resume="allow", id=run.name)
    return lambda step, numbers: live.log(numbers, step=step)


def _missing(field: str, package: str, error: ImportError) -> EnvironmentFault:
    return EnvironmentFault(
        f"{field} needs {package}, which is not installed ({error})",
        hint=f"install {package}, or leave {field} out: metrics.jsonl is written in any case",
    )
