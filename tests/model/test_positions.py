"""Realised RoPE frequencies equal the intended; the plan derives from the original length and refuses the senseless."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from ctxext.errors import CheckFailed, InputError, ModelError
from ctxext.model.frequencies import check_realised, forget_lengths, inverse_frequencies
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind
from ctxext.model.model_config import parse_config
from ctxext.model.positions import Abf, Auto, Dynamic, Linear, Llama3, LongRope, NoScaling, Ntk, Yarn, plan_positions
from ctxext.model.source import usable_length

BASE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
SCALINGS = [
    Linear(),
    Linear(factor=3.0),
    Ntk(),
    Abf(theta=5e5),
    Dynamic(),
    Yarn(),
    Yarn(factor=6.0, attention_factor=1.5),
    Llama3(),
    LongRope(short_factor=[1.0] * 8, long_factor=[1.0 + i for i in range(8)]),
]


def config(**changes):
    return parse_config(BASE | changes)


def plan(scaling, ctx, *, source=None, original=512, usable=512):
    return plan_positions(source or config(), scaling, ctx, original_length=original, usable_length=usable)


def build(source):
    hf = CONFIG_MAPPING[source.family.name].from_dict(source.fields)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(hf)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.type}-{getattr(s, 'factor', '')}")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_built_model_has_the_intended_frequencies(scaling, family):
    source = config(model_type=family, head_dim=16)
    if family == "qwen3":  # its conversions keep RoPE parameters per layer type
        source = hybrid_config(source, [LayerKind(True, 1024), LayerKind(False, None)])
    planned = plan(scaling, 2048, source=source)
    assert planned.rope_parameters is not None
    model = build(planned.apply(source))
    assert check_realised(model, planned.apply(source)) < 1e-6


@pytest.mark.parametrize("scaling", [Dynamic(factor=4.0), SCALINGS[-1]], ids=["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_running_length(scaling):
    source = plan(scaling, 2048).apply(config())
    rotary = build(source).get_decoder().rotary_emb
    rotary(torch.zeros(1, 1, 1), torch.arange(1500)[None])
    intended, _ = inverse_frequencies(source.rope, 16, source.max_position_embeddings, 1500)
    torch.testing.assert_close(rotary.inv_freq, torch.tensor(intended), rtol=1e-5, atol=0)


def test_a_config_edit_that_does_nothing_is_caught():
    source = config()
    with pytest.raises(CheckFailed, match="frequencies differ"):
        check_realised(build(source), plan(Linear(), 2048).apply(source))


def test_auto_is_linear_by_the_reach_of_the_layers_with_rope():
    assert plan(Auto(), 2048).rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert plan(Auto(), 2000).factor == 4.0
    nope = hybrid_config(config(), [LayerKind(True, 128), LayerKind(False, None)])
    kept = plan(Auto(), 102_400, source=nope)
    assert kept.rope_parameters is None and kept.reach == 128 and kept.max_position_embeddings == 102_400
    assert "no interpolation needed" in kept.summary
    wide = hybrid_config(config(), [LayerKind(True, 2048), LayerKind(False, None)])
    assert plan(Auto(), 102_400, source=wide).factor == 4.0


def test_auto_leaves_a_model_that_supports_ctx_untouched():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    source = config(max_position_embeddings=131_072, rope_parameters=rope)
    kept = plan(Auto(), 102_400, source=source, original=8192, usable=131_072)
    assert kept.rope_parameters is None and kept.apply(source).rope == rope
    longer = plan(Auto(), 262_144, source=source, original=8192, usable=131_072)
    assert longer.rope_parameters["rope_type"] == "llama3" and longer.rope_parameters["factor"] == 32.0


def test_extending_twice_starts_from_the_original_length_both_times():
    once = plan(Auto(), 2048).apply(config())
    twice = plan(Auto(), 4096, source=once, original=512, usable=2048)
    assert twice.rope_parameters["factor"] == 8.0


@pytest.mark.parametrize("first", [Ntk(), Abf(theta=3e5)], ids=lambda s: s.type)
def test_auto_lowers_nothing_that_was_trained(first):
    """A theta set by hand may be above what the next extension asks for, and is kept."""
    once = plan(first, 2048).apply(config())
    for ctx in (2048, 4096, 65_536):
        again = plan(Auto(), ctx, source=once, original=512, usable=1024).rope_parameters
        assert again["rope_theta"] >= once.rope["rope_theta"]


def test_auto_compresses_no_less_than_before_and_keeps_yarns_temperature():
    once = plan(Yarn(factor=16.0, attention_factor=1.0), 2048).apply(config())
    again = plan(Auto(), 4096, source=once, original=512, usable=2048)
    assert again.rope_parameters == once.rope and again.factor == 16.0
    further = plan(Auto(), 16_384, source=once, original=512, usable=2048).rope_parameters
    assert further["factor"] == 32.0 and further["attention_factor"] == 1.0


def test_a_scaling_that_replaces_another_supports_what_it_was_made_for():
    """Llama 3.1 is usable to 131,072 tokens by its own scaling, not by one that was derived for 16,384."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    source = config(max_position_embeddings=131_072, rope_parameters=rope)
    replaced = plan(Linear(), 16_384, source=source, original=8192, usable=131_072)
    assert replaced.usable_length == replaced.max_position_embeddings == 16_384
    kept = plan(Auto(), 16_384, source=source, original=8192, usable=131_072)
    assert kept.usable_length == kept.max_position_embeddings == 131_072


def test_a_factor_that_leaves_positions_unseen_is_told():
    assert "beyond 1,024 positions" in plan(Linear(factor=2.0), 4096).summary
    assert "beyond" not in plan(Linear(factor=8.0), 4096).summary


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_a_config_that_kept_its_length_is_usable_as_far_as_its_factor(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    assert usable_length(config(rope_parameters=rope)) == 2048
    assert usable_length(config(rope_parameters=rope, max_position_embeddings=4096)) == 4096


def test_another_original_length_than_that_of_the_positions_that_stay_is_refused():
    once = plan(Yarn(), 2048).apply(config())
    with pytest.raises(InputError, match="yarn from 512 tokens"):
        plan(Auto(), 1024, source=once, original=256, usable=2048)


def test_what_transformers_prefers_or_fills_in():
    both = {"type": "linear", "rope_type": "dynamic", "factor": 4.0}
    assert config(rope_parameters=both).rope["rope_type"] == "dynamic"
    bare = {k: v for k, v in BASE.items() if k != "rope_parameters"}
    assert parse_config(bare | {"model_type": "smollm3", "pad_token_id": None}).rope["rope_theta"] == 2e6
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert config(rope_parameters=yarn).rope["original_max_position_embeddings"] == 512
    stated = config(
        rope_parameters=yarn | {"original_max_position_embeddings": 256}, original_max_position_embeddings=128
    )
    assert stated.rope["original_max_position_embeddings"] == 128
    for source in (config(rope_parameters=yarn), stated):
        assert check_realised(build(source), source) < 1e-6


@pytest.mark.parametrize("field", [{"truncate": False}, {"truncate": None}, {"mscale": 0.7}, {"mscale_all_dim": 1.0}])
def test_yarn_of_other_formulas_is_refused(field):
    with pytest.raises(ModelError, match="is not supported"):
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0} | field)


def test_a_null_partial_rotary_factor_is_refused_where_the_formula_reads_it():
    """transformers' formulas of Mellum read it for default RoPE too; Llama's does not."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": None}
    assert config(rope_parameters=rope).rope == {"rope_type": "default", "rope_theta": 1e4}
    mellum = {"model_type": "mellum", "layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense"] * 2}
    with pytest.raises(ModelError, match="null, from which transformers cannot compute default RoPE"):
        config(rope_parameters={"full_attention": rope}, head_dim=16, **mellum)


@pytest.mark.parametrize("family", ["llama", "mellum"])
def test_what_a_model_saw_before_does_not_move_its_dynamic_frequencies(family):
    source = config(head_dim=16)
    if family == "mellum":
        source = hybrid_config(config(model_type="qwen3", head_dim=16), [LayerKind(True, 64), LayerKind(False, None)])
    source = plan(Dynamic(factor=4.0), 2048, source=source).apply(source)
    model = build(source).eval()
    forget_lengths(model, source)
    ids = torch.arange(600)[None] % 32
    with torch.no_grad():
        model(ids)
        for length in (512, 540, 512, 600):
            fresh = build(source).eval()
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(model(ids[:, :length]).logits, fresh(ids[:, :length]).logits)


@pytest.mark.parametrize("first", [Ntk(), Abf(theta=3e5)], ids=lambda s: s.type)
def test_a_rewritten_theta_is_not_the_start_of_the_next_extension(first):
    once = plan(first, 2048).apply(config())
    for scaling in (Ntk(), Yarn()):
        again = plan(scaling, 4096, source=once, original=512, usable=2048).rope_parameters
        assert again == plan(scaling, 4096).rope_parameters


def test_an_unknown_original_length_stays_unknown():
    scaled = config(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, max_position_embeddings=2048
    )
    kept = plan(Auto(), 1024, source=scaled, original=None, usable=2048)
    assert kept.original_length is None and "original_max_position_embeddings" not in kept.apply(scaled).fields


def test_fields_that_config_json_leaves_out_are_transformers_defaults():
    raw = BASE | {"model_type": "mistral", "num_attention_heads": 8}
    assert parse_config({k: v for k, v in raw.items() if k != "num_key_value_heads"}).fields["sliding_window"] == 4096
    beside = parse_config(BASE | {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5})
    assert beside.rope["rope_theta"] == 5e5


def test_dynamic_keeps_the_original_max_position_embeddings_or_it_would_never_start():
    assert plan(Dynamic(), 2048).max_position_embeddings == 512


@pytest.mark.parametrize(
    ("scaling", "ctx", "original", "words"),
    [
        (Linear(), 512, 512, "no scaling is needed"),
        (Yarn(), 100, 512, "no scaling is needed"),
        (Auto(), 2048, None, "--original-length"),
        (LongRope(short_factor=[1.0], long_factor=[1.0]), 2048, 512, "8 are needed"),
    ],
)
def test_the_senseless_is_refused(scaling, ctx, original, words):
    with pytest.raises(InputError) as caught:
        plan(scaling, ctx, original=original)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_a_scaling_that_could_do_nothing_is_refused():
    nope = hybrid_config(config(), [LayerKind(False, None)] * 2)
    with pytest.raises(InputError, match="no layer of this model uses RoPE"):
        plan(Linear(), 2048, source=nope)


def test_below_the_original_length_healing_keeps_positions():
    for scaling in (Auto(), NoScaling()):
        kept = plan(scaling, 128)
        assert kept.rope_parameters is None and kept.max_position_embeddings == 512
