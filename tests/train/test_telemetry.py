"""TensorBoard and Weights & Biases get every number, after a rollback too; what fails there does not end a run."""

from __future__ import annotations

import json
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest

from ctxext.config.loader import build
from ctxext.errors import CheckFailed
from ctxext.model.source import resolve
from ctxext.train import loop, telemetry
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.metrics import read
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    return {
        "ctx": 64,
        "steps": 8,
        "global_batch_size": 1,
        "data": {"source": str(text)},
        "validation": {"every_steps": 4, "sequences": 1},
        "faults": {"save_steps": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    }


def planned(model_dir, fields, **named):
    return plan_run(resolve(str(model_dir())), build(FinetuneSpec, fields | {"telemetry": named}, source="test"))


def jumping(monkeypatch, at: int) -> None:
    """A loss that jumps at one call: the run rolls back."""
    real, calls = loop.forward_backward, iter(range(1, 100))
    monkeypatch.setattr(loop, "forward_backward", lambda *given: real(*given) + 100.0 * (next(calls) == at))


class Kept:
    """A writer that keeps what it is given; one of them fails at a step."""

    name = "kept"
    made: ClassVar[list[Kept]] = []

    def __init__(self, *_: object, fails: int | None = None):
        self.lines, self.closed, self.fails = list[tuple[int, dict[str, float]]](), 0, fails
        Kept.made.append(self)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if step == self.fails:
            raise OSError(101, "Network is unreachable")
        self.lines.append((step, numbers))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def kept(monkeypatch):
    Kept.made = []
    monkeypatch.setattr(telemetry, "_TensorBoard", Kept)
    return Kept.made


def test_writers_get_the_first_validation_and_all_steps_and_are_closed(kept, model_dir, fields, tmp_path):
    plan = planned(model_dir, fields, tensorboard=True)
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    (writer,) = kept
    losses = [(step, numbers["held-out/loss"]) for step, numbers in writer.lines if "held-out/loss" in numbers]
    assert losses == [(line["step"], line["loss"]) for line in read(tmp_path / "run/validation.jsonl")]
    assert [step for step, _ in losses] == [0, 4, 8] and writer.closed == 1
    assert [step for step, numbers in writer.lines if "train/loss" in numbers] == list(range(1, 9))


def test_writers_are_closed_when_a_run_fails_or_is_stopped(kept, model_dir, fields, tmp_path, monkeypatch):
    plan = planned(model_dir, fields | {"faults": {"on_divergence": "stop"}}, tensorboard=True)
    start_run(plan, tmp_path / "stopped")
    stop = Events(on_step=lambda metrics: metrics.step == 2 and signal.raise_signal(signal.SIGTERM))
    assert not run_finetune(plan, tmp_path / "stopped", events=stop).finished
    jumping(monkeypatch, 7)
    start_run(plan, tmp_path / "failed")
    with pytest.raises(CheckFailed):
        run_finetune(plan, tmp_path / "failed")
    assert [writer.closed for writer in kept] == [1, 1]


def test_a_writer_that_fails_costs_a_warning_and_no_run(model_dir, fields, tmp_path, monkeypatch):
    Kept.made, said = [], list[str]()
    monkeypatch.setattr(telemetry, "_TensorBoard", lambda run: Kept(fails=3))
    plan = planned(model_dir, fields, tensorboard=True)
    start_run(plan, tmp_path / "run")
    assert run_finetune(plan, tmp_path / "run", events=Events(said.append)).finished
    assert sum("kept failed and stops here (OSError: [Errno 101]" in line for line in said) == 1
    assert [step for step, numbers in Kept.made[0].lines if "train/loss" in numbers] == [1, 2]


def test_tensorboard_shows_a_step_once_after_a_rollback(model_dir, fields, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    jumping(monkeypatch, 8)
    plan = planned(model_dir, fields, tensorboard=True)
    run = tmp_path / "run"
    start_run(plan, run)
    assert run_finetune(plan, run).rollbacks == 1
    shown = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in shown.Scalars("held-out/loss")] == [0, 4, 8]
    written = [line["loss"] for line in read(run / "metrics.jsonl")]
    assert [event.value for event in shown.Scalars("train/loss")] == pytest.approx(written)


class Client:
    """In place of the wandb module: the arguments of each `init`."""

    def __init__(self):
        self.started = list[dict[str, object]]()

    def init(self, **arguments):
        self.started.append(arguments)
        return SimpleNamespace(define_metric=lambda *a, **b: None, log=lambda numbers: None, finish=lambda: None)


def test_a_run_has_its_own_id_at_wandb_and_keeps_it(model_dir, fields, tmp_path, monkeypatch):
    """Two runs of one name, one resumed, and one of an older version, whose id was its name."""
    client, plan = Client(), planned(model_dir, fields, wandb="a-project")
    monkeypatch.setitem(sys.modules, "wandb", client)
    for parent in ("a", "a", "b", "old", "old"):
        run = tmp_path / parent / "run"
        run.mkdir(parents=True, exist_ok=True)
        if parent == "old":
            (run / "wandb").mkdir(exist_ok=True)
        with telemetry.with_writers(Events(), plan, run):
            pass
    first, resumed, other, old, again = (started["id"] for started in client.started)
    assert first == resumed != other and len({first, other, "run"}) == 3
    assert old == again == "run"
    assert all(started["name"] == "run" and started["resume"] == "allow" for started in client.started)


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, parts with crc, length, kind."""
    block, at, record = 32 * 1024, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        # Kinds: 1 whole, 2 first, 3 middle, 4 last.
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_keeps_every_step_after_a_rollback(model_dir, fields, tmp_path, monkeypatch):
    """The real client, offline: what it would send is read back from its file."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    jumping(monkeypatch, 8)
    plan = planned(model_dir, fields, wandb="a-project")
    run = tmp_path / "run"
    start_run(plan, run)
    assert run_finetune(plan, run).rollbacks == 1
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    logged, axes = defaultdict[str, list[int]](list), set[str]()
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("metric") and record.metric.glob_name == "*":
            axes.add(record.metric.step_metric)
        if record.HasField("history"):
            line = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for name in ("train/loss", "held-out/loss"):
                if name in line:
                    logged[name].append(line["step"])
    # Step 7 was done twice: the run went back to step 6.
    assert logged["train/loss"] == [1, 2, 3, 4, 5, 6, 7, 7, 8] and logged["held-out/loss"] == [0, 4, 8]
    assert axes == {"step"}
