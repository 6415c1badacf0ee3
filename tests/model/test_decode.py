"""Batched greedy decoding says what one row at a time without a cache says, on every layout, whatever the chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ctxext.errors import InputError
from ctxext.generation import Conversation, plan_generation
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.decode import generate, reserved_cache, stop_ids
from ctxext.model.load import load_model

PROMPTS = [[1, *range(40, 40 + n)] for n in (3, 29, 30, 17)]
NEW = 24


@pytest.fixture(scope="module", params=["full", "SN", "S", "SSSN"])
def model(request: Any, model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("decode") / "model"
    window = None if request.param == "full" else 8
    run_conversion(plan_conversion(str(model_dir()), request.param, out=out, sliding_window=window), gate=False)
    return load_model(out, device="cpu").model


def slow(model: Any, prompt: list[int], count: int) -> list[int]:
    """Without a cache, a batch or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def truth(model: Any) -> list[list[int]]:
    return [slow(model, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [4, 7, 16, 4096])
def test_rows_together_and_in_chunks_equal_each_by_itself(model: Any, truth: list[list[int]], chunk: int) -> None:
    assert generate(model, PROMPTS, NEW, chunk=chunk) == truth
    assert [generate(model, [prompt], NEW, chunk=chunk)[0] for prompt in PROMPTS] == truth


def test_it_agrees_with_transformers(model: Any, truth: list[list[int]]) -> None:
    ids = torch.tensor([PROMPTS[2]])
    given = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    assert given[0, ids.shape[1] :].tolist() == truth[2]


def test_a_stop_ends_its_own_row_alone(model: Any, truth: list[list[int]]) -> None:
    stop = truth[1][5]
    expected = [row[: row.index(stop)] if stop in row else row for row in truth]
    assert generate(model, PROMPTS, NEW, stop={stop}) == expected


def test_the_cache_of_a_sliding_layer_does_not_grow(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    decoder = model.get_decoder()
    forward = decoder.forward

    def noting(*args: Any, **named: Any) -> Any:
        out = forward(*args, **named)
        seen.append([layer.keys.shape[2] for layer in out.past_key_values.layers])
        return out

    monkeypatch.setattr(decoder, "forward", noting)
    generate(model, [PROMPTS[1]], NEW, chunk=10)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 4
    for layer, kind in enumerate(kinds):
        held = [sizes[layer] for sizes in seen]
        if kind == "sliding_attention":
            assert max(held) <= 8, held
        else:
            assert held[-1] == 30 + NEW - 1, held


def test_a_kept_cache_goes_on_where_it_was(model: Any, truth: list[list[int]]) -> None:
    """In turns of several rows: what was read is not read again, what was answered last is."""
    rows, cache = [PROMPTS[1], PROMPTS[1][::-1]], reserved_cache(model.get_decoder().config, 0)
    at_once = generate(model, rows, NEW)
    chosen: list[tuple[int, int]] = []
    parts = [[row[:20] for row in rows], [row[20:] for row in rows]]
    first = generate(model, parts[0], 1, cache=cache)
    assert first != [] and cache.get_seq_length() == 20
    done = []
    answers = generate(
        model,
        parts[1],
        10,
        cache=cache,
        chunk=6,
        on_token=lambda *x: chosen.append(x),
        prefilled=lambda *x: done.append(x),
    )
    assert done == [(6, 10), (10, 10)]
    answers = [
        [*a, *b]
        for a, b in zip(answers, generate(model, [a[-1:] for a in answers], NEW - 10, cache=cache), strict=True)
    ]
    assert answers == at_once and at_once[0] == truth[1]
    assert [[token for row, token in chosen if row == number] for number in (0, 1)] == [row[:10] for row in at_once]
    with pytest.raises(InputError, match="one length"):
        generate(model, [[1], [1, 2]], 1, cache=cache)


def test_an_empty_prompt_is_refused(model: Any) -> None:
    for prompts in ([], [[1], []]):
        with pytest.raises(InputError, match="no tokens"):
            generate(model, prompts, 3)


def test_stops_are_those_of_tokenizer_and_generation_config(model_dir: Any) -> None:
    loaded = load_model(Path(model_dir()), device="cpu")
    loaded.model.generation_config.eos_token_id = [5, 6]
    assert stop_ids(loaded.model, loaded.tokenizer) == {0, 5, 6}


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 32,
    },
}
LONG = [[1, *range(40, 40 + n)] for n in (3, 29, 50, 17)]  # the frequencies of both change beyond 32 tokens


@pytest.fixture(scope="module", params=["dynamic", "longrope"])
def following(request: Any, model_dir: Any) -> Any:
    """A model whose RoPE follows the length of the text, from 32 tokens on."""
    rope = dict(ROPES[request.param])
    directory = model_dir(rope_parameters=rope, max_position_embeddings=32 if request.param == "dynamic" else 256)
    return directory, load_model(directory, device="cpu").model


@pytest.mark.parametrize("chunk", [4, 16, 4096])
def test_answers_are_those_of_a_fresh_forward_where_rope_follows_the_length(following: Any, chunk: int) -> None:
    directory, model = following
    truth = [stock(directory, prompt, NEW) for prompt in LONG]
    assert [generate(model, [prompt], NEW, chunk=chunk)[0] for prompt in LONG] == truth
    chosen: list[tuple[int, int]] = []
    assert generate(model, LONG, NEW, chunk=chunk, on_token=lambda *x: chosen.append(x)) == truth
    assert [[token for row, token in chosen if row == number] for number in range(4)] == truth
    assert generate(model, [LONG[1], LONG[1][::-1]], NEW, chunk=chunk)[0] == truth[1]


def stock(directory: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers' own class: a forward of the whole text for each, frequencies made anew."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = list(prompt)
    for _ in range(count):
        model.model.rotary_emb.__init__(model.config)
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_kept_cache_is_read_again_where_the_frequencies_change(following: Any) -> None:
    directory, model = following
    truth = stock(directory, LONG[1], NEW)
    for seen in (None, [LONG[1][:20]]):
        cache = reserved_cache(model.get_decoder().config, 0)
        generate(model, [LONG[1][:20]], 1, cache=cache)
        if seen is None:
            with pytest.raises(InputError, match="ids of the 32 tokens in the cache are not known"):
                generate(model, [LONG[1][20:]], NEW, cache=cache)
        else:
            assert generate(model, [LONG[1][20:]], NEW, cache=cache, seen=seen) == [truth]


def test_rows_of_several_lengths_share_no_cache_where_the_frequencies_change(following: Any) -> None:
    """The rows ran one by one with caches of their own; the given cache stayed empty."""
    _, model = following
    cache = reserved_cache(model.get_decoder().config, 0)
    with pytest.raises(InputError, match="cannot share a cache"):
        generate(model, LONG, NEW, cache=cache)
    assert cache.get_seq_length() == 0
    short = [[1, 40, 41], [1, 40]]  # all within the original length
    assert generate(model, short, 2, cache=cache) == generate(model, short, 2) and cache.get_seq_length() == 4


def test_a_conversation_reads_again_where_the_frequencies_change(following: Any) -> None:
    directory, _ = following
    talk = Conversation(plan_generation(str(directory), max_new_tokens=9, device="cpu"))
    talk.stop = frozenset()
    warned: list[str] = []
    for turn in ("ten tokens", "twelve of it", "and more yet"):
        before = list(talk.ids)
        answer = talk.ask(turn, warn=warned.append)
        new = talk.ids[len(before) : -answer.written]
        assert talk.ids[-9:] == stock(directory, before + new, 9)
        assert answer.read + answer.kept == len(before) + len(new) and sum(x.tokens for x in answer.cache) > 0
    dynamic = model_type(directory) == "dynamic"
    assert any("reads the whole text again" in line for line in warned) == dynamic


def model_type(directory: Path) -> str:
    return str(json.loads((directory / "config.json").read_text())["rope_parameters"]["rope_type"])
