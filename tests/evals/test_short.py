"""lm-eval on a model in memory, by a task with local data; what is not there is said kindly."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from ctxext.errors import EnvironmentFault, InputError
from ctxext.evals import short
from ctxext.evals.eval_spec import Short
from ctxext.evals.item_runner import Ledger, Outcome, run_job
from ctxext.model.load import LoadedModel, load_model

DOCUMENTS = [
    {"question": "the sun is", "choices": ["hot", "a small cold stone"], "label": 0},
    {"question": "the sea is", "choices": ["dry and red", "wet"], "label": 1},
    {"question": "snow falls in", "choices": ["winter", "a drawer", "July"], "label": 0},
    {"question": "two and two", "choices": ["five", "nine", "four"], "label": 2},
    {"question": "a cat has", "choices": ["four legs", "wheels"], "label": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
{more}
"""
ACC_NORM = "  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the definitions of two tasks over five documents: with acc_norm, and with acc alone."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: the suite short is not run (pip install lm-eval)")
    place = tmp_path_factory.mktemp("tasks")
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, more in (("ctxext_norm", ACC_NORM), ("ctxext_plain", "")):
        (place / f"{name}.yaml").write_text(TASK.format(name=name, data=data, more=more))
    return str(place)


@torch.no_grad()
def expected(loaded: LoadedModel, documents: list[dict[str, Any]]) -> tuple[float, float]:
    """(acc, acc_norm) by hand: the choice with the greatest log probability, in all or for each byte."""
    acc, norm = [], []
    for document in documents:
        totals = []
        for choice in document["choices"]:
            start = loaded.tokenizer(document["question"], add_special_tokens=False)["input_ids"]
            ids = loaded.tokenizer(f"{document['question']} {choice}", add_special_tokens=False)["input_ids"]
            log_p = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0].double(), -1)
            totals.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        each = [total / len(choice) for total, choice in zip(totals, document["choices"], strict=True)]
        acc.append(totals.index(max(totals)) == document["label"])
        norm.append(each.index(max(each)) == document["label"])
    return sum(acc) / len(acc), sum(norm) / len(norm)


def evaluated(loaded: LoadedModel, spec: Short) -> list[Any]:
    calls: list[tuple[str, int, int]] = []
    short.prepare(spec, Path(), "float32", "cpu", lambda *call: calls.append(call))
    assert calls[-1][1:] == (len(spec.tasks), len(spec.tasks))
    return run_job(short.job(loaded, spec, Path()), Ledger(), 1000, lambda *_: None)


def test_a_task_with_local_data(loaded: LoadedModel, tasks: str, model_dir: Callable[..., Path]) -> None:
    spec = Short(tasks=("ctxext_norm", "ctxext_plain"), include=tasks)
    seen = set()
    for model in (loaded, load_model(model_dir("qwen3", max_position_embeddings=128), device="cpu")):
        average, norm, plain = evaluated(model, spec)
        acc, acc_norm = expected(model, DOCUMENTS)
        assert (norm.task, norm.metric, norm.n, norm.value) == ("ctxext_norm", "acc_norm", 5, pytest.approx(acc_norm))
        assert (plain.task, plain.metric, plain.n, plain.value) == ("ctxext_plain", "acc", 5, pytest.approx(acc))
        assert (average.task, average.n, average.value) == ("", 10, pytest.approx((acc + acc_norm) / 2))
        assert norm.details["stderr"] == pytest.approx((acc_norm * (1 - acc_norm) / 4) ** 0.5)
        assert norm.low == pytest.approx(acc_norm - 1.96 * norm.details["stderr"])
        assert norm.protocol.startswith("lm-eval 0.")
        seen |= {acc, acc_norm}
    assert len(seen) > 1, "the test needs models and metrics that differ"


def test_a_limit_is_of_each_task(loaded: LoadedModel, tasks: str) -> None:
    average, norm, plain = evaluated(loaded, Short(tasks=("ctxext_norm", "ctxext_plain"), include=tasks, limit=2))
    assert (norm.n, plain.n, average.n) == (2, 2, 4)
    assert norm.value == pytest.approx(expected(loaded, DOCUMENTS[:2])[1])
    assert "first 2 documents of each task" in norm.protocol


def test_a_bundle_is_measured_with_its_adapter(loaded: LoadedModel, tasks: str) -> None:
    from dataclasses import replace

    from peft import LoraConfig, get_peft_model

    own = load_model(loaded.source, device="cpu")
    torch.manual_seed(0)
    adapted: Any = get_peft_model(own.model, LoraConfig(r=4, lora_alpha=400, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    bundle = replace(own, model=adapted)
    spec = Short(tasks=("ctxext_norm",), include=tasks)
    by_hand = expected(bundle, DOCUMENTS)
    assert by_hand[1] != expected(loaded, DOCUMENTS)[1], "the test needs an adapter that shows"
    assert evaluated(bundle, spec)[1].value == pytest.approx(by_hand[1])


def test_generators_are_not_seeded(loaded: LoadedModel, tasks: str) -> None:
    """lm-eval seeds them unless told not to; that it draws names from `random` cannot be helped."""
    torch.manual_seed(7)
    numpy.random.seed(7)
    before = torch.get_rng_state(), numpy.random.get_state()[1]
    evaluated(loaded, Short(tasks=("ctxext_plain",), include=tasks))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (numpy.random.get_state()[1] == before[1]).all()


def test_what_lm_eval_cannot_do(loaded: LoadedModel, tasks: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no task or group no_such_task"):
        short.prepare(Short(tasks=("no_such_task",)), tmp_path, "float32", "cpu", lambda *_: None)
    with pytest.raises(InputError, match="no such directory"):
        short.check(Short(tasks=("ctxext_norm",), include=str(tmp_path / "nothing")))
    (tmp_path / "away.yaml").write_text(TASK.format(name="ctxext_away", data=tmp_path / "away.jsonl", more=""))
    with pytest.raises(EnvironmentFault, match="the data of the task ctxext_away cannot be loaded"):
        short.prepare(Short(tasks=("ctxext_away",), include=str(tmp_path)), tmp_path, "float32", "cpu", lambda *_: None)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_lm_eval() -> None:
    with pytest.raises(EnvironmentFault, match="not installed") as refused:
        short.check(Short())
    assert 'pip install "ctxext[eval]"' in str(refused.value.hint)


def test_the_main_metric() -> None:
    numbers = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "acc_norm,none": 0.25,
        "acc_norm_stderr,none": 0.2,
    }
    assert short.main_metric(numbers) == ("acc_norm", 0.25, 0.2)
    assert short.main_metric({"f1,none": 0.7, "f1_stderr,none": "N/A", "acc,none": 0.5}) == ("acc", 0.5, None)
    assert short.main_metric({"alias": "x", "em,strict": 0.7, "em,loose": 0.9, "em_stderr,strict": 0.1}) == (
        "em",
        0.7,
        0.1,
    )
    assert short.main_metric({"acc,strict": 0.5, "acc,loose": 0.9}) == ("acc", 0.5, None)
    with pytest.raises(InputError, match="no number for x"):
        short.main_metric({"alias": "x", "acc,none": "N/A"})


def test_rows_without_lm_eval() -> None:
    outcomes = [
        Outcome("a", "a", 0, 8.0, 10, {"metric": "acc", "stderr": 0.05}),
        Outcome("b", "b", 0, 50.0, 1000, {"metric": "acc_norm", "stderr": None}),
    ]
    average, a, b = short._rows("lm-eval 1", outcomes)
    assert average.value == pytest.approx((0.8 + 0.05) / 2), "each task counts the same"
    assert (a.low, a.high) == (pytest.approx(0.702), pytest.approx(0.898))
    assert (b.low, b.high, b.value) == (None, None, 0.05)
