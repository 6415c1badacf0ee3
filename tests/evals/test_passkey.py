"""A perfect copier scores 100%, a random model chance; one forward a case agrees with decoding."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ctxext.data.haystack import Case, passkey_cases
from ctxext.errors import InputError
from ctxext.evals.passkey import _decoded, _teacher_forced, passkey, wilson

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


def test_a_copier_is_perfect_and_a_short_sighted_one_is_not(copier: Any) -> None:
    result = passkey(copier, LENGTHS, depths=(0.0, 0.5, 1.0), per_depth=2, haystack="grass")
    assert (result.overall.n, result.overall.hits) == (12, 12), result.cells
    copier.model.model.reach = 150
    near = passkey(copier, LENGTHS, depths=(0.0, 1.0), per_depth=2, haystack="grass")
    assert near.by_depth[1.0].accuracy == 1.0, near.cells
    assert near.by_depth[0.0].accuracy == 0.0, near.cells
    assert near.overall.accuracy == 0.5


def test_a_random_model_is_at_chance(loaded: Any) -> None:
    result = passkey(loaded, LENGTHS, depths=(0.0, 1.0), per_depth=5)
    assert result.chance == pytest.approx(1e-5)
    assert result.overall.low <= result.chance <= result.overall.high
    assert result.overall.hits == 0
    assert all(cell.answer_nats is not None and cell.answer_nats > 1 for cell in result.cells)


def test_the_grid_is_accounted_for(loaded: Any) -> None:
    result = passkey(loaded, LENGTHS, depths=(0.0, 0.3, 1.0), per_depth=2, seed=5, haystack="grass")
    assert {length: score.n for length, score in result.by_length.items()} == {300: 6, 451: 6}
    assert {depth: score.n for depth, score in result.by_depth.items()} == {0.0: 4, 0.3: 4, 1.0: 4}
    assert [(cell.length, cell.depth, cell.score.n) for cell in result.cells] == [
        (length, depth, 2) for length in LENGTHS for depth in (0.0, 0.3, 1.0)
    ]
    assert (result.haystack, result.seed, result.protocol) == ("grass", 5, "passkey-teacher-forced")
    assert [row["length"] for row in result.rows()] == list(LENGTHS)


def greedy(model: LlamaForCausalLM, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@torch.no_grad()
def test_one_forward_agrees_with_decoding(loaded: Any) -> None:
    """Cases whose answer is what the model says, and the same with one token changed, in every place."""
    rng = random.Random(0)
    cases: list[Case] = []
    for case in passkey_cases(loaded.tokenizer, 180, depths=(0.0, 0.7), per_depth=4, haystack="grass"):
        count = len(case.answer_ids)
        said = greedy(loaded.model, case.prompt_ids, count)
        place = rng.randrange(count)
        other = (*said[:place], (said[place] + 1) % 260, *said[place + 1 :])
        cases += [replace(case, answer_ids=said), replace(case, answer_ids=other), case]
    forced = [outcome.hit for outcome in _teacher_forced(loaded.model, cases)]
    assert forced == [True, False, False] * 8
    assert [outcome.hit for outcome in _decoded(loaded.model, cases)] == forced


def test_decode_reports_its_own_protocol(loaded: Any) -> None:
    decoded = passkey(loaded, [160], depths=(0.5,), per_depth=2, haystack="grass", decode=True)
    assert decoded.protocol == "passkey-decoded"
    assert decoded.cells[0].answer_nats is None
    assert decoded.overall.n == 2


def test_answers_of_unequal_length_share_a_batch(loaded: Any) -> None:
    cases = passkey_cases(loaded.tokenizer, 180, depths=(0.5,), per_depth=3, haystack="grass")
    shorter = replace(
        cases[0], prompt_ids=cases[0].prompt_ids + cases[0].answer_ids[:2], answer_ids=cases[0].answer_ids[2:]
    )
    together = _teacher_forced(loaded.model, [shorter, *cases[1:]])
    apart = [_teacher_forced(loaded.model, [case])[0] for case in [shorter, *cases[1:]]]
    assert [o.tokens for o in together] == [3, 5, 5]
    assert [o.nats for o in together] == pytest.approx([o.nats for o in apart], rel=1e-4)


def test_the_size_of_batches_changes_nothing(copier: Any) -> None:
    results = [
        passkey(copier, [300], depths=(0.0, 1.0), per_depth=2, haystack="grass", tokens_per_batch=size)
        for size in (1, 10**6)
    ]
    assert results[0].cells == results[1].cells


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_refusals(loaded: Any) -> None:
    for arguments, options in [
        (([300],), {"haystack": "hay"}),
        (([300],), {"depths": (1.5,)}),
        (([20],), {}),
        (([],), {}),
        (([300],), {"per_depth": 0}),
    ]:
        with pytest.raises(InputError):
            passkey(loaded, *arguments, **options)
