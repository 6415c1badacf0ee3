"""Instruction data from rows to weights: the loss is on the answers alone; mixtures; what is said before training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxext.config.loader import build
from ctxext.data.mixture import Mixture
from ctxext.errors import InputError
from ctxext.model.source import resolve
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.prepare import prepare_data
from ctxext.train.run_directory import data_hash, plan_resumed, start_run
from ctxext.train.run_plan import RunPlan, plan_run

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALKS = [[("user", f"What is {i} + {i}?"), ("assistant", f"{2 * i}."), ("user", "Sure?"), ("assistant", "Yes")]
         for i in range(30)]  # fmt: skip


@pytest.fixture(scope="module")
def model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama whose tokenizer (a token a byte, EOS `</s>`) has a chat template."""
    directory = write_model(tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("".join(f"Line {i} of a long text. {i * i}\n" for i in range(500)))
    return path


def make_plan(model: Path, data: dict[str, Any], **fields: Any) -> RunPlan:
    given = {"ctx": 64, "steps": 2, "global_batch_size": 4, "attention": {"train": "dense"}, "data": data, **fields}
    return plan_run(resolve(str(model)), build(FinetuneSpec, given, source="test"))


def said(plan: RunPlan) -> list[str]:
    lines: list[str] = []
    prepare_data(plan, Events(lines.append))
    return lines


def by_hand(model: Path, ctx: int) -> tuple[float, float]:
    """(loss on answers, loss on all tokens) of the untrained model over TALKS cut into rows of `ctx`, unmasked."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    scored: list[bool] = []
    for talk in TALKS:
        for role, text in talk:
            for part, counts in ((f"<{role}>", False), (f"{text}</s>", role == "assistant")):
                new = tokenizer.encode(part, add_special_tokens=False)
                ids += new
                scored += [counts] * len(new)
    rows = len(ids) // ctx
    tokens = torch.tensor(ids[: rows * ctx]).view(rows, ctx)
    marks = torch.tensor(scored[: rows * ctx]).view(rows, ctx)[:, 1:]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(tokens).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return float(losses[marks].mean()), float(losses.mean())


def test_the_loss_is_that_of_the_answers_by_hand_and_two_steps_train(model: Path, talks: Path, tmp_path: Path) -> None:
    data = {"source": str(talks), "format": "messages", "document_mask": False}
    sequences, _ = prepare_data(make_plan(model, data, validation={"every_steps": None}), Events())
    assert sequences.without_answer == 0
    plan = make_plan(model, data, validation={"every_steps": None}, global_batch_size=len(sequences),
                     optimizer={"learning_rate": 1e-2, "warmup_steps": 0})  # fmt: skip
    start_run(plan, tmp_path / "run")
    assert run_finetune(plan, tmp_path / "run").finished
    first, second = (json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    answers, everything = by_hand(model, 64)
    assert abs(answers - everything) > 1e-3, "the two losses cannot be told apart here"
    assert first == pytest.approx(answers, rel=1e-5)
    assert second < first


def test_what_is_said_of_chat_data(model: Path, talks: Path) -> None:
    data = {"source": str(talks), "format": "messages"}
    lines = said(make_plan(model, data))
    tokens = [(len(text) + 1, len(f"<{role}>")) for talk in TALKS for role, text in talk]
    answers = sum(len(text) + 1 for talk in TALKS for role, text in talk if role == "assistant")
    assert f"data: loss on {answers / sum(map(sum, tokens)):.1%} of the tokens: the answers" in lines
    assert sum("of the tokens see at least half of ctx in their own document" in line for line in lines) == 1
    assert not any("left out" in line for line in lines)
    long = [sum(len(text) + len(role) + 3 for role, text in talk) for talk in TALKS]
    limit = min(long) + 1
    lines = said(make_plan(model, {**data, "min_tokens": limit}))
    few = sum(length < limit for length in long)
    assert f"data: {few} of 30 documents left out by data.min_tokens={limit}" in lines and 0 < few < 30


def test_nothing_stale_is_trained_on(model: Path, talks: Path, tmp_path: Path) -> None:
    data = {"source": str(talks), "format": "messages"}
    first, _ = prepare_data(make_plan(model, data), Events())
    again, _ = prepare_data(make_plan(model, data), Events())
    assert again.store.reused and again.store.directory == first.store.directory
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE.replace("</s>", "</s>\n")
    other_model = tmp_path / "model"
    other_model.mkdir()
    for file in model.iterdir():
        (other_model / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(other_model)
    for plan in (make_plan(other_model, data), make_plan(model, {**data, "max_tokens": 1000})):
        store = prepare_data(plan, Events())[0].store
        assert not store.reused and store.directory != first.store.directory


def test_a_mixture_has_its_proportions_holds_out_of_each_part_and_is_described(model, talks, book) -> None:
    parts = [{"source": str(talks), "format": "messages", "weight": 1}, {"source": str(book), "weight": 3}]
    plan = make_plan(model, {"mixture": parts})
    lines: list[str] = []
    mixture, held_out = prepare_data(plan, Events(lines.append))
    assert isinstance(mixture, Mixture) and isinstance(held_out, Mixture)
    assert [sum(mixture.place(i)[0] == part for i in range(1000)) for part in (0, 1)] == [250, 750]
    assert len(held_out) == 2 and {held_out.place(i)[0] for i in range(2)} == {0, 1}
    for number, part in enumerate(mixture.parts):
        trained = {part.offset(i) for i in range(len(part))}
        held = {held_out.parts[number].offset(0)}
        assert not trained & held and max(trained) < min(held)
    for name, share in (("talks.jsonl", "25.0%"), ("book.txt", "75.0%")):
        begin = f"data, {name} ({share} of the sequences): "
        assert sum(line.startswith(begin) and "half of ctx" in line for line in lines) == 1
    assert sum("loss on" in line for line in lines) == 1
    chat, text = (mixture.parts[number].sequence(0) for number in (0, 1))
    assert (chat.labels[:-1] == -100).any() and not (text.labels[:-1] == -100).any()


def test_a_mixture_with_the_embedded_corpus_and_one_too_short_to_hold_out(model, talks) -> None:
    parts = [{"source": str(talks), "format": "messages"}, {"source": "embedded"}]
    lines: list[str] = []
    plan = make_plan(model, {"mixture": parts, "synthetic_fraction": 0.0}, ctx=512)
    mixture, held_out = prepare_data(plan, Events(lines.append))
    assert len(mixture.parts) == 2 and held_out is not None and len(held_out.parts) == 1
    assert any(line.startswith("no validation on talks.jsonl: ") for line in lines)


def test_a_mixture_is_resumed_to_the_bit_from_elsewhere_and_not_when_a_part_changed(
    model: Path, talks: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (talks, book):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    parts = [{"source": "talks.jsonl", "format": "messages"}, {"source": "book.txt"}]
    plan = make_plan(model, {"mixture": parts}, steps=4)

    def interrupt(metrics: Any) -> None:
        if metrics.step == 2:
            raise KeyboardInterrupt

    start_run(plan, tmp_path / "whole")
    run_finetune(plan, tmp_path / "whole")
    start_run(replace(plan), tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run_finetune(plan, tmp_path / "cut", events=Events(on_step=interrupt))
    monkeypatch.chdir(tmp_path / "cut")
    run_finetune(plan_resumed(tmp_path / "cut"), tmp_path / "cut", resume=True)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("whole", "cut")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 4
    start_run(plan, tmp_path / "late")
    before = data_hash(plan.spec.data)
    with (tmp_path / "book.txt").open("a") as file:
        file.write("more")
    assert data_hash(plan.spec.data) != before
    with pytest.raises(InputError, match=r"a mixture of .*talks.jsonl \(1\), .*book.txt \(1\): the data changed"):
        plan_resumed(tmp_path / "late")


def test_conversations_without_a_template_are_refused_before_anything_is_read(model_dir: Any, talks: Path) -> None:
    parts = [{"source": str(talks)}, {"source": str(talks), "format": "messages"}]
    with pytest.raises(InputError, match="data.format=messages needs a chat template") as caught:
        prepare_data(make_plan(model_dir("llama"), {"mixture": parts}), Events())
    assert "chat_template.jinja" in (caught.value.hint or "")


def command_line(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from ctxext.cli import main; main()", "finetune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_from_the_command_line(model: Path, talks: Path, book: Path, tmp_path: Path) -> None:
    short = [model, "--ctx", 64, "--steps", 1, "--set", "attention.train=dense", "--set", "global_batch_size=2"]
    chat = ["--data", talks, "--set", "data.format=messages", "--out", tmp_path / "run"]
    done = command_line(*short, *chat)
    assert done.returncode == 0, done.stderr
    assert "data: loss on " in done.stderr and (tmp_path / "run/ctxext.json").exists()
    mixture = f"data.mixture=[{{source: {talks}, format: messages, weight: 3}}, {{source: {book}}}]"
    done = command_line(*short, "--set", mixture, "--plan", "--json")
    assert done.returncode == 0, done.stderr
    assert [part["weight"] for part in json.loads(done.stdout)["spec"]["data"]["mixture"]] == [3.0, 1.0]
