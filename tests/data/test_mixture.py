"""Mixtures: where sequence i comes from follows from i alone, in exact proportions, and every part is read in turn."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctxext.config.loader import build
from ctxext.data.documents import Document
from ctxext.data.mixture import CYCLE, Mixture, apportion, slots_of
from ctxext.data.packing import PackedSequences
from ctxext.data.store import tokenise
from ctxext.errors import InputError, SpecError
from ctxext.train.finetune_spec import DataSpec, MixturePart

T = 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[PackedSequences]:
    """Three stores, of 5, 40 and 300 sequences; the tokens of part p are all 2 + p."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    directory, made = tmp_path_factory.mktemp("stores"), []
    for number, count in enumerate((5, 40, 300)):
        text = [Document(f"w{2 + number} " * (count * T), "d")]
        store = tokenise(text, tokenizer, directory / str(number), eos_id=0, source_fingerprint=f"f{number}")
        made.append(PackedSequences(store, T, seed=0, document_mask=True))
    return made


def test_a_sequence_is_the_next_one_of_its_part(parts: list[PackedSequences]) -> None:
    mixture = Mixture(parts, slots_of([1.0, 2.0, 5.0]), seed=3)
    counts = [0, 0, 0]
    for i in range(2 * CYCLE + 17):
        number, index = mixture.place(i)
        assert index == counts[number], f"sequence {i} is number {index} of part {number}, which gave {counts[number]}"
        counts[number] += 1
        if i % 97 == 0:
            got, want = mixture.sequence(i), parts[number].sequence(index)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert got.tokens[0] == 2 + number
    with pytest.raises(IndexError):
        mixture.sequence(-1)


def test_the_place_depends_on_the_index_and_the_seed_alone(parts: list[PackedSequences]) -> None:
    mixture, again, other = (Mixture(parts, [125, 250, 625], seed=seed) for seed in (3, 3, 4))
    indices = list(range(3000))
    places = [mixture.place(i) for i in indices]
    random.Random(0).shuffle(indices)
    assert all(again.place(i) == places[i] for i in indices), "the order of asking matters"
    assert [other.place(i) for i in range(3000)] != places


@given(weights=st.lists(st.floats(0.02, 1), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_beginning_of_a_run_has_the_proportions(weights: list[float], seed: int) -> None:
    slots = slots_of(weights)
    assert sum(slots) == CYCLE
    for count, weight in zip(slots, weights, strict=True):
        assert abs(count - weight / sum(weights) * CYCLE) < 1

    class Part:
        seq_len = T

    mixture = Mixture([Part()] * len(slots), slots, seed=seed)  # type: ignore[list-item]
    counts = [0] * len(slots)
    for i in range(2 * CYCLE):
        counts[mixture.place(i)[0]] += 1
        worst = max(abs(count - (i + 1) * share / CYCLE) for count, share in zip(counts, slots, strict=True))
        assert worst <= len(slots), f"after {i + 1} sequences {counts} of {slots}"
    assert counts == [2 * count for count in slots]


@given(total=st.integers(0, 50), weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_apportion(total: int, weights: list[float]) -> None:
    counts = apportion(total, weights, least=1)
    assert sum(counts) == total
    assert min(counts) >= (1 if total >= len(weights) else 0)
    exact = [total * weight / sum(weights) for weight in weights]
    if min(exact) >= 1:
        assert all(abs(count - share) < 1 + 1e-6 for count, share in zip(counts, exact, strict=True))


def test_apportion_by_hand() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(3, [98, 1, 1], least=1) == [1, 1, 1]
    assert apportion(2, [1, 5, 4], least=1) == [0, 1, 1]


def test_held_out_parts_are_gone_through_once(parts: list[PackedSequences]) -> None:
    held = [parts[0].part(4, 1), parts[2].part(290, 10)]
    mixture = Mixture(held, [len(part) for part in held], seed=0)
    assert len(mixture) == 11
    found = {(number, held[number].offset(index)) for number, index in map(mixture.place, range(11))}
    assert found == {(0, 16)} | {(1, T * n) for n in range(290, 300)}


def test_its_fingerprint_has_every_part_and_the_proportions(parts: list[PackedSequences]) -> None:
    prints = [
        Mixture(some, slots, seed=0).store.meta.source
        for some, slots in [(parts[:2], [1, 2]), (parts[:2], [2, 1]), (parts[1:], [1, 2]), (parts[:1], [1])]
    ]
    assert len(set(prints)) == 4
    meta = Mixture(parts, [1, 1, 1], seed=0).store.meta
    assert meta.tokens == sum(part.store.meta.tokens for part in parts)


def test_refusals(parts: list[PackedSequences]) -> None:
    with pytest.raises(InputError, match=r"weight 0.001 of 9.001 is less than a sequence in 1000"):
        slots_of([9.0, 0.001])
    with pytest.raises(InputError, match="each part needs one or more"):
        Mixture(parts, [1, 0, 1], seed=0)
    short = PackedSequences(parts[1].store, 2, seed=0, document_mask=True)
    with pytest.raises(InputError, match=r"different lengths: \[4, 2\]"):
        Mixture([parts[0], short], [1, 1], seed=0)


A, B = {"source": "a.jsonl", "format": "messages", "weight": 3}, {"source": "b", "text_field": "body"}


def test_a_mixture_in_a_spec() -> None:
    data = build(DataSpec, {"mixture": [A, B]}, source="test")
    assert data.parts == (
        MixturePart(source="a.jsonl", format="messages", weight=3.0),
        MixturePart(source="b", text_field="body"),
    )
    assert data.described == "a mixture of a.jsonl (3), b (1)"
    one = build(DataSpec, {"source": "c", "format": "prompt"}, source="test")
    assert one.parts == (MixturePart(source="c", format="prompt"),) and one.described == "c"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": "x", "mixture": [A]}, "source: given together with mixture; set them in its parts"),
        ({"format": "prompt", "text_field": "b", "mixture": [A]}, "format, text_field: given together with mixture"),
        ({"mixture": [A, A]}, "a.jsonl is listed twice"),
        ({"mixture": [A, {"source": "b", "weight": 0.001}]}, "b has less than a thousandth of the weight (0.001)"),
        ({"mixture": [{"source": "b", "weight": 0}]}, "mixture.0.weight: got 0; allowed: more than 0"),
        ({"mixture": [{"source": "b", "wieght": 1}]}, "did you mean weight?"),
        ({"mixture": [{"source": "embedded", "format": "prompt"}]}, "the embedded corpus is text"),
        ({"format": "messages"}, "format: messages, but the embedded corpus is text"),
        (
            {"source": "x", "format": "messages", "text_field": "b"},
            "text_field: given, but format: messages sets its own fields",
        ),
        ({"source": "x", "format": "chat"}, "allowed: 'text', 'messages', 'prompt' or 'prompt_chat'"),
        ({"min_tokens": 10, "max_tokens": 9}, "min_tokens 10 is more than max_tokens 9"),
    ],
)
def test_a_spec_that_contradicts_itself(given: dict, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(DataSpec, given, source="test")
    assert said in str(caught.value)
