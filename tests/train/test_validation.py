"""Validation under the attention a model runs with, what follows from it, and attention that changes by the step."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from ctxext.config import presets
from ctxext.config.loader import build
from ctxext.errors import CheckFailed, EnvironmentFault, InputError, SpecError
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import resolve
from ctxext.train import engine, loop, telemetry
from ctxext.train.checkpoint import TENSORS, TrainingState
from ctxext.train.engine import LocalEngine
from ctxext.train.finetune import _model, run_finetune, training_device
from ctxext.train.finetune_spec import AttentionSpec, FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.prepare import prepare_data
from ctxext.train.run_directory import plan_resumed, start_run
from ctxext.train.run_plan import plan_run
from ctxext.train.schedule import attention_at, phases
from ctxext.train.validation import HeldOut, Validation, complaint, validate


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def make_plan(model_dir, text):
    def make(**fields):
        given = {"ctx": 128, "steps": 4, "global_batch_size": 1, "data": {"source": str(text)}, **fields}
        return plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, given, source="test"))

    return make


def test_it_is_the_dense_loss_by_position_though_the_run_trains_with_s2(make_plan):
    plan = make_plan(attention={"train": "s2", "group_size": 8})
    device, dtype = training_device(plan)
    local = LocalEngine(_model(plan, device, dtype), plan.spec.optimizer)
    model = local.model.train()
    _, held_out = prepare_data(plan, Events())
    assert len(held_out) == 2
    now = validate(local, HeldOut(held_out), plan, step=3)
    assert model.training
    losses, short = [], []
    with torch.no_grad():
        for packed in (held_out.sequence(i) for i in range(2)):
            logits = model(packed.tokens[None], document_starts=packed.document_starts[None]).logits[0]
            losses.append(cross_entropy(logits, packed.labels, reduction="none"))
            logits = model(packed.tokens[None, :64]).logits[0]
            short.append(cross_entropy(logits, packed.labels[:64], reduction="none"))
    assert now.loss == pytest.approx(float(torch.cat([x[:-1] for x in losses]).mean()), rel=1e-5)
    assert now.short == pytest.approx(float(torch.cat(short).mean()), rel=1e-5)
    assert now.by_position["0"] == pytest.approx(float(torch.cat([x[:64] for x in losses]).mean()), rel=1e-5)
    assert now.by_position.keys() == {"0", "64"}
    with torch.no_grad():
        s2 = model(packed.tokens[None], group_size=8).logits[0]
    assert not torch.allclose(cross_entropy(s2, packed.labels, reduction="none"), losses[-1], atol=1e-3)


def test_held_out_text_is_never_trained_on(make_plan):
    plan = make_plan()
    sequences, held_out = prepare_data(plan, Events())
    trained = {sequences.offset(i) for i in range(len(sequences))}
    held = {held_out.offset(i) for i in range(len(held_out))}
    assert not trained & held and len(trained) == len(sequences) and max(trained) < min(held)


def test_a_rise_while_the_training_loss_falls_is_said():
    progress = TrainingState(done=50, first_loss=3.0, loss_mean=2.0)
    first, worse, same = (Validation(step, 128, loss, None, {}) for step, loss in ((0, 2.5), (50, 2.6), (50, 2.51)))
    text = complaint(first, worse, progress)
    assert text and "held-out loss is 2.600 and was 2.500" in text and "fell from 3.000 to 2.000" in text
    assert complaint(first, same, progress) is None
    assert complaint(first, worse, TrainingState(done=50, first_loss=2.0, loss_mean=2.1)) is None


def test_the_best_step_is_the_result_when_asked(make_plan, tmp_path, monkeypatch):
    plan = make_plan(steps=6, faults={"keep": 1, "save_steps": 100}, validation={"every_steps": 2, "result": "best"})
    planted, trained = {0: 5.0, 2: 1.0, 4: 3.0, 6: 2.0}, {}

    def validation(engine, held_out, plan, step):
        trained[step] = {name: tensor.clone() for name, tensor in engine.masters().items()}
        return Validation(step, 128, planted[step], None, {})

    monkeypatch.setattr(loop, "validate", validation)
    said: list[str] = []
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run", events=Events(said.append))
    saved = load_file(tmp_path / "run/adapter_model.safetensors")
    for name, tensor in trained[2].items():
        assert torch.equal(saved[name.replace(".modules_to_save.default", "").replace(".default", "")], tensor)
    assert "the result is step 2, which has the lowest held-out loss (1.0000)" in said
    facts = json.loads((tmp_path / "run/ctxext.json").read_text())["facts"]
    assert facts["result_step"] == 2 and facts["validation"][0]["loss"] == 5.0


def test_the_best_checkpoint_outlives_newer_ones(make_plan, tmp_path, monkeypatch):
    plan = make_plan(steps=6, faults={"keep": 1, "save_steps": 1}, validation={"every_steps": 2})
    planted = {0: 5.0, 2: 1.0, 4: 3.0, 6: 2.0}
    monkeypatch.setattr(loop, "validate", lambda *x: Validation(x[3], 128, planted[x[3]], None, {}))
    kept = {}

    def on_step(metrics):
        if metrics.step == 6:
            kept["names"] = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())

    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run", events=Events(on_step=on_step))
    assert kept["names"] == ["step-000002", "step-000005"]


def test_the_guard_of_short_contexts_fails_the_run_and_keeps_its_training(make_plan, tmp_path):
    plan = make_plan(steps=2, optimizer={"learning_rate": 0.05, "warmup_steps": 0}, faults={"on_divergence": "stop"},
                     validation={"max_short_ppl_increase": 0.01})  # fmt: skip
    run = tmp_path / "run"
    start_run(plan, run)
    with pytest.raises(CheckFailed, match=r"original length rose by .*allows 1.0%"):
        run_finetune(plan, run)
    assert not (run / "config.json").exists() and not (run / "ctxext.json").exists()
    assert (run / "checkpoints/step-000002" / TENSORS).exists()
    accepted = plan_resumed(run, {"validation.max_short_ppl_increase": None}, accept=True)
    assert run_finetune(accepted, run, resume=True).finished


def test_schedules():
    spec = AttentionSpec(train="s2", dense_last=0.25)
    assert [attention_at(spec, 16, 128, step, 8, 0) for step in range(8)] == [(16, None)] * 6 + [(None, None)] * 2
    growing = AttentionSpec(train="s2", grow=True, dense_last=0.25)
    assert phases(growing, 16, 128, 8) == {16: 2, 32: 2, 64: 2, None: 2}
    drawn = AttentionSpec(train="s2", shift="random")
    shifts = [attention_at(drawn, 16, 128, step, 100, 7)[1] for step in range(100)]
    assert set(shifts) == set(range(1, 16)) and shifts == [
        attention_at(drawn, 16, 128, s, 100, 7)[1] for s in range(100)
    ]
    assert attention_at(drawn, None, 128, 0, 8, 0) == (None, None)


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0.5, "the last 2 of 4 steps dense"),
        (0.1, "no step dense (attention.dense_last 0.1 of 4 steps is less than one)"),
        (0.0, None),
    ],
)
def test_a_plan_says_how_many_steps_end_dense(share, told, make_plan):
    plan = make_plan(attention={"train": "s2", "group_size": 32, "dense_last": share})
    (row,) = (value for name, value in plan.rows() if name == "full layers train")
    assert told in row if told else "4 steps" not in row


def test_a_held_out_loss_is_a_double_over_the_ranks(make_plan):
    """A sum of millions of nats has few digits left in single precision."""
    plan, third = make_plan(validation={"sequences": 1}), 1e6 / 3
    local = LocalEngine(_model(plan, *training_device(plan)), plan.spec.optimizer)
    local.total = lambda *values: [third, 1.0] * (len(values) // 2)
    _, held_out = prepare_data(plan, Events())
    now = validate(local, HeldOut(held_out), plan, step=1)
    assert set(now.by_position.values()) == {third}


def test_the_schedule_reaches_the_model(make_plan, tmp_path, monkeypatch):
    plan = make_plan(attention={"train": "s2", "group_size": 32, "grow": True, "shift": "random", "dense_last": 0.5})
    seen, real = [], engine.hidden_states

    def watch(model, ids, **given):
        if model.training:
            seen.append((given["group_size"], given["shift"]))
        return real(model, ids, **given)

    monkeypatch.setattr(engine, "hidden_states", watch)
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    assert seen == [plan.attention_at(step) for step in range(4)]
    assert [size for size, _ in seen] == [32, 64, None, None] and all(seen[i][1] for i in (0, 1))
    dense, s2 = (make_plan(attention={"train": name}).step_flops for name in ("dense", "s2"))
    assert s2 < plan.step_flops < dense and not math.isclose(s2, dense)


def test_a_schedule_without_s2_is_refused(make_plan):
    with pytest.raises(InputError, match=r"attention.group_size, attention.grow: given, but full layers train dense"):
        make_plan(attention={"train": "dense", "grow": True, "group_size": 16})
    assert make_plan(attention={"train": "dense", "dense_last": 0.5}).group_size is None


def test_a_presets_dense_end_holds_for_a_hybrid_which_is_dense_anyway(model_dir, tmp_path):
    run_conversion(plan_conversion(str(model_dir("llama")), "SN", out=tmp_path / "SN", sliding_window=8), gate=False)
    preset = presets.find("finetune", "lora-alpha").data | {"ctx": 128}
    assert preset["attention"]["dense_last"] == 0.5
    groups = [
        plan_run(resolve(str(model)), build(FinetuneSpec, preset, source="test")).group_size
        for model in (tmp_path / "SN", model_dir("llama"))
    ]
    assert groups == [None, 32]
    preset["attention"] = {"dense_last": 0.5, "grow": True}
    with pytest.raises(InputError, match=r"attention.grow: given, but full layers train dense"):
        plan_run(resolve(str(tmp_path / "SN")), build(FinetuneSpec, preset, source="test"))


def test_telemetry_is_refused_where_its_package_is_missing(make_plan, tmp_path, monkeypatch):
    for name, value in (("tensorboard", True), ("wandb", "project")):
        for module in ("torch.utils.tensorboard", "wandb"):
            monkeypatch.setitem(sys.modules, module, None)
        plan = make_plan(telemetry={name: value})
        start_run(plan, tmp_path / name)
        with pytest.raises(EnvironmentFault, match=f"telemetry.{name} needs {name}, which is not installed"):
            run_finetune(plan, tmp_path / name)


def test_telemetry_gets_the_numbers_of_the_files(make_plan, tmp_path, monkeypatch):
    written = {}

    class Writer:
        def __init__(self, run):
            self.close = lambda: None

        def write(self, step, numbers):
            written.setdefault(step, {}).update(numbers)

    monkeypatch.setattr(telemetry, "_TensorBoard", Writer)
    plan = make_plan(steps=2, telemetry={"tensorboard": True})
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    last = json.loads((tmp_path / "run/validation.jsonl").read_text().splitlines()[-1])
    assert [written[step]["train/loss"] for step in (1, 2)] == [line["loss"] for line in lines]
    assert written[2]["held-out/loss"] == last["loss"] and written[2]["held-out/from 64"] == last["by_position"]["64"]
    assert lines[0]["flops_per_second"] == pytest.approx(plan.step_flops / lines[0]["seconds"])


def test_the_guard_holds_where_the_run_is_as_long_as_the_original(make_plan, tmp_path):
    """As healing is: the whole sequence is what is short."""
    plan = make_plan(ctx=64, steps=2, optimizer={"learning_rate": 0.05, "warmup_steps": 0},
                     faults={"on_divergence": "stop"}, validation={"max_short_ppl_increase": 0.01})  # fmt: skip
    assert plan.positions.original_length == plan.spec.ctx
    run = tmp_path / "run"
    start_run(plan, run)
    with pytest.raises(CheckFailed, match=r"original length rose by .*allows 1.0%"):
        run_finetune(plan, run)
    lines = [json.loads(line) for line in (run / "validation.jsonl").open()]
    assert [line["short"] for line in lines] == [line["loss"] for line in lines]


def test_a_guard_that_could_not_look_is_refused(make_plan, tmp_path):
    with pytest.raises(SpecError, match="max_short_ppl_increase: given, but every_steps: null"):
        make_plan(validation={"max_short_ppl_increase": 0.1, "every_steps": None})
    (tmp_path / "short.txt").write_text("Too short to hold anything out of it. " * 6)
    plan = make_plan(ctx=64, data={"source": str(tmp_path / "short.txt")}, validation={"max_short_ppl_increase": 0.1})
    start_run(plan, tmp_path / "run")
    with pytest.raises(InputError, match="max_short_ppl_increase: there is no held-out text"):
        run_finetune(plan, tmp_path / "run")


def test_a_best_checkpoint_that_was_lost_is_said_to_be(make_plan, tmp_path, monkeypatch):
    plan = make_plan(validation={"every_steps": 2, "result": "best"})
    planted = {0: 5.0, 2: 1.0, 4: 3.0}
    monkeypatch.setattr(loop, "validate", lambda *x: Validation(x[3], 128, planted[x[3]], None, {}))

    def on_step(metrics):
        if metrics.step == 4:
            shutil.rmtree(tmp_path / "run/checkpoints/step-000002")

    said: list[str] = []
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run", events=Events(said.append, on_step))
    assert "warning: the checkpoint of step 2, the best by held-out loss, is missing or damaged" in "\n".join(said)
