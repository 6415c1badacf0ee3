"""Conversions: the identity layout equals the source, the hybrid equals the hand-written walk, stock loads it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxext.config import presets
from ctxext.errors import CheckFailed, CtxextError, InputError, ModelError
from ctxext.model import gate as gates
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.hybrids import hybrid_config
from ctxext.model.source import resolve

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SOURCES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha-biases": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen2-window-unused": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


def convert(model: Path, hybrid: str, out: Path, **options):
    gate = options.pop("gate", True)
    return run_conversion(plan_conversion(str(model), hybrid, out=out, **options), gate=gate)


@pytest.mark.parametrize("name", SOURCES)
def test_every_family_passes_the_gate(name, model_dir, tmp_path):
    family, changes = SOURCES[name]
    report = convert(model_dir(family, **changes), "SN", tmp_path / "out", sliding_window=16)
    assert report.gate["identity_max_diff"] == 0.0
    assert report.gate["hybrid_max_diff"] <= report.gate["hybrid_tolerance"]
    assert report.gate["layers"] == 4 and report.layout == "SNSN, window 16"


@pytest.mark.parametrize("preset", presets.names("hybrid"))
def test_real_weights_pass_the_gate_under_every_preset(preset, stories, tmp_path):
    report = convert(stories, preset, tmp_path / "out")
    assert report.gate["passed"] and report.gate["identity_max_diff"] == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"no_rope_layers": [0, 1, 0, 1]},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"sliding_window": 17},
        {"sliding_window": 15},
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}},
    ],
    ids=str,
)
def test_the_gate_catches_a_config_that_says_something_else(wrong, model_dir, tmp_path, monkeypatch):
    def planted(config, kinds, *target, **options):
        built = hybrid_config(config, kinds, *target, **options)
        return built.with_fields(**wrong) if any(kind.sliding_window for kind in kinds) else built

    monkeypatch.setattr(gates, "hybrid_config", planted)
    walk = gates.walk
    monkeypatch.setattr(
        gates,
        "walk",
        lambda weights, config, kinds, ids, *dtype: walk(
            weights, hybrid_config(resolve(str(source)).config, kinds), kinds, ids, *dtype
        ),
    )
    source = model_dir("llama")
    with pytest.raises(CheckFailed, match="computes other logits"):
        convert(source, "SN", tmp_path / "out", sliding_window=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_window_too_large_to_walk_is_proved_at_a_smaller_one(family, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "LARGEST_WINDOW", 16)
    source = model_dir(family, **({"sliding_window": 48} if family == "mistral" else {}))
    report = convert(source, "SN", tmp_path / "out", sliding_window=100_000)
    assert report.gate["passed"] and (report.gate["window_stand_in"], report.gate["tokens"]) == (16, 128)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] == 100_000
    rows = dict(report.rows())
    assert "larger windows compared at 16 keys" in rows["gate: source layout = source"]
    assert rows["warning"].startswith("windows of 100,000 keys cover all")
    small = convert(source, "SN", tmp_path / "small", sliding_window=16)
    assert small.warning is None and (small.gate["window_stand_in"] is None) == (family != "mistral")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sliding_window": 64}, "a window of 64, not the layout's"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "computes other logits"),
    ],
)
def test_a_large_window_that_is_another_or_elsewhere_is_caught(wrong, said, model_dir, tmp_path, monkeypatch):
    """Its number by reading it, its place by what the stand-in computes."""

    def planted(config, kinds, *target, **options):
        built = hybrid_config(config, kinds, *target, **options)
        large = any((kind.sliding_window or 0) > 16 for kind in kinds)
        place = {} if "sliding_window" in wrong and not large else wrong
        return built.with_fields(**place) if any(kind.sliding_window for kind in kinds) else built

    source = model_dir("llama")
    monkeypatch.setattr(gates, "LARGEST_WINDOW", 16)
    monkeypatch.setattr(gates, "hybrid_config", planted)
    with pytest.raises(CheckFailed, match=said):
        convert(source, "SN", tmp_path / "out", sliding_window=100_000)
    assert list(tmp_path.iterdir()) == []


def test_sharded_checkpoints_are_copied_shard_by_shard(write_model, tmp_path):
    source = write_model(tmp_path / "source", "qwen2", shard="20KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    report = convert(source, "SN", tmp_path / "out", sliding_window=8)
    assert report.gate["passed"]
    before, after = (
        {name: tensor for path in sorted(d.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for d in (source, tmp_path / "out")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert added == {f"model.layers.{i}.self_attn.o_proj.bias" for i in range(4)}
    assert all(not after[name].any() for name in added)


def test_a_tied_head_stored_in_another_shard_is_compared_and_left_out(write_model, tmp_path):
    source = write_model(tmp_path / "source", "llama", shard="20KB", tie_word_embeddings=True)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    embedding = index["weight_map"]["model.embed_tokens.weight"]
    last = sorted(set(index["weight_map"].values()) - {embedding})[-1]
    head = load_file(source / embedding)["model.embed_tokens.weight"]
    save_file(load_file(source / last) | {"lm_head.weight": head}, source / last)
    index["weight_map"]["lm_head.weight"] = last
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(source, "SN", tmp_path / "out", sliding_window=8).gate["passed"]


def test_a_cast_is_gated_against_the_source_rounded_alike(model_dir, tmp_path):
    report = convert(model_dir("llama"), "SN", tmp_path / "out", sliding_window=8, dtype="bfloat16")
    assert report.gate["identity_max_diff"] == 0.0
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


STOCK = """
import sys
sys.modules["ctxext"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Once upon a time, far beyond the window, there was", return_tensors="pt").input_ids
kept = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
cached, plain = (model.generate(ids, use_cache=use, **kept) for use in (True, False))
assert torch.equal(cached, plain), (cached, plain)
with torch.no_grad():
    full = model(cached, use_cache=False).logits
    past, steps = None, []
    for t in range(cached.shape[1]):
        out = model(cached[:, t : t + 1], past_key_values=past, use_cache=True)
        past, steps = out.past_key_values, [*steps, out.logits]
worst = (torch.cat(steps, 1) - full).abs().max().item()
assert worst < 1e-3, worst
print(type(model).__name__)
"""


@pytest.mark.parametrize(("family", "stock"), [("llama", "SmolLM3ForCausalLM"), ("qwen3", "MellumForCausalLM")])
def test_stock_transformers_runs_it_without_ctxext_cached_as_uncached(family, stock, model_dir, tmp_path):
    convert(model_dir(family), "SN", tmp_path / "out", sliding_window=8)
    command = [sys.executable, "-c", textwrap.dedent(STOCK), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == stock


def test_an_output_says_what_it_is_and_resolves_as_a_conversion(model_dir, tmp_path):
    convert(model_dir("llama"), "SN", tmp_path / "out", sliding_window=8)
    source = resolve(str(tmp_path / "out"))
    assert source.kind == "conversion" and source.original_length == 64
    assert [kind.letter for kind in source.kinds] == list("SNSN")
    assert source.manifest.parents["source"]["weights"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SNSN, window 8" in card and "gate" in card


def _broken(write, tmp_path: Path, damage: str) -> Path:
    model = write(tmp_path / "model", "llama")
    weights = model / "model.safetensors"
    config = json.loads((model / "config.json").read_text())
    match damage:
        case "nan":
            tensors = load_file(weights)
            tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
            save_file(tensors, weights)
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "header":
            weights.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
        case "missing":
            weights.unlink()
        case "pickle":
            torch.save(load_file(weights), model / "pytorch_model.bin")
            weights.unlink()
        case "config":
            (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
        case "leftover":
            save_file(load_file(weights) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, weights)
        case "family":
            (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
        case "tokenizer":
            (model / "tokenizer.json").unlink()
        case "no model":
            (model / "config.json").unlink()
        case "no json":
            (model / "config.json").write_text("{")
    return model


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("nan", "model.layers.1.mlp.up_proj.weight holds NaN"),
        ("truncated", "truncated"),
        ("header", "not a valid safetensors file"),
        ("missing", "no model.safetensors"),
        ("pickle", "--allow-pickle"),
        ("config", "[48, 32] in the file, but [64, 32] by config.json"),
        ("leftover", "q_norm.weight: in the file, but not in config.json's architecture"),
        ("family", "supported are llama, mistral, qwen2, qwen3"),
        ("tokenizer", "no tokenizer"),
        ("no model", "no config.json"),
        ("no json", "not JSON"),
    ],
)
def test_a_damaged_model_is_refused_and_nothing_is_left(damage, words, write_model, tmp_path):
    model = _broken(write_model, tmp_path, damage)
    with pytest.raises(CtxextError) as caught:
        convert(model, "SN", tmp_path / "runs" / "out", sliding_window=8)
    assert caught.value.exit_code == 2
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "runs").exists()


def test_pickles_are_taken_when_allowed(write_model, tmp_path):
    model = _broken(write_model, tmp_path, "pickle")
    assert convert(model, "SN", tmp_path / "out", sliding_window=8, allow_pickle=True).gate["passed"]


def test_an_output_that_exists_is_refused(model_dir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        plan_conversion(str(model_dir("llama")), "SN", out=tmp_path / "out", sliding_window=8)


def test_layouts_a_family_cannot_express_are_refused(model_dir, tmp_path):
    with pytest.raises(ModelError, match="Mellum"):
        plan_conversion(str(model_dir("qwen3")), "SNFN", out=tmp_path / "out", sliding_window=8)
