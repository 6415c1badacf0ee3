"""Batched greedy decoding says what one row at a time without a cache says, on every layout, whatever the chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ctxext.errors import InputError
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
    told: list[tuple[int, int]] = []
    parts = [[row[:20] for row in rows], [row[20:] for row in rows]]
    first = generate(model, parts[0], 1, cache=cache)
    assert first != [] and cache.get_seq_length() == 20
    done = []
    answers = generate(
        model, parts[1], 10, cache=cache, chunk=6, told=lambda *x: told.append(x), prefilled=lambda *x: done.append(x)
    )
    assert done == [(6, 10), (10, 10)]
    answers = [
        [*a, *b]
        for a, b in zip(answers, generate(model, [a[-1:] for a in answers], NEW - 10, cache=cache), strict=True)
    ]
    assert answers == at_once and at_once[0] == truth[1]
    assert [[token for row, token in told if row == number] for number in (0, 1)] == [row[:10] for row in at_once]
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
