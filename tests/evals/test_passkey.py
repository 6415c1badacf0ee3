"""A perfect copier scores 100%, a random model chance; one forward a case agrees with decoding."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ctxext.data.haystack import HaystackCase, passkey_cases
from ctxext.errors import InputError
from ctxext.evals.eval_spec import Passkey
from ctxext.evals.item_runner import wilson
from ctxext.evals.passkey import PasskeyQuestion, _decoded, _teacher_forced, passkey

LENGTHS = (300, 451)


class CopyingBody(LlamaModel):
    """Predicts what followed the longest earlier match of the last 16 tokens, at most `reach` tokens back."""

    reach = 10**9

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = torch.zeros(*input_ids.shape, self.config.hidden_size)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(1, len(row)):
                first = max(0, t - self.reach)
                best = max(range(first, t), key=lambda j: (self._match(row, j, t), j), default=0)
                hidden[b, t, row[best + 1]] = 1.0
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    @staticmethod
    def _match(row: list[int], j: int, t: int) -> int:
        n = 0
        while n < 16 and j >= n and row[j - n] == row[t - n]:
            n += 1
        return n


@pytest.fixture
def copier(loaded: Any, stand_in: Any) -> Any:
    config = LlamaConfig(vocab_size=260, hidden_size=260, num_attention_heads=2, num_hidden_layers=1)
    shell = LlamaForCausalLM(config)
    shell.model = CopyingBody(shell.config)
    with torch.no_grad():
        shell.lm_head.weight.copy_(torch.eye(260))
    return stand_in(shell, loaded.tokenizer, name="copier")


def spec(lengths: tuple[int, ...] = LENGTHS, **fields: Any) -> Passkey:
    return Passkey(lengths=lengths, **{"data": "grass", "depths": (0.0, 1.0), "cases": 2, **fields})


def test_a_copier_is_perfect_and_a_short_sighted_one_is_not(copier: Any) -> None:
    rows = passkey(copier, spec(depths=(0.0, 0.5, 1.0)))
    assert [(row.length, row.n, row.value) for row in rows] == [(300, 6, 1.0), (451, 6, 1.0)]
    copier.model.model.reach = 150
    near = passkey(copier, spec())
    assert [row.details["by_depth"] for row in near] == [{"0.0": 0.0, "1.0": 1.0}] * 2
    assert [row.value for row in near] == [0.5, 0.5]


def test_a_random_model_is_at_chance(loaded: Any) -> None:
    for row in passkey(loaded, spec(cases=5, data="embedded")):
        assert row.details["chance"] == pytest.approx(1e-5)
        assert row.low is not None and row.high is not None
        assert row.low <= row.details["chance"] <= row.high
        assert row.value == 0.0
        assert row.details["answer_nats"] > 1


def test_rows_say_what_they_are_of(loaded: Any) -> None:
    rows = passkey(loaded, spec(depths=(0.0, 0.3, 1.0), seed=5))
    assert [(row.suite, row.task, row.metric, row.length, row.n) for row in rows] == [
        ("passkey", "", "accuracy", length, 6) for length in LENGTHS
    ]
    assert rows[0].protocol == "passkey, exact match, teacher-forced, hidden in repeated grass sentences, seed 5"
    assert list(rows[0].details["by_depth"]) == ["0.0", "0.3", "1.0"]


def test_a_limit_is_spread_over_lengths_and_depths(loaded: Any) -> None:
    rows = passkey(loaded, spec(cases=4, limit=6))
    assert [(row.length, row.n, len(row.details["by_depth"])) for row in rows] == [(300, 3, 2), (451, 3, 2)]


def greedy(model: LlamaForCausalLM, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@torch.no_grad()
def test_one_forward_agrees_with_decoding(loaded: Any) -> None:
    """Cases whose answer is what the model says, and the same with one token changed, in every place."""
    rng = random.Random(0)
    cases: list[HaystackCase] = []
    for case in passkey_cases(loaded.tokenizer, 180, depths=(0.0, 0.7), per_depth=4, haystack="grass"):
        count = len(case.answer_ids)
        said = greedy(loaded.model, case.prompt_ids, count)
        place = rng.randrange(count)
        other = (*said[:place], (said[place] + 1) % 260, *said[place + 1 :])
        cases += [replace(case, answer_ids=said), replace(case, answer_ids=other), case]
    questions = [PasskeyQuestion(str(i), case) for i, case in enumerate(cases)]
    forced = [bool(outcome.score) for outcome in _teacher_forced(loaded.model, questions)]
    assert forced == [True, False, False] * 8
    assert [bool(outcome.score) for outcome in _decoded(loaded.model, questions)] == forced


def test_decode_reports_its_own_protocol(loaded: Any) -> None:
    (row,) = passkey(loaded, spec((160,), depths=(0.5,), decode=True))
    assert "decoded greedily" in row.protocol and row.n == 2
    assert "answer_nats" not in row.details


def test_answers_of_unequal_length_share_a_batch(loaded: Any) -> None:
    cases = passkey_cases(loaded.tokenizer, 180, depths=(0.5,), per_depth=3, haystack="grass")
    shorter = replace(
        cases[0], prompt_ids=cases[0].prompt_ids + cases[0].answer_ids[:2], answer_ids=cases[0].answer_ids[2:]
    )
    questions = [PasskeyQuestion(str(i), case) for i, case in enumerate([shorter, *cases[1:]])]
    together = _teacher_forced(loaded.model, questions)
    apart = [_teacher_forced(loaded.model, [question])[0] for question in questions]
    assert [o.details["tokens"] for o in together] == [3, 5, 5]
    assert [o.details["nats"] for o in together] == pytest.approx([o.details["nats"] for o in apart], rel=1e-4)


def test_the_size_of_batches_changes_nothing(copier: Any) -> None:
    results = [passkey(copier, spec((300,)), tokens_per_batch=size) for size in (1, 10**6)]
    assert [row.value for row in results[0]] == [row.value for row in results[1]]


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_length_without_room_is_refused(loaded: Any) -> None:
    with pytest.raises(InputError, match="at least"):
        passkey(loaded, spec((20,)))
