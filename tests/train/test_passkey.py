"""The passkey grid of a run: its numbers against logits of the whole model, where they go, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from ctxext.config.loader import build
from ctxext.errors import InputError
from ctxext.model.source import resolve
from ctxext.train.engine import LocalEngine
from ctxext.train.finetune import _model, run_finetune, training_device
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.passkey import grid_cases, measure
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run

GRID = {"lengths": [120, 200], "depths": [0.0, 1.0], "cases": 2}


@pytest.fixture(scope="module")
def make_plan(model_dir, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(400)))

    def make(**fields):
        validation = {"every_steps": 2, "passkey": GRID} | fields.pop("validation", {})
        given = {"ctx": 256, "steps": 2, "global_batch_size": 1, "data": {"source": str(text)}} | fields
        spec = build(FinetuneSpec, given | {"validation": validation}, source="test")
        return plan_run(resolve(str(model_dir("llama"))), spec)

    return make


@pytest.fixture(scope="module")
def engine(make_plan):
    """A run that trains with S²-Attn, before its first step."""
    plan = make_plan(attention={"train": "s2", "group_size": 16})
    local = LocalEngine(_model(plan, *training_device(plan)), plan.spec.optimizer)
    local.model.eval()
    return local


def test_it_is_what_dense_logits_say_of_the_answers(engine, make_plan):
    cases = grid_cases(make_plan())
    assert [(case.length, case.depth) for case in cases] == [(n, d) for n in (120, 200) for d in (0, 0, 1, 1)]
    assert {len(case.prompt_ids + case.answer_ids) for case in cases} == {120, 200}
    grid, nats = measure(engine, cases, "auto"), []
    for case in cases:
        ids, answer = torch.tensor([case.prompt_ids + case.answer_ids]), len(case.answer_ids)
        with torch.no_grad():
            logits = engine.model(ids).logits[0, -answer - 1 : -1]
        nats.append(float(cross_entropy(logits, ids[0, -answer:])))
    for i, cell in enumerate(grid["cells"]):
        assert cell["answer_nats"] == pytest.approx((nats[2 * i] + nats[2 * i + 1]) / 2, rel=1e-5)
    assert grid["answer_nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert grid["accuracy"] == 0.0


def test_answers_that_the_model_gives_are_right_and_one_wrong_token_is_wrong(engine, make_plan):
    cases = list(grid_cases(make_plan()))
    for i, case in enumerate(cases):
        ids = list(case.prompt_ids)
        for _ in case.answer_ids:
            with torch.no_grad():
                ids.append(int(engine.model(torch.tensor([ids])).logits[0, -1].argmax()))
        cases[i] = dataclasses.replace(case, answer_ids=tuple(ids[len(case.prompt_ids) :]))
    assert measure(engine, cases, "auto")["accuracy"] == 1.0
    *rest, last = cases[2].answer_ids
    cases[2] = dataclasses.replace(cases[2], answer_ids=(*rest, (last + 1) % 200))
    grid = measure(engine, cases, "auto")
    assert grid["accuracy"] == 7 / 8
    assert [cell["accuracy"] for cell in grid["cells"]] == [1.0, 0.5, 1.0, 1.0]


def test_every_validation_has_it_in_the_file_and_in_its_line(make_plan, tmp_path):
    said: list[str] = []
    start_run(make_plan(), tmp_path / "run")
    run_finetune(make_plan(), tmp_path / "run", events=Events(said.append))
    lines = [json.loads(line) for line in (tmp_path / "run/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    for line in lines:
        assert [(cell["length"], cell["depth"]) for cell in line["passkey"]["cells"]] == [
            (120, 0.0), (120, 1.0), (200, 0.0), (200, 1.0)]  # fmt: skip
    words = f"passkey 0% (120: 0%, 200: 0%), {lines[1]['passkey']['answer_nats']:.3f} nats an answer token"
    assert [line for line in said if line.startswith("step 2:")] == [
        f"step 2: held-out loss {lines[1]['loss']:.4f}, {words}"
    ]


def test_it_is_off_by_default(make_plan, tmp_path):
    assert FinetuneSpec(ctx=64).validation.passkey is None
    plan = make_plan(validation={"passkey": None})
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    assert json.loads((tmp_path / "run/validation.jsonl").read_text().splitlines()[0])["passkey"] is None


def test_a_shorter_context_measures_the_lengths_that_fit(make_plan):
    plan = make_plan(stages=[64, 128], steps=3)
    grids = [stage.spec.validation.passkey for stage in (*plan.earlier, plan)]
    assert [grid and grid.lengths for grid in grids] == [None, (120,), (120, 200)]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ctx": 128}, "200 tokens are more than ctx"),
        ({"validation": {"every_steps": None}}, "turns validation off"),
        ({"validation": {"passkey": {"lengths": []}}}, "validation.passkey.lengths"),
        ({"validation": {"passkey": {"lengths": [128], "depths": [1.5]}}}, "validation.passkey.depths"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, told, make_plan):
    with pytest.raises(InputError, match=told):
        make_plan(**fields)


def test_what_cannot_be_measured_is_refused_before_training(make_plan, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words, and no more than these. " * 20)
    for name, fields, told in (
        ("room", {"validation": {"passkey": {"lengths": [32]}}}, "needs at least"),
        ("text", {"data": {"source": str(short)}}, "there is no held-out text"),
    ):
        plan = make_plan(**fields)
        start_run(plan, tmp_path / name)
        with pytest.raises(InputError, match=told):
            run_finetune(plan, tmp_path / name)
        assert not Path(tmp_path / name / "metrics.jsonl").exists()
