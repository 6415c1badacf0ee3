"""Every layout x family x target has a verdict with sources, and no pattern passes that the target would alter."""

import json
import re
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from ctxext.config import presets
from ctxext.config.loader import assignments, build
from ctxext.errors import InputError, ModelError
from ctxext.export.matrix import FACTS, TARGETS, verdict
from ctxext.export.write import plan_export
from ctxext.model.families import FAMILIES
from ctxext.model.frequencies import check_realised
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import find_hybrid, layer_kinds, pattern_text
from ctxext.model.model_config import parse_config
from ctxext.train.finetune_spec import FinetuneSpec

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192}  # fmt: skip
SOURCES = ("llama", "mistral", "qwen2", "qwen3")


def plain(family, **changes):
    return parse_config({"model_type": family, "sliding_window": None, **SIZES, **changes})


def converted(family, hybrid, window=None, **changes):
    source = plain(family, **changes)
    return hybrid_config(source, layer_kinds(find_hybrid(hybrid, window), 8))


def honoured(target, config):
    return verdict(target, config).honoured


def llama_cpp(config):
    """What llama.cpp computes, layer by layer, written down again: (RoPE, window), or None where it stops."""
    kind = config.family.name
    if kind == "mellum":
        return None
    return [(kind != "smollm3" or (i + 1) % 4 != 0, None) for i in range(config.shape.num_layers)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("hybrid", [*presets.names("hybrid"), "FFFN", "NNNN", "FS", "FFNN", "N"])
def test_every_layout_of_every_family_has_a_verdict_and_none_is_honoured_silently(hybrid, family, target):
    if family == "qwen3" and hybrid in ("FFFN", "FFNN"):  # Mellum has no words for these: `convert` refuses them
        with pytest.raises(ModelError, match="in all or in none"):
            converted(family, hybrid)
        return
    config = converted(family, hybrid, 128 if hybrid == "FS" else None)
    found = verdict(target, config)
    assert found.sources and found.how and re.fullmatch(r"2026-\d\d", found.checked) and found.not_checked
    if not found.honoured:
        assert found.nearest and all("SOURCE" in text or "--set" in text for text in found.nearest)
    kinds = config.kinds
    assert found.layout == pattern_text(kinds)
    if target in ("hf", "vllm"):
        assert found.honoured
    else:
        exact = llama_cpp(config) == [(kind.use_rope, kind.sliding_window) for kind in kinds]
        assert found.honoured == (exact and family in ("llama", "mistral"))  # qwen2 has biases: it stops


@pytest.mark.parametrize("target", ["gguf", "ollama"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_nearest_pattern_that_is_named_would_be_honoured(family, target):
    for hybrid in ("swa128-nope", "full", "swa2048"):
        for text in verdict(target, converted(family, hybrid)).nearest:
            pattern = re.search(r"--hybrid (\w+)", text)
            near = converted(family, pattern[1]) if pattern else plain(family)
            assert pattern or "without a conversion" in text
            assert not (pattern and hybrid == "full")  # the source is the same function already
            assert honoured(target, near)


@pytest.mark.parametrize("family", SOURCES)
def test_a_plain_model_is_honoured_everywhere(family):
    for target in TARGETS:
        assert honoured(target, plain(family)), target


def test_a_window_counts_only_where_it_hides_something():
    assert not honoured("gguf", plain("mistral", sliding_window=4096))
    assert honoured("gguf", plain("mistral", sliding_window=8192))
    assert honoured("vllm", plain("mistral", sliding_window=4096))


def test_windows_of_some_qwen_layers_are_refused_by_vllm_and_the_way_out_is_the_same_layout():
    config = plain("qwen3", use_sliding_window=True, sliding_window=512, max_window_layers=6)
    found = verdict("vllm", config, "mine")
    assert not found.honoured and "--hybrid FFFFFFSS --sliding-window 512" in found.nearest[0]
    assert found.nearest[0].startswith("`ctxext convert mine")
    assert honoured("vllm", converted("qwen3", "FFFFFFSS", 512))


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn+": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048,
              "attention_factor": 1.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                 "original_max_position_embeddings": 2048, "factor": 4.0},
}  # fmt: skip
ALLOWED = {  # (target, family): the scalings it honours
    ("hf", "llama"): set(ROPES),
    ("vllm", "llama"): {"linear", "yarn", "llama3"},
    ("vllm", "smollm3"): {"linear", "yarn", "yarn+", "llama3"},
    ("gguf", "llama"): {"linear", "yarn", "llama3"},
    ("gguf", "qwen3"): {"linear", "yarn"},
    ("gguf", "smollm3"): {"linear", "yarn", "llama3"},
    ("ollama", "llama"): set(),
}


@pytest.mark.parametrize(("target", "family"), ALLOWED)
def test_positions_that_the_target_would_lose_are_refused(target, family):
    make = (lambda rope: converted("llama", "FFFN", rope_parameters=rope)) if family == "smollm3" else (
        lambda rope: plain(family, rope_parameters=rope))  # fmt: skip
    assert {name for name, rope in ROPES.items() if honoured(target, make(rope))} == ALLOWED[target, family]


def test_llama3_of_another_original_length_needs_it_where_the_converter_looks():
    rope = ROPES["llama3"] | {"original_max_position_embeddings": 4096}
    assert not honoured("gguf", plain("llama", rope_parameters=rope))
    assert honoured("gguf", plain("llama", rope_parameters=rope, original_max_position_embeddings=4096))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
SPELLINGS = {  # (fields of config.json, whether hf, vllm and gguf read them as transformers does)
    "plain": ({"rope_parameters": YARN}, "yyy"),
    "old": ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e5}, "yyy"),
    "same theta": ({"rope_parameters": YARN, "rope_theta": 1e4}, "yyy"),
    "two thetas": ({"rope_parameters": YARN, "rope_theta": 1e6}, "ynn"),
    "two types": ({"rope_parameters": YARN | {"type": "linear"}}, "ynn"),
    "same type": ({"rope_parameters": YARN | {"type": "yarn"}}, "yyy"),
    "two lengths": ({"rope_parameters": YARN, "original_max_position_embeddings": 1024}, "ynn"),
    "same length": ({"rope_parameters": YARN, "original_max_position_embeddings": 512}, "yyy"),
    "a length at the top of linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
         "original_max_position_embeddings": 512}, "yyy"),
    "no factor": ({"rope_parameters": YARN | {"factor": None}}, "ynn"),
    "betas": ({"rope_parameters": YARN | {"beta_fast": 16}}, "yyn"),
    "usual betas": ({"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}}, "yyy"),
    "attn_factor": ({"rope_parameters": YARN | {"attn_factor": 2.0}}, "ynn"),
    "extrapolation_factor": ({"rope_parameters": YARN | {"extrapolation_factor": 0.5}}, "ynn"),
    "alpha": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "alpha": 1000}}, "ynn"),
    "mrope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}, "ynn"),
    "low_freq_factor": ({"rope_parameters": YARN | {"low_freq_factor": 1.0}}, "ynn"),
    "elsewhere": ({"rope_parameters": YARN, "rotary_emb_base": 5e5}, "ynn"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_fields_that_programs_read_differently_make_export_say_no(case, write_model, tmp_path):
    """And transformers computes from config.json as it stands what this package says that it does."""
    fields, honoured_by = SPELLINGS[case]
    directory = write_model(tmp_path / "model", max_position_embeddings=2048)
    raw = json.loads((directory / "config.json").read_text())
    raw = {name: value for name, value in raw.items() if name != "rope_parameters"} | fields
    (directory / "config.json").write_text(json.dumps(raw))
    for target, answer in zip(("hf", "vllm", "gguf"), honoured_by, strict=True):
        found = plan_export(str(directory), target, tmp_path / "out").verdict
        assert found.honoured == (answer == "y"), (target, found.objections)
    config = parse_config(raw)
    if honoured_by[0] == "y":
        stock = AutoModelForCausalLM.from_pretrained(directory)
        assert check_realised(stock, config) < 1e-5
    else:
        with pytest.raises((TypeError, ValueError)):
            AutoModelForCausalLM.from_pretrained(directory)


def test_a_null_original_length_is_refused_where_transformers_cannot_compute_with_it(write_model, tmp_path):
    directory = write_model(tmp_path / "model", max_position_embeddings=2048)
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"rope_parameters": YARN, "original_max_position_embeddings": None}
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="original_max_position_embeddings is null"):
        plan_export(str(directory), "hf", tmp_path / "out")
    with pytest.raises((TypeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_a_share_of_the_head_that_is_rotated_is_refused_inside_too(kind, write_model, tmp_path):
    rope = {"default": {"rope_type": "default"}, "linear": {"rope_type": "linear", "factor": 2.0}, "yarn": YARN}[kind]
    config = json.loads((write_model(tmp_path / "model") / "config.json").read_text())
    with pytest.raises(ModelError, match="partial_rotary_factor is not supported"):
        parse_config(config | {"rope_parameters": rope | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})


def test_the_positions_that_ollama_is_said_to_honour_can_be_typed_and_are():
    text = " ".join(verdict("ollama", plain("llama", rope_parameters=ROPES["yarn"])).nearest)
    told = re.findall(r"""`--set "?([^`"]+)"?`""", text)
    assert len(told) == 2
    for given in told:
        spec = build(FinetuneSpec, {"ctx": 8192, **assignments([given])}, source="test")
        if spec.rope_scaling.type == "abf":
            rope = {"rope_type": "default", "rope_theta": spec.rope_scaling.theta}
            assert rope["rope_theta"] == 1e6 and honoured("ollama", plain("llama", rope_parameters=rope))


def test_foreign_smollm3_whose_windows_lie_on_the_nope_layers():
    config = plain("smollm3", use_sliding_window=True, sliding_window=64, pad_token_id=None)
    assert not honoured("gguf", config) and honoured("hf", config)
    assert honoured("gguf", plain("smollm3", pad_token_id=None))  # SmolLM3 as released


def test_every_class_has_a_row_for_every_target_and_unknown_ones_are_refused():
    assert set(FACTS) == set(TARGETS)
    for target in TARGETS:
        assert set(FACTS[target]) == set(FAMILIES)
        assert all(fact.sources for fact in FACTS[target].values())
    with pytest.raises(InputError, match="allowed are hf, vllm, gguf, ollama"):
        verdict("onnx", plain("llama"))
    with pytest.raises(ModelError, match="not supported"):
        verdict("hf", plain("llama").with_fields(model_type="gpt2"))
    assert replace(verdict("hf", plain("llama")), objections=("no",)).honoured is False
