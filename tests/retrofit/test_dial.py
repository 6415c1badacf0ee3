"""The alpha dial: what trained moves along base + m * delta, all of it, and a choice needs more than luck."""

import json
from functools import partial

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from ctxext.errors import DataError, InputError
from ctxext.eval_and_merge import plan_merge
from ctxext.evals.perplexity import Window
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model
from ctxext.model.merge import merge
from ctxext.model.source import resolve
from ctxext.retrofit import dial
from ctxext.retrofit.adjust import adjust
from ctxext.retrofit.halves import Half, halves
from tests.model.test_merge import bundle

GIVEN = {"nope_scale": None, "length": None, "data": "embedded", "notice": print}
IDS = torch.arange(2, 50)[None]


@pytest.fixture(scope="module", params=["llama", "qwen3-tied"])
def run(request, model_dir, tmp_path_factory):
    """A trained bundle on a hybrid."""
    family, _, tied = request.param.partition("-")
    place = tmp_path_factory.mktemp("dial")
    source = str(model_dir(family, tie_word_embeddings=bool(tied)))
    run_conversion(plan_conversion(source, "SN", out=place / "hybrid", sliding_window=16), gate=False)
    return bundle(place / "hybrid", place)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_zero_is_the_base_one_is_as_trained_and_turning_back_is_exact(run):
    live, base = load_model(run), load_model(run.parent / "hybrid").model
    as_trained = logits(live.model)
    parts = dial.trained(live.model)
    dial.turn(parts, dial.everywhere(0.0))
    assert torch.equal(logits(live.model), logits(base)) and not torch.equal(as_trained, logits(base))
    dial.turn(parts, dial.everywhere(0.7))
    assert not torch.equal(logits(live.model), as_trained)
    dial.turn(parts, dial.everywhere(1.0))
    assert torch.equal(logits(live.model), as_trained)


def test_a_number_puts_every_weight_at_base_and_so_much_of_the_change(run, tmp_path):
    for name, m in (("one", None), ("half", 0.5), ("more", "1.7")):
        plan = plan_merge(str(run), tmp_path / name, None, False, alpha_multiplier=m)
        report = merge(
            plan.source,
            plan.out,
            dtype=None,
            force=False,
            measure=lambda _: (1.0, "nothing"),
            adjust=partial(adjust, **GIVEN, alpha=plan.alpha),
            requested=plan.requested,
        )
        assert report.merged_max_diff <= report.tolerance and report.saved_max_diff == 0.0
    base, one, half, more = (
        load_file(place / "model.safetensors")
        for place in (run.parent / "hybrid", tmp_path / "one", tmp_path / "half", tmp_path / "more")
    )
    moved = set()
    for name in one:
        change = one[name] - base[name]
        moved |= {name.split(".")[-2]} if bool(change.any()) else set()
        torch.testing.assert_close(half[name], base[name] + 0.5 * change, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(more[name], base[name] + 1.7 * change, atol=1e-6, rtol=1e-4)
    assert {"q_proj", "v_proj", "embed_tokens", "norm", "input_layernorm"} <= moved
    manifest = json.loads((tmp_path / "half" / "ctxext.json").read_text())
    assert manifest["spec"]["alpha_multiplier"] == 0.5
    assert set(manifest["facts"]["merge"]["adjustment"]["alpha_multiplier"]["chosen"].values()) == {0.5}


def test_queries_and_keys_of_the_base_come_back_and_nothing_else_changes(run, tmp_path):
    for name, options in (
        ("trained", {}),
        ("restored", {"restore": "qk"}),
        ("half", {"restore": "qk", "alpha_multiplier": 0.5}),
    ):
        plan = plan_merge(str(run), tmp_path / name, None, False, **options)
        report = merge(
            plan.source,
            plan.out,
            dtype=None,
            force=False,
            measure=lambda _: (1.0, "nothing"),
            adjust=partial(adjust, **GIVEN, alpha=plan.alpha, restore=plan.restore),
            requested=plan.requested,
        )
        assert report.merged_max_diff <= report.tolerance and report.saved_max_diff == 0.0
    base, trained, restored, half = (
        load_file(place / "model.safetensors")
        for place in (run.parent / "hybrid", *(tmp_path / name for name in ("trained", "restored", "half")))
    )
    for name in base:
        queries_or_keys = name.split(".")[-2] in ("q_proj", "k_proj", "q_norm", "k_norm")
        assert torch.equal(restored[name], (base if queries_or_keys else trained)[name]), name
        if queries_or_keys:
            assert torch.equal(half[name], base[name]), name
    assert not torch.equal(
        trained["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )
    manifest = json.loads((tmp_path / "restored" / "ctxext.json").read_text())
    assert manifest["spec"]["restore"] == "qk"
    assert any(
        name.endswith("layers.0.self_attn.q_proj") for name in manifest["facts"]["merge"]["adjustment"]["restored"]
    )


def test_a_run_that_trained_no_queries_and_keys_has_none_to_restore(run):
    with pytest.raises(InputError, match="did not train gate_proj"):
        dial.restore(load_model(run).model, ("gate_proj",))


def test_a_group_is_its_layers_and_the_ends_are_what_stands_outside(run):
    live = load_model(run).model
    parts = dial.trained(live)
    before = {name: p.clone() for name, p in live.named_parameters() if "modules_to_save" in name}
    scales = {name: m.scaling["default"] for name, m in live.named_modules() if isinstance(m, LoraLayer)}
    for group, layers in (("early", {"0", "1"}), ("middle", {"2"}), ("late", {"3"}), ("ends", {""})):
        dial.turn(parts, dial.everywhere(1.0) | {group: 0.5})
        named = [name for name, p in live.named_parameters() if name in before and not torch.equal(p, before[name])]
        named += [n for n, m in live.named_modules() if n in scales and m.scaling["default"] != scales[n]]
        found = {name.split(".layers.")[1].split(".")[0] if ".layers." in name else "" for name in named}
        assert found == layers
    dial.turn(parts, dial.everywhere(1.0))


@torch.no_grad()
def sampled(model, rows, tokens, seed):
    """Text of a model's own: what it was drawn from predicts it best."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), 7)
    for _ in range(tokens - 1):
        odds = model(ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], 1)
    return list(ids)


def half_of(texts):
    return Half(texts, [Window(len(ids), i, 0, len(ids), 1) for i, ids in enumerate(texts)])


def noisy(run):
    """The bundle with a change so large that a part of it is worth finding."""
    live = load_model(run)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in live.model.named_parameters():
            if "lora_B" in name or ("modules_to_save" in name and "norm" in name):
                p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return live


def test_the_sweep_finds_the_multiplier_that_text_was_drawn_from(run, tmp_path):
    live = noisy(run)
    parts = dial.trained(live.model)
    dial.turn(parts, dial.everywhere(0.5))
    both = tuple(half_of(sampled(live.model, 40, 32, seed)) for seed in (1, 2))
    truth = logits(live.model)
    dial.turn(parts, dial.everywhere(1.0))
    said = []
    found = dial.choose(live, "own", [32], both, said.append)
    assert len(said) == len(found.settings) and all(0.3 < m < 0.75 for m in found.chosen.values())
    mine, kept, none = (found.reported[name][32] for name in ("chosen", "m = 1", "m = 0"))
    assert mine < kept and mine < none
    assert {(d.against, d.called) for d in found.differences} == {("m = 1", "better"), ("m = 0", "better")}
    base = logits(load_model(run.parent / "hybrid").model)
    assert (logits(live.model) - truth).abs().mean() < 0.5 * (base - truth).abs().mean()  # and there the model is left
    dial.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    json.dumps(found.as_dict(), allow_nan=False)


def test_one_is_kept_where_the_best_of_the_grid_is_within_noise(run):
    live = noisy(run)
    dial.turn(parts := dial.trained(live.model), dial.everywhere(0.5))
    texts = sampled(live.model, 3, 48, 1)  # 3 windows: whatever they say, they cannot show it
    dial.turn(parts, dial.everywhere(1.0))
    before = logits(live.model)
    found = dial.choose(live, "own", [48], (half_of(texts), half_of(texts)))
    assert found.chosen == dial.everywhere(1.0) and "1 is kept" in found.why
    assert min(found.settings, key=lambda s: s.criterion).multipliers != dial.everywhere(1.0)
    assert torch.equal(logits(live.model), before) and list(found.reported) == ["m = 1", "m = 0"]


def test_an_interrupted_sweep_leaves_the_model_as_trained(run):
    live = load_model(run)
    before = logits(live.model)
    half = half_of([torch.arange(2, 50)])

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dial.choose(live, "own", [48], (half, half), stop)
    assert torch.equal(logits(live.model), before)


def test_halves_share_no_text_and_one_document_is_cut(run, tmp_path):
    tokenizer = load_model(run).tokenizer
    lines = [f"{i:05d} " for i in range(12_000)]
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("".join(lines[i::6]))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "one.txt").write_text("".join(lines))
    for place in (tmp_path, tmp_path / "alone"):
        both = halves(str(place), tokenizer, [64, 256])
        words = [{w for ids in half.texts for w in tokenizer.decode(ids).split() if len(w) == 5} for half in both]
        assert words[0] and words[1] and len(words[0] & words[1]) <= 1  # the cut may fall inside a word
        assert [len([w for w in half.windows if w.length == 256]) for half in both] == [32, 64]
    with pytest.raises(DataError, match="half of the text"):
        halves(str(tmp_path / "alone"), tokenizer, [64_000])


def test_auto_writes_picture_manifest_and_rows(run, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i * i} is the square of {i}. " for i in range(60)))
    given = GIVEN | {"data": str(tmp_path / "text.txt")}
    report = merge(
        resolve(str(run)),
        tmp_path / "out",
        dtype=None,
        force=False,
        measure=lambda _: (1.0, "nothing"),
        adjust=partial(adjust, **given, alpha="auto"),
    )
    assert (tmp_path / "out" / "alpha-multiplier.png").is_file()
    facts = json.loads((tmp_path / "out" / "ctxext.json").read_text())["facts"]["merge"]["adjustment"]
    assert len(facts["alpha_multiplier"]["settings"]) >= len(dial.GRID) and facts["alpha_multiplier"]["why"]
    assert any(name == "alpha multiplier" for name, _ in report.rows())
