"""The search over layers without a model, its budget, and the planner on random models."""

import json
import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from ctxext.data.documents import Document
from ctxext.errors import DataError, InputError, ModelError
from ctxext.model.convert import plan_conversion
from ctxext.model.layout import HybridSpec, LayerKind, layer_kinds
from ctxext.model.load import load_tokenizer
from ctxext.ops.cost import ModelShape
from ctxext.retrofit.damage import Damage
from ctxext.retrofit.layers import EXHAUSTIVE, Request, fixed_choices, full_layer_count, plan_request, search
from ctxext.retrofit.picture import pareto_png
from ctxext.retrofit.planner import _measured, calibration_samples, choose_layers

SHAPE = ModelShape(
    hidden_size=64,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=99,
    tied=True,
)
SOURCE = (LayerKind(True, None),) * 8
PROSE = "The old pilot wrote down what the river did at every bend, and drew it by night from memory. " * 400


def noisy(L, seed=0):
    """Damages of single layers and of pairs that are full together, and the score of a choice."""
    rng = random.Random(seed)
    window, nope = [rng.random() for _ in range(L)], [0.3 * rng.random() for _ in range(L)]
    pairs = {pair: 0.2 * rng.random() for pair in combinations(range(L), 2)}
    requested = []

    def score(choice):
        single = sum(nope[i] if i in choice else window[i] for i in range(L))
        return single + sum(pairs[pair] for pair in combinations(choice, 2))

    def measure(choices):
        requested.append(list(choices))
        return [score(choice) for choice in choices]

    return [w - n for w, n in zip(window, nope, strict=True)], measure, score, requested


@pytest.mark.parametrize(("L", "k"), [(4, 2), (5, 0), (5, 1), (6, 5), (20, 1), (8, 2)])
def test_few_layouts_are_all_measured_and_the_best_is_found(L, k):
    gains, measure, score, requested = noisy(L)
    found = search(L, k, gains, measure)
    assert found.exhaustive and found.best == min(combinations(range(L), k), key=score)
    assert len(requested) == 1, "they could have been measured together"
    if 2**L <= EXHAUSTIVE:
        assert len(found.measured) == 2**L
    assert all(value == score(choice) for choice, value in found.measured.items())


@pytest.mark.parametrize(("L", "k"), [(12, 4), (16, 8), (32, 16), (24, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_of_many_a_bounded_number_is_measured_none_twice_and_no_fixed_pattern_is_better(L, k, seed):
    gains, measure, score, requested = noisy(L, seed)
    found = search(L, k, gains, measure)
    every = [choice for group in requested for choice in group]
    assert not found.exhaustive and len(found.best) == k
    assert len(every) == len(set(every)) == len(found.measured) <= 1 + 5 + 4 * k + 2 * (k + 9)
    assert found.best == min((c for c in found.measured if len(c) == k), key=score)
    for name, choice in fixed_choices(L, k).items():
        assert choice in found.measured, name
        assert len(choice) != k or score(found.best) <= score(choice)
    if (L, k) == (12, 4):
        values = sorted(score(choice) for choice in combinations(range(L), k))
        assert score(found.best) <= values[len(values) // 50], "among the best 2% of 495"


def test_layers_that_do_the_same_are_not_all_kept():
    """Layers 0 to 6 retrieve the same: each alone gains most, all together no more than one. Single damages take three
    of them; 10 and 11, which gain less, are found because what was measured together replaces what was believed.
    """

    def score(choice):
        return 5.0 - 2.0 * any(i < 7 for i in choice) - 0.5 * (10 in choice) - 0.4 * (11 in choice)

    gains = [2.0] * 7 + [0.0] * 3 + [0.5, 0.4]
    found = search(12, 4, gains, lambda choices: [score(choice) for choice in choices])
    assert not found.exhaustive and {10, 11} <= set(found.best)


def test_a_swap_repairs_a_greedy_choice():
    """Alone layer 0 is best; but 5 and 6 together are better than anything with 0, and not one by one."""

    def score(choice):
        value = 9.0 - 1.0 * (0 in choice) - 0.9 * (5 in choice) - 0.1 * (6 in choice)
        return value - 3.0 * ({5, 6} <= set(choice))

    gains = [1.0, 0, 0, 0, 0, 0.9, 0.1, 0, 0, 0, 0, 0]
    found = search(12, 2, gains, lambda choices: [score(choice) for choice in choices])
    assert found.best == (5, 6)


def test_the_fixed_patterns_are_those_of_layouts():
    for L, k in ((8, 4), (8, 2), (7, 3), (12, 5)):
        fixed = fixed_choices(L, k)
        for pattern in ("SN", "NS", "SSSN"):
            kinds = layer_kinds(HybridSpec(layer_pattern=pattern, sliding_window=16), L)
            assert fixed[pattern] == tuple(i for i, kind in enumerate(kinds) if kind.letter == "N")
        assert all(len(set(fixed[name])) == k for name in ("even, last", "even, first"))
    assert fixed_choices(8, 2)["even, last"] == fixed_choices(8, 2)["SSSN"]
    assert fixed_choices(7, 3)["even, last"] == (2, 4, 6) and fixed_choices(7, 3)["even, first"] == (0, 2, 4)


@pytest.mark.parametrize(
    ("budget", "window", "expected"),
    [
        (None, 16, 4),
        ("3", 16, 3),
        ("0", 16, 0),
        ("100%", 16, 7),
        ("50%", 16, 3),  # at 256 tokens k full layers of 8 keep (256 k + 16 (8 - k)) / 2048
        ("53.2%", 16, 4),
        ("53.1%", 16, 3),
        ("25%", 64, 0),
    ],
)
def test_a_budget_is_layers_or_a_share_of_the_cache(budget, window, expected):
    assert full_layer_count(budget, SHAPE, SOURCE, window, 256) == expected


def test_a_share_is_of_the_sources_own_cache():
    sliding = (LayerKind(True, 128),) * 8
    assert full_layer_count("50%", SHAPE, sliding, 16, 256) == 1  # (256 + 7 * 16) / 1024; two are (512 + 96) / 1024


REFUSED = {
    "8": "8 layers, so 0 to 7",
    "-1": "0 to 7",
    "x": "allowed are",
    "2.5": "allowed are",
    "%": "allowed are",
    "0%": "shares above 0%",
    "101%": "up to 100%",
    "nan%": "shares above 0%",
    "6%": "sliding layers alone hold 6.25%",
    "0": "nothing further back",
}


@pytest.mark.parametrize("budget", REFUSED)
def test_a_budget_that_cannot_be_is_refused(budget):
    with pytest.raises(InputError, match=REFUSED[budget]):
        asked_for(budget=budget)


def asked_for(window=16, usable=256, **changes):
    given = {"budget": None, "length": None, "calibration": None, "tokens": None, "i_know": False}
    hybrid = HybridSpec(layer_pattern="SN", sliding_window=window)
    return plan_request(SHAPE, SOURCE, hybrid, usable, **given | changes)


def test_a_request_is_checked_before_anything_is_read(tmp_path):
    assert asked_for() == Request(4, 256, "embedded", 8192, 256)
    assert asked_for(usable=9000, length=65536, tokens=4096) == Request(4, 65536, "embedded", 4096, 2048)
    assert asked_for(usable=9000, window=2000).row_tokens == 4000
    assert asked_for(budget="0", i_know=True).full == 0
    with pytest.raises(InputError, match="covers all of the 256"):
        asked_for(window=256)
    with pytest.raises(InputError, match="one row or more, here 256"):
        asked_for(tokens=255)
    with pytest.raises(InputError, match="--length 0"):
        asked_for(length=0)
    with pytest.raises(InputError, match=r"none\.txt"):
        asked_for(calibration=str(tmp_path / "none.txt"))


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return str(path)


def test_samples_are_text_and_questions_with_their_answers_marked(model_dir, prose):
    tokenizer = load_tokenizer(model_dir("llama"))
    samples = calibration_samples(tokenizer, Request(2, 256, prose, 1500, 256), 80)
    assert samples.texts == 5 and samples.ids.shape == (10, 256) and samples.ids.dtype == torch.int64
    assert not samples.answers[:5].any() and not samples.needles[:5].any()
    assert tokenizer.decode(samples.ids[0]) == PROSE[:256]
    assert len({tuple(row.tolist()) for row in samples.ids[:5]}) == 5
    for row in range(5, 10):
        text = tokenizer.decode(samples.ids[row])
        key = text[-5:]
        assert key.isdigit() and tokenizer.decode(samples.ids[row].roll(-1)[samples.answers[row]]) == key
        assert tokenizer.decode(samples.ids[row][samples.needles[row]]) == 2 * key
        last_needle = int(samples.needles[row].nonzero().max())
        assert 256 - 5 - last_needle > 80, "the answer is within the window of the question"


def test_text_shorter_than_two_windows_is_refused_and_rows_shrink_to_what_there_is(model_dir, tmp_path):
    tokenizer, path = load_tokenizer(model_dir("llama")), tmp_path / "short.txt"
    path.write_text("x" * 63)
    with pytest.raises(DataError, match="63 tokens; a window of 32 can be measured in texts of at least 64"):
        calibration_samples(tokenizer, Request(2, 256, str(path), 1500, 256), 32)
    path.write_text("x" * 64)
    samples = calibration_samples(tokenizer, Request(2, 256, str(path), 1500, 256), 32)
    assert samples.ids.shape == (1, 64), "a row of 64 has no room for a passkey"


def chosen_for(directory, prose, tmp_path, pattern="SN", **changes):
    plan = plan_conversion(str(directory), pattern, sliding_window=16, out=tmp_path / "out")
    given = {"budget": "2", "length": None, "calibration": prose, "tokens": 512, "i_know": True} | changes
    request = plan_request(plan.source.shape, plan.source.kinds, plan.hybrid, plan.source.usable_length, **given)
    return choose_layers(plan, request, device="cpu")


@pytest.mark.parametrize(("family", "pattern"), [("llama", "SN"), ("qwen3", "SN"), ("mistral", "SF")])
def test_the_choice_is_no_worse_than_any_fixed_pattern(model_dir, prose, tmp_path, family, pattern):
    changes = {"sliding_window": 40} if family == "mistral" else {}
    directory = model_dir(family, max_position_embeddings=256, **changes)
    found = chosen_for(directory, prose, tmp_path, pattern)
    assert found.exhaustive and len(found.measured) == 16
    by_name = {name: choice for choice in found.measured for name in choice.names}
    assert {pattern, pattern[::-1], "SSS" + pattern[1]} <= set(by_name)
    assert found.chosen.score == min(c.score for c in found.measured if len(c.full) == 2)
    assert [kind.letter for kind in found.kinds].count(pattern[1]) == 2
    assert found.share == 0 and found.source_answer_loss > 1, "a random model cannot retrieve"
    assert "does not retrieve" in " ".join(found.notes())
    assert found.chosen.score == found.chosen.damage.text
    assert len(found.explain()[0]) == len(found.EXPLAIN) and len(found.rows()[0]) == len(found.HEADER)
    assert json.loads(json.dumps(found.as_dict()))["chosen"]["full"] == list(found.chosen.full)
    assert pareto_png(found).startswith(b"\x89PNG")
    whole = next(c for c in found.measured if len(c.full) == 4)
    assert found.chosen.flops < whole.flops and (whole.kv_share == 1 or family == "mistral")
    if pattern == "SF":
        assert all(facts.full.text == 0 for facts in found.layers) == (family != "mistral")


def test_the_cache_of_a_float64_model_counts_8_bytes_a_value(model_dir, tmp_path):
    plan = plan_conversion(str(model_dir("llama")), "SN", sliding_window=16, out=tmp_path / "out")
    plan = replace(plan, config=plan.config.with_fields(dtype="float64"))
    damage = Damage(0.0, 0.0, None, ())
    measured = _measured(plan, Request(4, 64, "", 512, 64), (0, 1, 2, 3), damage, 0.0)
    assert measured.kv_bytes == 4 * 64 * 2 * 2 * 8 * 8 and measured.kv_share == 1  # 4 layers, K and V, 2 heads of 8


def test_without_a_full_layer_it_says_what_is_lost(model_dir, prose, tmp_path):
    found = chosen_for(model_dir("llama", max_position_embeddings=256), prose, tmp_path, budget="0")
    assert found.chosen.full == () and {kind.letter for kind in found.kinds} == {"S"}
    assert "nothing further back" in " ".join(found.notes())


def test_pickles_are_refused(model_dir, prose, tmp_path):
    directory = tmp_path / "pickled"
    directory.mkdir()
    source = model_dir("llama", max_position_embeddings=256)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    torch.save({"a": torch.zeros(1)}, directory / "pytorch_model.bin")
    plan = plan_conversion(str(directory), "SN", sliding_window=16, out=tmp_path / "out", allow_pickle=True)
    with pytest.raises(ModelError, match="only pickled weights"):
        choose_layers(plan, Request(2, 256, prose, 512, 256))


def test_documents_arejoined_by_eos(model_dir):
    from ctxext.retrofit.calibration import joined

    tokenizer = load_tokenizer(model_dir("llama"))
    ids = joined([Document("abc", "1"), Document("de", "2")], tokenizer, 100)
    assert tokenizer.decode(ids) == "abc</s>de"
