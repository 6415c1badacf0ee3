"""A context curriculum: positions, groups and batches of each context, one optimizer, and resuming in the middle."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from ctxext.config.loader import build
from ctxext.errors import CheckFailed, EnvironmentFault, SpecError
from ctxext.model.source import resolve
from ctxext.train import finetune, loop
from ctxext.train.checkpoint import TENSORS
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.run_directory import plan_resumed, start_run
from ctxext.train.run_plan import plan_run


@pytest.fixture(scope="module")
def plan(model_dir, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    fields = {
        "ctx": 256,
        "stages": [64, 128],
        "steps": 6,
        "tokens_per_step": 256,
        "data": {"source": str(text)},
        "faults": {"save_steps": 1, "keep": 10},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
    }
    return plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    start_run(plan, out)
    assert run_finetune(plan, out).finished
    return out


def interrupt():
    signal.raise_signal(signal.SIGTERM)


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def jumping(monkeypatch, at, act=lambda: None):
    """The loss is not finite at the given calls (from 1); `act` comes before the first of them."""
    real, calls = loop.forward_backward, iter(range(1, 100))

    def planted(*given):
        loss, call = real(*given), next(calls)
        if call == min(at):
            act()
        return float("nan") if call in at else loss

    monkeypatch.setattr(loop, "forward_backward", planted)


def test_each_context_has_its_own_positions_groups_and_batch(plan):
    stages = [plan.stage_of(done) for done in range(7)]
    assert [stage.spec.ctx for stage in stages] == [64, 64, 128, 128, 256, 256, 256]
    assert [stage.positions.factor for stage in stages[::2]] == [1.0, 2.0, 4.0, 4.0]
    assert [stage.group_size for stage in stages[::2]] == [16, 32, 64, 64]
    assert [stage.global_batch_size for stage in stages[::2]] == [4, 2, 1, 1]
    assert plan.tokens == 6 * 256 and stages[-1] is plan
    assert [row["steps"] for row in plan.as_dict()["stages"]] == [2, 2, 2]


def test_a_scaling_that_was_asked_for_holds_at_every_context_beyond_the_original(write_model, plan, tmp_path):
    """A scaled source already supports the first contexts unchanged; it would change its positions in the middle."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    source = resolve(str(write_model(tmp_path / "yarn", rope_parameters=rope, max_position_embeddings=512)))
    fields = {"ctx": 1024, "stages": [64, 256], "steps": 3, "rope_scaling": "linear"}
    scaled = plan_run(source, build(FinetuneSpec, fields, source="test"))
    kinds = [stage.config.rope["rope_type"] for stage in (*scaled.earlier, scaled)]
    assert kinds == ["yarn", "linear", "linear"]


def test_tokens_are_those_trained_on_in_every_context(plan, tmp_path):
    plan = plan_run(plan.source, dataclasses.replace(plan.spec, global_batch_size=1, tokens_per_step=64))
    run = tmp_path / "run"
    start_run(plan, run)
    run_finetune(plan, run)
    assert [line["tokens"] for line in lines(run)] == [64, 128, 256, 384, 640, 896]
    assert plan.tokens == json.loads((run / "ctxext.json").read_text())["facts"]["tokens"] == 896


def test_the_model_of_each_stage_has_its_rope_and_the_optimizer_goes_on(plan, tmp_path, monkeypatch):
    seen, real = [], finetune.train

    def watch(engine, sequences, held_out, stage, run, progress, events):
        config = engine.model.config
        steps = {key: float(x) for key, x in engine.tensors().items() if key.startswith("step/")}
        seen.append((config.rope_parameters.get("factor"), sequences.seq_len, progress.done, set(steps.values())))
        return real(engine, sequences, held_out, stage, run, progress, events)

    monkeypatch.setattr(finetune, "train", watch)
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    assert seen == [(None, 64, 0, set()), (2.0, 128, 2, {2.0}), (4.0, 256, 4, {4.0})]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["rope_parameters"]["factor"] == 4.0 and config["max_position_embeddings"] == 256
    rates = [line["learning_rate_factor"] for line in lines(tmp_path / "run")]
    assert rates[:2] == [0.5, 1.0] and rates[2:] == sorted(rates[2:], reverse=True)
    validated = [(line["step"], line["ctx"]) for line in lines(tmp_path / "run", "validation.jsonl")]
    assert validated == [(0, 64), (2, 64), (2, 128), (4, 128), (4, 256), (6, 256)]


def test_the_losses_that_a_run_reports_are_of_its_last_context(plan, whole, tmp_path):
    losses = [line["loss"] for line in lines(whole)]
    facts = json.loads((whole / "ctxext.json").read_text())["facts"]
    assert (facts["first_loss"], facts["final_loss"]) == (losses[4], losses[5])

    start_run(plan, tmp_path / "run")
    stopped = run_finetune(plan, tmp_path / "run", events=Events(on_step=lambda line: line.step == 2 and interrupt()))
    assert (stopped.first_loss, stopped.final_loss) == (losses[0], losses[1])  # it ended in the first


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_resumed_in_any_stage_equals_the_uninterrupted_one(step, plan, whole, tmp_path):
    def stop(metrics):
        if metrics.step == step:
            signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    start_run(plan, run)
    assert run_finetune(plan, run, events=Events(on_step=stop)).steps_done == step
    assert run_finetune(plan_resumed(run), run, resume=True).finished
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_damage_that_goes_back_into_an_earlier_stage(plan, whole, tmp_path):
    def stop(metrics):
        if metrics.step == 5:
            signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    start_run(plan, run)
    run_finetune(plan, run, events=Events(on_step=stop))
    for step in (4, 5):
        (run / f"checkpoints/step-{step:06d}" / TENSORS).write_bytes(b"")
    said = []
    assert run_finetune(plan_resumed(run), run, resume=True, events=Events(said.append)).finished
    assert sum("is damaged" in line for line in said) >= 2
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]


def test_a_full_disk_at_the_end_of_a_context_ends_the_run_and_not_in_a_loop(plan, whole, small_disk):
    """The next context starts from this checkpoint: without it the context was trained again, for ever."""
    disk, seen = small_disk(8 * 1024**2), list[int]()

    def on_step(metrics):
        seen.append(metrics.step)
        assert len(seen) < 20, "it trains the same steps again and again"
        if seen == [1, 2, 3, 4]:
            disk.fill(leave=16 * 1024)

    run = disk.path / "run"
    start_run(plan, run)
    with pytest.raises(EnvironmentFault, match=r"after step 4 was not written, and the next context .* of step 3"):
        run_finetune(plan, run, events=Events(on_step=on_step))
    assert seen == [1, 2, 3, 4]
    disk.make_room()
    assert run_finetune(plan_resumed(run), run, resume=True).finished
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]


def test_a_rollback_to_where_a_context_began_forgets_the_losses_before(plan, tmp_path, monkeypatch):
    jumping(monkeypatch, {3})
    seen, save = [], loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda run, progress, *rest, **named: (
        seen.append((progress.done, progress.loss_seen)), save(run, progress, *rest, **named))[1])  # fmt: skip
    start_run(plan, tmp_path / "run")
    assert run_finetune(plan, tmp_path / "run").rollbacks == 1
    assert seen == [(1, 1), (2, 2), (3, 1), (4, 2), (5, 1), (6, 2)]


def test_a_rollback_to_where_the_last_context_began_keeps_its_first_validation(plan, whole, tmp_path, monkeypatch):
    jumping(monkeypatch, {5})
    start_run(plan, tmp_path / "run")
    assert run_finetune(plan, tmp_path / "run").rollbacks == 1
    ours, theirs = (json.loads((run / "ctxext.json").read_text())["facts"] for run in (tmp_path / "run", whole))
    assert ours["validation"][0] == theirs["validation"][0] and ours["validation"][0]["ctx"] == 256


def test_a_rollback_to_a_damaged_start_of_a_context_trains_the_context_before_again(plan, whole, tmp_path, monkeypatch):
    run, said, trained = tmp_path / "run", list[str](), list[tuple[int, int]]()
    real, calls = loop.forward_backward, iter(range(1, 100))

    def planted(engine, batch, stage, step):
        trained.append((step, stage.spec.ctx))
        loss = real(engine, batch, stage, step)
        if next(calls) != 5:
            return loss
        (run / f"checkpoints/step-000004/{TENSORS}").write_bytes(b"")
        return float("nan")

    monkeypatch.setattr(loop, "forward_backward", planted)
    start_run(plan, run)
    report = run_finetune(plan, run, events=Events(said.append))
    assert report.finished and report.rollbacks == 1
    assert trained == [(0, 64), (1, 64), (2, 128), (3, 128), (4, 256), (3, 128), (4, 256), (5, 256)]
    assert [line["tokens"] for line in lines(run)] == [line["tokens"] for line in lines(whole)]
    rates = [line["learning_rate_factor"] / whole["learning_rate_factor"] for line, whole in zip(
        lines(run), lines(whole), strict=True)]  # fmt: skip
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert any("continues from the checkpoint of step 3, at half the learning rates" in line for line in said)
    validated = [(line["step"], line["ctx"]) for line in lines(run, "validation.jsonl")]
    assert validated == [(0, 64), (2, 64), (2, 128), (4, 128), (4, 256), (6, 256)]


def test_a_second_divergence_after_such_a_rollback_stops(plan, tmp_path, monkeypatch):
    run = tmp_path / "run"
    damage = lambda: (run / f"checkpoints/step-000004/{TENSORS}").write_bytes(b"")  # noqa: E731
    jumping(monkeypatch, {5, 7}, damage)
    start_run(plan, run)
    with pytest.raises(CheckFailed, match="having rolled back once"):
        run_finetune(plan, run)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stages": [256]}, "must ascend"),
        ({"stages": [128, 64]}, "must ascend"),
        ({"stages": [64], "steps": 1}, "2 contexts"),
    ],
)
def test_contexts_that_do_not_ascend_are_refused(fields, told):
    with pytest.raises(SpecError, match=told):
        build(FinetuneSpec, {"ctx": 256, **fields}, source="test")
