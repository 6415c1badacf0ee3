"""Passkey cases: exact length, needle where it was asked for, the answer only the key, and nothing shared or global."""

from __future__ import annotations

import random

import pytest

from ctxext.data import haystack
from ctxext.errors import InputError


class CharacterTokenizer:
    """One id per character, so that a case can be read back."""

    def __init__(self, bos_token_id: int | None = 0):
        self.bos_token_id = bos_token_id

    def __call__(self, text: str | list[str], *, add_special_tokens: bool, **options: bool) -> dict[str, list]:
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens=add_special_tokens)["input_ids"] for one in text]}
        bos = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": bos + self.encode(text, add_special_tokens=False)}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


class PairTokenizer(CharacterTokenizer):
    """Merges a space with the digit after it: the answer's first token then begins before the question's end."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = super().encode(text, add_special_tokens=add_special_tokens)
        merged: list[int] = []
        for token in ids:
            if merged and merged[-1] == ord(" ") and chr(token).isdigit():
                merged[-1] = 1000 + token
            else:
                merged.append(token)
        return merged


def _text(ids) -> str:
    return "".join(chr(i) for i in ids if i)


FILLER = [ord(character) for character in "some text to hide things in; "]


@pytest.mark.parametrize("length", [150, 512, 2048])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("bos", [None, 0])
def test_length_is_exact_and_the_needle_is_at_its_depth(length, depth, bos):
    case = haystack.passkey_case(CharacterTokenizer(bos), length, depth, random.Random(1), FILLER)
    assert len(case.prompt_ids) + len(case.answer_ids) == length
    prompt = _text(case.prompt_ids)
    assert prompt.endswith("What is the pass key? The pass key is ")
    assert _text(case.answer_ids) == case.key
    needle = "\n" + haystack.NEEDLE.format(key=case.key)
    assert _text(case.prompt_ids[case.needle_start :]).startswith(needle)
    room = length - len(needle) - len("\nWhat is the pass key? The pass key is ") - 5 - (bos is not None)
    assert case.needle_start - (bos is not None) == round(depth * room)


def test_answer_with_a_tokenizer_that_merges_over_the_boundary():
    case = haystack.passkey_case(PairTokenizer(), 300, 0.5, random.Random(1), FILLER)
    assert len(case.prompt_ids) + len(case.answer_ids) == 300
    assert case.answer_ids[0] == 1000 + ord(case.key[0])
    assert _text(case.answer_ids[1:]) == case.key[1:]
    assert _text(case.prompt_ids).endswith("The pass key is")


def test_the_prompt_does_not_have_the_key_after_the_needle():
    case = haystack.passkey_case(CharacterTokenizer(), 800, 0.3, random.Random(2), FILLER)
    assert _text(case.prompt_ids).count(case.key) == 2


def test_cases_repeat_by_seed_and_differ_in_key_and_filler():
    arguments = {
        "depths": [0.1, 0.9],
        "per_depth": 3,
        "haystack": "one two three four five six seven eight nine\n" * 20,
    }
    first = haystack.passkey_cases(CharacterTokenizer(), 400, seed=5, **arguments)
    assert first == haystack.passkey_cases(CharacterTokenizer(), 400, seed=5, **arguments)
    assert first != haystack.passkey_cases(CharacterTokenizer(), 400, seed=6, **arguments)
    assert len({case.key for case in first}) == 6
    assert [case.depth for case in first] == [0.1] * 3 + [0.9] * 3


def test_the_global_generator_is_left_alone():
    random.seed(0)
    before = random.getstate()
    haystack.passkey_cases(CharacterTokenizer(), 200, depths=[0.5], per_depth=2, haystack="abc ")
    assert random.getstate() == before


@pytest.mark.parametrize("kind", ["held-out", "grass"])
def test_haystacks_by_name(kind):
    case = haystack.passkey_cases(CharacterTokenizer(), 512, depths=[0.5], per_depth=1, haystack=kind)[0]
    assert len(case.prompt_ids) + len(case.answer_ids) == 512


def test_bad_arguments_are_refused():
    tokenizer, rng = CharacterTokenizer(), random.Random(0)
    with pytest.raises(InputError, match="at least 105 tokens"):
        haystack.passkey_case(tokenizer, 40, 0.5, rng, FILLER)
    with pytest.raises(InputError, match="outside 0 to 1"):
        haystack.passkey_case(tokenizer, 400, 1.5, rng, FILLER)
    with pytest.raises(InputError, match="unknown"):
        haystack.haystack_text("grasss")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty"):
        haystack.haystack_ids(tokenizer, "")
