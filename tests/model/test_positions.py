"""Realised RoPE frequencies equal the intended; the plan derives from the original length and refuses the senseless."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from ctxext.errors import CheckFailed, InputError
from ctxext.model.families import hybrid_config, normalise
from ctxext.model.layout import LayerKind
from ctxext.model.positions import (
    Abf,
    Auto,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    NoScaling,
    Ntk,
    Yarn,
    check_realised,
    inverse_frequencies,
    plan_positions,
)

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
    return normalise(BASE | changes)


def plan(scaling, ctx, *, source=None, original=512, usable=512):
    return plan_positions(source or config(), scaling, ctx, original_length=original, usable_length=usable)


def build(source):
    hf = CONFIG_MAPPING[source["model_type"]].from_dict(source)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(hf)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.type}-{getattr(s, 'factor', '')}")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_built_model_has_the_intended_frequencies(scaling, family):
    source = config(model_type=family, head_dim=16)
    if family == "qwen3":  # its conversions keep RoPE parameters per layer type
        source = normalise(hybrid_config(source, [LayerKind(True, 1024), LayerKind(False, None)]))
    planned = plan(scaling, 2048, source=source)
    assert planned.rope_parameters is not None
    model = build(planned.apply(source))
    assert check_realised(model, planned.apply(source)) < 1e-6


@pytest.mark.parametrize("scaling", [Dynamic(factor=4.0), SCALINGS[-1]], ids=["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_running_length(scaling):
    source = plan(scaling, 2048).apply(config())
    rotary = build(source).get_decoder().rotary_emb
    rotary(torch.zeros(1, 1, 1), torch.arange(1500)[None])
    intended, _ = inverse_frequencies(source["rope_parameters"], 16, source["max_position_embeddings"], 1500)
    torch.testing.assert_close(rotary.inv_freq, torch.tensor(intended), rtol=1e-5, atol=0)


def test_a_config_edit_that_does_nothing_is_caught():
    source = config()
    with pytest.raises(CheckFailed, match="frequencies differ"):
        check_realised(build(source), plan(Linear(), 2048).apply(source))


def test_auto_is_linear_by_the_reach_of_the_layers_with_rope():
    assert plan(Auto(), 2048).rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert plan(Auto(), 2000).factor == 4.0
    nope = normalise(hybrid_config(config(), [LayerKind(True, 128), LayerKind(False, None)]))
    kept = plan(Auto(), 102_400, source=nope)
    assert kept.rope_parameters is None and kept.reach == 128 and kept.max_position_embeddings == 102_400
    assert "no interpolation needed" in kept.summary
    wide = normalise(hybrid_config(config(), [LayerKind(True, 2048), LayerKind(False, None)]))
    assert plan(Auto(), 102_400, source=wide).factor == 4.0


def test_auto_leaves_a_model_that_bears_ctx_untouched():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    source = config(max_position_embeddings=131_072, rope_parameters=rope)
    kept = plan(Auto(), 102_400, source=source, original=8192, usable=131_072)
    assert kept.rope_parameters is None and kept.apply(source)["rope_parameters"] == rope
    longer = plan(Auto(), 262_144, source=source, original=8192, usable=131_072)
    assert longer.rope_parameters["rope_type"] == "llama3" and longer.rope_parameters["factor"] == 32.0


def test_extending_twice_starts_from_the_original_length_both_times():
    once = plan(Auto(), 2048).apply(config())
    twice = plan(Auto(), 4096, source=once, original=512, usable=2048)
    assert twice.rope_parameters["factor"] == 8.0


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
    assert kept.original_length is None and "original_max_position_embeddings" not in kept.apply(scaled)


def test_fields_that_config_json_leaves_out_are_transformers_defaults():
    raw = BASE | {"model_type": "mistral", "num_attention_heads": 8}
    assert normalise({k: v for k, v in raw.items() if k != "num_key_value_heads"})["sliding_window"] == 4096
    beside = normalise(BASE | {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5})
    assert beside["rope_parameters"]["rope_theta"] == 5e5


def test_dynamic_keeps_the_original_max_position_embeddings_or_it_would_never_start():
    assert plan(Dynamic(), 2048).max_position_embeddings == 512


@pytest.mark.parametrize(
    ("scaling", "ctx", "original", "words"),
    [
        (Linear(), 512, 512, "nothing needs scaling"),
        (Yarn(), 100, 512, "nothing needs scaling"),
        (Auto(), 2048, None, "--original-length"),
        (LongRope(short_factor=[1.0], long_factor=[1.0]), 2048, 512, "8 are needed"),
    ],
)
def test_the_senseless_is_refused(scaling, ctx, original, words):
    with pytest.raises(InputError) as caught:
        plan(scaling, ctx, original=original)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_a_scaling_that_could_do_nothing_is_refused():
    nope = normalise(hybrid_config(config(), [LayerKind(False, None)] * 2))
    with pytest.raises(InputError, match="no layer of this model uses RoPE"):
        plan(Linear(), 2048, source=nope)


def test_below_the_original_length_healing_keeps_positions():
    for scaling in (Auto(), NoScaling()):
        kept = plan(scaling, 128)
        assert kept.rope_parameters is None and kept.max_position_embeddings == 512
