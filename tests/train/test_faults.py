"""What goes wrong in a run, planted: kills, full disks, damaged checkpoints, losses that jump."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctxext import api
from ctxext.config.loader import build, set_value
from ctxext.errors import CheckFailed, EnvironmentFault, InputError, ModelError
from ctxext.model.source import resolve
from ctxext.train import checkpoint, loop
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.metrics import read
from ctxext.train.run_directory import alone, applied_changes, newest_unfinished, plan_resumed, start_run
from ctxext.train.run_plan import plan_run

RESULT = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def plan(model_dir, text):
    fields = {
        "ctx": 64,
        "steps": 8,
        "global_batch_size": 1,
        "data": {"source": str(text)},
        "faults": {"save_steps": 2, "keep": 3},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    }
    return plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory) -> Path:
    """The run as it is when nothing goes wrong."""
    out = tmp_path_factory.mktemp("whole") / "run"
    start_run(plan, out)
    run_finetune(plan, out)
    return out


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    ours, theirs = load_file(run / RESULT), load_file(whole / RESULT)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def stop_after(steps: int) -> Events:
    def stop(metrics):
        if metrics.step == steps:
            signal.raise_signal(signal.SIGTERM)

    return Events(on_step=stop)


def resumed(run: Path) -> list[str]:
    said: list[str] = []
    assert run_finetune(plan_resumed(run), run, resume=True, events=Events(said.append)).finished
    return said


# Divergence


def jumping(at: set[int], by: float):
    """forward_backward whose loss jumps at the given calls (from 1)."""
    real, calls = loop.forward_backward, iter(range(1, 1000))

    def planted(*arguments):
        loss = real(*arguments)
        return loss + by if next(calls) in at else loss

    return planted


@pytest.mark.parametrize("by", [100.0, float("nan")], ids=["spike", "nan"])
def test_a_jump_rolls_back_once_halves_the_rate_and_goes_on(by, plan, whole, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(loop, "forward_backward", jumping({8}, by))  # step 8; steps 7 and 8 are done again
    start_run(plan, tmp_path / "run")
    report = run_finetune(plan, tmp_path / "run", events=Events(said.append))
    assert report.finished and report.rollbacks == 1
    assert losses(tmp_path / "run")[:7] == losses(whole)[:7]
    rates = [json.loads(line)["learning_rate_factor"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    assert any("from the checkpoint of step 6, at half the learning rates" in line for line in said)
    manifest = json.loads((tmp_path / "run/ctxext.json").read_text())
    assert len(manifest["facts"]["rollbacks"]) == 1 and "step 8" in manifest["facts"]["rollbacks"][0]


def test_a_second_jump_stops_for_good(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "forward_backward", jumping({7, 9}, 100.0))
    start_run(plan, tmp_path / "run")
    with pytest.raises(CheckFailed, match="after one rollback"):
        run_finetune(plan, tmp_path / "run")
    assert not (tmp_path / "run/ctxext.json").exists()


def test_by_policy_the_first_jump_stops(model_dir, text, tmp_path, monkeypatch):
    fields = {"ctx": 64, "steps": 8, "global_batch_size": 1, "data": {"source": str(text)}}
    fields["faults"] = {"on_divergence": "stop"}
    plan = plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))
    monkeypatch.setattr(loop, "forward_backward", jumping({7}, 100.0))
    start_run(plan, tmp_path / "run")
    with pytest.raises(CheckFailed, match=r"step 7: the loss is .*; stopped"):
        run_finetune(plan, tmp_path / "run")


def test_a_gradient_that_is_not_finite_is_no_step(model_dir, text, tmp_path):
    fields = {"ctx": 64, "steps": 20, "global_batch_size": 1, "data": {"source": str(text)}}
    fields["optimizer"] = {"learning_rate": 1e30, "warmup_steps": 0}
    plan = plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))
    start_run(plan, tmp_path / "run")
    with pytest.raises(CheckFailed, match="stopped after one rollback"):
        run_finetune(plan, tmp_path / "run")
    assert not (tmp_path / "run" / "ctxext.json").exists()


# Checkpoints


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(plan, whole, tmp_path):
    for damage in ("flip", "cut", "no state"):
        run = tmp_path / damage
        start_run(plan, run)
        assert run_finetune(plan, run, events=stop_after(5)).steps_done == 5
        newest = run / "checkpoints/step-000005"
        content = (newest / checkpoint.TENSORS).read_bytes()
        if damage == "flip":
            middle = len(content) // 2
            (newest / checkpoint.TENSORS).write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        elif damage == "cut":
            (newest / checkpoint.TENSORS).write_bytes(content[:-100])
        else:
            (newest / checkpoint.STATE).unlink()
        said = resumed(run)
        assert any("step-000005 is damaged" in line for line in said) and "resuming after step 4 of 8" in said
        assert_equal(run, whole)


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_removed(plan, tmp_path, disk_acts):
    """The files and their directory before the rename, the new name before the removal."""
    run = tmp_path / "run"
    start_run(plan, run)
    run_finetune(plan, run, events=stop_after(6))
    root = run / "checkpoints"
    new, partial = root / "step-000006", root / ".step-000006.partial"
    renamed = disk_acts.index(("rename", str(new)))
    removed = disk_acts.index(("remove", str(root / "step-000001")), renamed)
    before = {path for act, path in disk_acts[:renamed] if act == "sync"}
    assert {str(partial), str(partial / checkpoint.TENSORS), str(partial / checkpoint.STATE)} <= before
    assert {("sync", str(root)), ("sync", str(run))} <= set(disk_acts[renamed:removed])


def test_a_result_is_on_the_disk_before_the_checkpoints_are_removed(plan, tmp_path, disk_acts):
    run = tmp_path / "run"
    start_run(plan, run)
    assert run_finetune(plan, run).finished
    renamed, removed = (disk_acts.index(act) for act in (
        ("rename", str(run / "ctxext.json")), ("remove", str(run / "checkpoints"))))  # fmt: skip
    synced = [path for act, path in disk_acts[:renamed] if act == "sync"]
    assert {Path(path).name for path in synced if ".bundle-" in path} >= {RESULT, "config.json", "ctxext.json"}
    assert ("sync", str(run)) in disk_acts[renamed:removed]


# A full disk


LITTLE = 16 * 1024  # bytes left free: enough for lines of text, too little for a checkpoint or a result


def at_steps(**acts) -> Events:
    """Each act once its step is done, before the step is saved: at_steps(s4=disk.fill)."""

    def on_step(metrics):
        if act := acts.get(f"s{metrics.step}"):
            act()

    return Events(on_step=on_step)


def stop():
    signal.raise_signal(signal.SIGTERM)


def test_a_full_disk_during_a_save_keeps_the_last_checkpoint_and_trains_on(plan, whole, small_disk):
    disk, said = small_disk(8 * 1024**2), list[str]()
    run = disk.path / "run"
    start_run(plan, run)
    events = at_steps(s4=lambda: disk.fill(LITTLE), s5=lambda: (disk.make_room(), stop()))
    report = run_finetune(plan, run, events=Events(said.append, events.on_step))
    assert any("step 4 was not written" in line and f"the disk of {disk.path}" in line for line in said)
    assert report.steps_done == 5 and not list(run.glob("checkpoints/.*"))
    assert [path.name for path in sorted(run.glob("checkpoints/*"))] == ["step-000001", "step-000002", "step-000005"]
    resumed(run)
    assert_equal(run, whole)


def test_a_stop_whose_checkpoint_cannot_be_saved_says_so_and_the_one_before_is_resumed(plan, whole, small_disk):
    disk = small_disk(8 * 1024**2)
    run = disk.path / "run"
    start_run(plan, run)
    told = r"checkpoint after step 5 was not written, and the run was stopped: the disk .* checkpoint is of step 4"
    with pytest.raises(EnvironmentFault, match=told) as fault:
        run_finetune(plan, run, events=at_steps(s5=lambda: (disk.fill(LITTLE), stop())))
    assert (
        fault.value.exit_code == 3
        and fault.value.hint == f"free disk space, then give: ctxext finetune --resume --out {run}"
    )
    disk.make_room()
    assert "resuming after step 4 of 8" in resumed(run)
    assert_equal(run, whole)


def test_a_result_that_finds_no_room_leaves_no_part_and_is_written_later(plan, whole, small_disk):
    disk = small_disk(8 * 1024**2)
    run = disk.path / "run"
    start_run(plan, run)
    told = r"the result of 8 steps was not written: the disk .* is full .*; the newest checkpoint is of step 6"
    with pytest.raises(EnvironmentFault, match=told) as fault:
        run_finetune(plan, run, events=at_steps(s8=lambda: disk.fill(LITTLE)))
    assert "--resume" in fault.value.hint
    assert {path.name for path in run.iterdir()} == {
        *("spec.yaml", "data.json", "metrics.jsonl", "validation.jsonl", "checkpoints")
    }
    with pytest.raises(ModelError):
        resolve(str(run))
    disk.make_room()
    resumed(run)
    assert_equal(run, whole)


def test_a_result_that_fits_is_enough_where_the_last_checkpoint_does_not(plan, whole, small_disk):
    disk, said = small_disk(8 * 1024**2), list[str]()
    run = disk.path / "run"
    start_run(plan, run)
    result = sum(path.stat().st_size for path in whole.iterdir() if path.is_file())
    assert run_finetune(
        plan, run, events=Events(said.append, at_steps(s8=lambda: disk.fill(result + 8 * LITTLE)).on_step)
    ).finished
    assert any("step 8 was not written" in line for line in said)
    assert_equal(run, whole)


def test_the_newest_checkpoints_are_kept_and_minutes_count_too(model_dir, text, tmp_path):
    fields = {"ctx": 64, "steps": 6, "global_batch_size": 1, "data": {"source": str(text)}}
    fields["faults"] = {"save_steps": 100, "save_minutes": 1e-9, "keep": 2}
    plan = plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run", events=stop_after(5))
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step-000004", "step-000005"]


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_moments_resume_exactly(name, model_dir, text, tmp_path):
    pytest.importorskip("bitsandbytes")
    fields = {"ctx": 64, "steps": 4, "global_batch_size": 1, "data": {"source": str(text)}}
    fields["optimizer"] = {"name": name, "learning_rate": 1e-3, "warmup_steps": 0}
    plan = plan_run(resolve(str(model_dir("llama", hidden_size=64))), build(FinetuneSpec, fields, source="test"))
    for directory, events in (("whole", Events()), ("cut", stop_after(2))):
        start_run(plan, tmp_path / directory)
        run_finetune(plan, tmp_path / directory, events=events)
    saved = load_file(tmp_path / "cut/checkpoints/step-000002" / checkpoint.TENSORS)
    assert any(tensor.dtype == torch.uint8 for key, tensor in saved.items() if key.startswith("state1/"))
    resumed(tmp_path / "cut")
    assert_equal(tmp_path / "cut", tmp_path / "whole")


# A changed spec


def test_a_changed_spec_is_refused_by_name_and_taken_when_told(plan, tmp_path):
    run = tmp_path / "run"
    start_run(plan, run)
    run_finetune(plan, run, events=stop_after(2))
    changes = {"steps": 3, "optimizer.learning_rate": 5e-4}
    with pytest.raises(InputError, match=r"optimizer.learning_rate was 0.001, is 0.0005, steps was 8, is 3"):
        plan_resumed(run, changes)
    assert plan_resumed(run, {"steps": 8}).spec == plan.spec
    accepted = plan_resumed(run, changes, accept=True)
    assert accepted.steps == 3 and plan_resumed(run).steps == 8  # until it goes on
    with applied_changes(accepted, run):
        assert run_finetune(plan_resumed(run), run, resume=True).steps_done == 3


# Kills


def child(plan, run: Path, *options: str) -> subprocess.Popen:
    code = "import sys; from ctxext.cli import main; sys.exit(main())"
    arguments = ["finetune", "--resume", "--out", str(run), *options]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


def kill_and_resume(plan, whole: Path, run: Path, step: int, delay: float) -> str:
    """SIGKILL `delay` seconds after `step` was logged, then resume until it is done; what the resumed run said."""
    start_run(plan, run)
    victim, metrics = child(plan, run), run / "metrics.jsonl"
    while victim.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
        time.sleep(0.001)
    time.sleep(delay)
    victim.kill()
    victim.communicate()
    if (run / "ctxext.json").exists():
        return "it was done before the kill"
    done = len(read(metrics))
    said = resumed(run)
    after = [int(line.split()[3]) for line in said if line.startswith("resuming after step")]
    assert done - (after[0] if after else 0) <= 2, f"{done} steps were done, resumed after {after}"
    assert_equal(run, whole)
    return "\n".join(said)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_killed_run_loses_at_most_the_interval(step, plan, whole, tmp_path):
    kill_and_resume(plan, whole, tmp_path / "run", step, 0.0)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(plan, whole, tmp_path):
    moments = random.Random(0)
    said = [
        kill_and_resume(plan, whole, tmp_path / f"{i}", moments.randint(1, 8), moments.uniform(0, 0.03))
        for i in range(20)
    ]
    assert sum("resuming after step" in line for line in said) >= 10, said


def test_a_damaged_newest_checkpoint_does_not_push_out_what_is_saved_after_it(plan, whole, tmp_path):
    """It stays the newest by its number: the ones of a resumed run would be taken for older ones, and removed."""
    run = tmp_path / "run"
    start_run(plan, run)
    run_finetune(plan, run, events=stop_after(7))
    with (run / "checkpoints/step-000007" / checkpoint.TENSORS).open("ab") as file:
        file.write(b"x")
    said = []
    report = run_finetune(plan_resumed(run), run, resume=True, events=Events(said.append, stop_after(6 + 1).on_step))
    assert report.steps_done == 7 and any("is damaged" in line for line in said)
    assert checkpoint.newest_step(run) == 7 and len(list((run / "checkpoints").iterdir())) == 3
    assert not any("is damaged" in line for line in resumed(run))
    assert_equal(run, whole)


def test_fewer_steps_than_are_done_are_refused_at_once(plan, tmp_path):
    run = tmp_path / "run"
    start_run(plan, run)
    run_finetune(plan, run, events=stop_after(4))
    with pytest.raises(InputError, match="has done 4 steps, more than steps: 2"):
        plan_resumed(run, {"steps": 2}, accept=True)
    assert run_finetune(plan_resumed(run, {"steps": 4}, accept=True), run, resume=True).finished


def test_a_change_that_the_checkpoint_cannot_take_is_told_and_the_spec_is_as_it_was(plan, tmp_path):
    run = tmp_path / "run"
    start_run(plan, run)
    run_finetune(plan, run, events=stop_after(2))
    before = (run / "spec.yaml").read_bytes()
    accepted = plan_resumed(run, {"lora.rank": 4, "lora.alpha": 16.0}, accept=True)
    with (
        pytest.raises(ModelError, match=r"the checkpoint holds .*lora_A.* as \[8, .*trains \[4, "),
        applied_changes(accepted, run),
    ):
        run_finetune(accepted, run, resume=True)
    assert (run / "spec.yaml").read_bytes() == before and not resumed(run)[0].startswith("warning")


def test_one_training_at_a_time(plan, tmp_path):
    run = tmp_path / "runs" / "run"
    start_run(plan, run)
    run_finetune(plan, run, events=stop_after(2))
    with alone(run):
        with pytest.raises(InputError, match="is being written by another training"):
            api.finetune(out=run, resume=True)
        with pytest.raises(InputError, match="no unfinished run"):
            newest_unfinished(tmp_path / "runs")
    assert newest_unfinished(tmp_path / "runs") == run
    assert api.finetune(out=run, resume=True).finished


def test_a_resumed_run_at_another_ctx_starts_its_losses_anew(plan, tmp_path):
    """The loss at 64 tokens is no start of 96, nor its best."""
    fields = {"validation.every_steps": 2, "validation.result": "best"}
    run, plan = tmp_path / "run", plan_run(plan.source, build(FinetuneSpec, spec_with(plan, fields), source="test"))
    start_run(plan, run)
    run_finetune(plan, run, events=stop_after(4))
    longer = plan_resumed(run, {"ctx": 96}, accept=True)
    with applied_changes(longer, run):
        report = run_finetune(longer, run, resume=True)
    lines = read(run / "validation.jsonl")
    assert [(line["step"], line["ctx"]) for line in lines] == [(0, 64), (2, 64), (4, 64), (4, 96), (6, 96), (8, 96)]
    assert report.held_out == (lines[3]["loss"], lines[5]["loss"])


def spec_with(plan, changes):
    fields = asdict(plan.spec)
    for path, value in changes.items():
        set_value(fields, path, value)
    return fields
