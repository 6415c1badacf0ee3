"""The scale of NoPE layers: held by hooks, folded into weights, both what attention with that scale computes."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface

from ctxext.errors import CheckFailed, InputError
from ctxext.eval_and_merge import plan_eval
from ctxext.evals.eval_spec import Passkey, eval_spec_from_options
from ctxext.evals.item_runner import Outcome
from ctxext.evals.passkey import passkey
from ctxext.evals.suite import evaluate
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model
from ctxext.model.merge import merge
from ctxext.model.source import resolve
from ctxext.ops.masks import Pattern, lower_bounds
from ctxext.ops.naive_attention import naive_attention
from ctxext.retrofit import scale
from ctxext.retrofit.adjust import adjust
from ctxext.retrofit.halves import criterion, losses
from tests.model.test_merge import bundle
from tests.retrofit.test_dial import half_of, sampled

IDS = torch.randint(2, 260, (2, 61), generator=torch.Generator().manual_seed(0))
C = 1.6


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def hybrid(request, model_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("scale") / "hybrid"
    run_conversion(plan_conversion(str(model_dir(request.param)), "SN", out=place, sliding_window=16), gate=False)
    return place


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def sharper(module, query, key, value, mask, scaling=None, sliding_window=None, **_):
    lo = lower_bounds(Pattern(sliding_window), query.shape[2])
    c = C if sliding_window is None else 1.0  # in these models exactly the full layers have no positions
    return naive_attention(query, key, value, lo, scale=c * scaling).transpose(1, 2), None


def test_held_and_folded_are_what_attention_with_that_scale_computes(hybrid):
    AttentionInterface.register("ctxext_test_sharper", sharper)
    loaded = load_model(hybrid)
    model, layers = loaded.model, scale.nope_layers(loaded.source)
    assert layers == [1, 3]
    plain = logits(model)
    model.set_attn_implementation("ctxext_test_sharper")
    truth = logits(model)
    model.set_attn_implementation("ctxext")
    assert (truth - plain).abs().max() > 0.05
    with scale.held(model, layers, C):
        torch.testing.assert_close(logits(model), truth, atol=5e-4, rtol=0)
    with pytest.raises(KeyboardInterrupt), scale.held(model, layers, C):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), plain)
    scale.fold(model, layers, C)
    torch.testing.assert_close(logits(model), truth, atol=5e-4, rtol=0)


def test_behind_a_norm_folding_into_q_proj_does_nothing(hybrid):
    loaded = load_model(hybrid)
    plain = logits(loaded.model)
    with torch.no_grad():
        for i in scale.nope_layers(loaded.source):
            for parameter in loaded.model.model.layers[i].self_attn.q_proj.parameters():
                parameter.mul_(C)
    moved = (logits(loaded.model) - plain).abs().max()
    assert moved < 1e-3 if loaded.source.config.family.name == "mellum" else moved > 0.05


def merged(run, out, alpha=None, nope_scale=C, adjusting=adjust):
    given = {"alpha": alpha, "nope_scale": nope_scale, "length": None, "data": "embedded", "notice": print}
    return merge(
        resolve(str(run)),
        out,
        dtype=None,
        force=True,
        measure=lambda _: (1.0, "nothing"),
        adjust=partial(adjusting, **given),
    )


@pytest.fixture(scope="module")
def run(hybrid):
    return bundle(hybrid, hybrid.parent)


def test_a_merge_folds_it_behind_the_dial_and_the_gates_prove_it(run, tmp_path):
    merged(run, tmp_path / "half", alpha=0.5, nope_scale=None)
    report = merged(run, tmp_path / "both", alpha=0.5)
    assert report.merged_max_diff <= report.tolerance and report.saved_max_diff == 0.0
    assert list(report.adjustment) == ["alpha_multiplier", "nope_scale"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "both"))
    last = "q_norm" if any("q_norm" in name for name in before) else "q_proj"
    for name, tensor in before.items():
        c = C if f".{last}." in name and name.split(".")[2] in ("1", "3") else 1.0
        torch.testing.assert_close(after[name], c * tensor, atol=1e-6, rtol=1e-5)


def test_a_merge_that_forgets_to_fold_is_not_written(run, tmp_path):
    def forgetful(live, **given):
        made = adjust(live, **given)
        return type(made)(made.facts, made.rows)

    with pytest.raises(CheckFailed, match="merged logits differ"):
        merged(run, tmp_path / "merged", adjusting=forgetful)


@pytest.mark.parametrize("hybrid", ["qwen3"], indirect=True)
def test_the_sweep_finds_the_scale_that_text_was_drawn_from(hybrid):
    loaded = load_model(hybrid)
    plain = logits(loaded.model)
    layers = scale.nope_layers(loaded.source)
    with torch.no_grad():
        scale.fold(loaded.model, layers, 1.5)  # sharp enough to matter, and what 1.3 x is drawn from
        with scale.held(loaded.model, layers, 1.3):
            both = tuple(half_of(sampled(loaded.model, 48, 40, seed)) for seed in (1, 2))
        sharp = logits(loaded.model)
    found = scale.choose(loaded, "own", [40], both)  # 40 tokens have no room for a passkey
    assert found.decided_by == "text" and not found.passkey and found.why.endswith("text decided")
    assert 1.15 <= found.chosen <= 1.45, found.tried
    with scale.held(loaded.model, layers, found.chosen):
        assert criterion(losses(loaded, both[0])) == pytest.approx(found.tried[found.chosen], abs=1e-6)
        assert criterion(losses(loaded, both[1])) == pytest.approx(found.losses[f"c = {found.chosen:g}"][40], abs=1e-6)
    assert [d.called for d in found.differences] == ["better"]
    assert torch.equal(logits(loaded.model), sharp) and not torch.equal(sharp, plain)
    json.dumps(found.as_dict(), allow_nan=False)
    few = tuple(half_of(half.texts[:3]) for half in both)
    kept = scale.choose(loaded, "own", [40], few)
    assert kept.chosen == 1.0 and "1 is kept" in kept.why


def at(length, losses):
    """Pairs that lose so many nats a token, five tokens each."""
    return [Outcome(f"{length}/{i}", "", length, 5 * loss, 5) for i, loss in enumerate(losses)]


SAME = [2.0] * 12
NOISE = [1.0, -1.0] * 6


def decided(answers, short=None, long=None):
    """`decide` on answers at 4,096 and on text at 512 and 4,096, by c: as much more than what 1 has."""

    def text(c):
        more = [(found or {}).get(c, 0.0) for found in (short, long)]
        return [
            outcome
            for length, extra in zip((512, 4096), more, strict=True)
            for outcome in at(length, [b + e for b, e in zip(SAME, extra if extra else [0.0] * 12, strict=True)])
        ]

    tried = {c: at(4096, [2.0 + x for x in more]) for c, more in ({1.0: [0.0] * 12} | answers).items()}
    return scale.decide(tried, text, 512)


def test_the_best_by_answers_is_taken_where_it_is_told_from_1_and_nothing_else():
    better, best = [-0.1] * 12, [-0.2] * 12
    assert decided({1.1: better, 1.2: best, 1.3: better})[:2] == (1.2, 1.2)
    noisy = [-0.2 + x for x in NOISE]
    chosen, best, why = decided({1.1: better, 1.2: noisy})  # the best by its mean; luck could have made it so
    assert (chosen, best) == (1.0, 1.2) and "1.2 is not significantly better" in why
    assert decided({1.1: [0.1] * 12})[:2] == (1.0, 1.0)
    seven = [-0.1] * 7 + [0.01] + [0.0] * 4  # p is about 0.016: told from 1 alone, not as the best of nine tries
    assert decided({1.1: seven})[0] == 1.1
    assert decided({1.1: seven} | {2.0 + i: [1.0] * 12 for i in range(7)})[0] == 1.0


def test_text_rules_out_what_harms_it():
    better, best = [-0.1] * 12, [-0.2] * 12
    answers = {1.1: better, 1.2: best}
    for harm in ({"short": {1.2: [0.03] * 12}}, {"long": {1.2: [0.001] * 12}}):
        chosen, reported, why = decided(answers, **harm)
        assert (chosen, reported) == (1.1, 1.1) and "rejected: 1.2, the last because" in why
    unsure = [0.015 + 0.03 * x for x in NOISE]  # within the tolerance by its mean, which may be 0.03 as well
    assert decided(answers, short={1.2: unsure})[0] == 1.1
    assert decided(answers, short={1.2: [0.015] * 12}, long={1.2: NOISE})[0] == 1.2
    chosen, reported, why = decided({1.2: best}, short={1.2: [0.03] * 12})
    assert (chosen, reported) == (1.0, 1.2) and "0.0300 nats a token" in why and "without harm to text" in why


@pytest.mark.slow
def test_where_passkeys_are_found_their_answers_decide_and_other_keys_report(tmp_path):
    run_conversion(plan_conversion("tiny", "SN", out=tmp_path / "hybrid", sliding_window=128), gate=False)
    loaded = load_model(tmp_path / "hybrid")
    plain = logits(loaded.model)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 300, (n,), generator=generator) for n in (128, 192) for _ in range(8)]
    found = scale.choose(loaded, "own", [128, 192], (half_of(texts), half_of(texts)))
    assert found.decided_by == "passkey answers" and len(found.tried) == 9 and set(found.tried) >= set(scale.GRID)
    assert torch.equal(logits(loaded.model), plain)
    json.dumps(found.as_dict(), allow_nan=False)
    assert any("other keys" in value for _, value in found.rows())
    names = list(found.answers)
    for c, seed, per_depth, told in (
        (1.3, 1, 4, found.tried[1.3]),
        (1.0, 1, 4, found.tried[1.0]),
        (1.0, 0, 8, found.answers["c = 1"][192]),
        (float(names[-1].removeprefix("c = ")), 0, 8, found.answers[names[-1]][192]),
    ):
        with scale.held(loaded.model, scale.nope_layers(loaded.source), c):
            row = passkey(loaded, Passkey(lengths=(192,), cases=per_depth, seed=seed))[0]
        assert row.details["answer_nats"] == pytest.approx(told, abs=1e-6)
        if seed == 0:
            assert found.passkey[f"c = {c:g}"][192] == row.value


def test_an_evaluation_measures_with_the_log_scale_and_says_so(hybrid, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i * i} is the square of {i}. " for i in range(40)))
    given = {"lengths": [64], "data": str(tmp_path / "text.txt")}
    plain, scaled = (
        evaluate([resolve(str(hybrid))], eval_spec_from_options("perplexity", given | {"nope_log_scale": a}))
        for a in (None, 20.0)
    )
    assert plain.rows()[0]["value"] != scaled.rows()[0]["value"]
    assert "log(t + 20)" in scaled.models[0].positions and "log" not in plain.models[0].positions


def test_lengths_double_from_the_original_to_the_target():
    assert scale.reported_lengths(512, 4096) == [512, 1024, 2048, 4096]
    assert scale.reported_lengths(512, 3000) == [512, 1024, 2048, 3000]
    assert scale.reported_lengths(512, 256) == [256]


def test_the_log_scale_is_part_of_what_an_evaluation_is_and_needs_an_n_layer(hybrid, model_dir, tmp_path):
    given = {"lengths": [64], "nope_log_scale": 500.0}
    plans = [
        plan_eval([str(hybrid)], "perplexity", given | {"nope_log_scale": a}, out=tmp_path / "out")
        for a in (500.0, 100.0, None)
    ]
    assert len({json.dumps(plan.request, sort_keys=True) for plan in plans}) == 3
    plan_eval([str(hybrid)], "perplexity", given, against=str(model_dir("llama")), out=tmp_path / "out")
    with pytest.raises(InputError, match="no given model has an N layer.*FFFF"):
        plan_eval([str(model_dir("llama"))], "perplexity", given, out=tmp_path / "out")
    with pytest.raises(InputError, match="FFFF has no N layer"):
        load_model(model_dir("llama"), nope_log_scale=500.0)
