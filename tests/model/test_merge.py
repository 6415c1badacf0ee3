"""Merging: the ordinary directory computes what the live bundle computed, tied stays tied, a moved base is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctxext.config.loader import build
from ctxext.errors import CheckFailed, InputError
from ctxext.eval_and_merge import merge_run, merge_tokens, plan_merge, seen_in_training
from ctxext.export.export_card import write_card
from ctxext.export.matrix import verdict
from ctxext.model import merge as merging
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run


def bundle(model: Path, place: Path, **fields) -> Path:
    text = place / "text.txt"
    text.write_text("A line of text, number after number: 1 2 3 4 5 6 7 8 9. " * 300)
    data = {"ctx": 128, "steps": 3, "global_batch_size": 1, "data": {"source": str(text)},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0}}  # fmt: skip
    plan = plan_run(resolve(str(model)), build(FinetuneSpec, data | fields, source="test"))
    start_run(plan, place / "run")
    run_finetune(plan, place / "run")
    return place / "run"


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {"tie_word_embeddings": True})],
    ids=["llama", "llama-tied", "qwen2", "qwen3-tied"],
)
def test_a_merged_hybrid_equals_the_live_bundle_and_loads_in_stock_transformers(family, changes, model_dir, tmp_path):
    hybrid = tmp_path / "hybrid"
    run_conversion(plan_conversion(str(model_dir(family, **changes)), "SN", out=hybrid, sliding_window=16), gate=False)
    run = bundle(hybrid, tmp_path)
    report = merge_run(plan_merge(str(run), tmp_path / "merged", None, False))
    assert report.merged_max_diff <= report.tolerance and report.saved_max_diff == 0.0
    assert report.tied == changes.get("tie_word_embeddings", False)
    assert re.fullmatch(
        r"[\d,]+ tokens at length 128, hf-stride, stride 64, on held-out embedded text", report.perplexity_of
    )
    assert ("perplexity of", report.perplexity_of) in report.rows()
    assert report.perplexity_of in write_card(resolve(report.out), verdict("hf", resolve(report.out).config), ())
    assert report.perplexity_live == pytest.approx(report.perplexity_saved, rel=1e-4)
    ids = torch.randint(2, 260, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = load_model(run).model(ids).logits
    torch.save({"ids": ids, "truth": truth}, tmp_path / "truth.pt")
    code = (
        "import sys; sys.modules['ctxext'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "saved = torch.load('truth.pt'); model = AutoModelForCausalLM.from_pretrained('merged').eval()\n"
        "print((model(saved['ids']).logits - saved['truth']).abs().max().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3


def test_positions_travel_into_the_merged_model_and_a_cast_is_reported(model_dir, tmp_path):
    run = bundle(model_dir("llama"), tmp_path)
    report = merge_run(plan_merge(str(run), tmp_path / "merged", "bfloat16", False))
    assert report.dtype == "bfloat16" and report.perplexity_saved != report.perplexity_live
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 2.0 and config["max_position_embeddings"] == 128
    assert config["dtype"] == "bfloat16" and not list((tmp_path / "merged").glob("adapter*"))
    again = resolve(str(tmp_path / "merged"))
    assert (again.original_length, again.usable_length, again.kind) == (64, 128, "merge")


def test_a_large_model_is_merged_into_shards(model_dir, tmp_path, monkeypatch):
    run, out = bundle(model_dir("llama", tie_word_embeddings=True), tmp_path), tmp_path / "merged"
    monkeypatch.setattr(merging, "SHARD_BYTES", 20_000)
    report = merge_run(plan_merge(str(run), out, None, False))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(sizes) and len(sizes) > 3
    assert set(index["weight_map"]) == set(resolve(str(out)).config.tensors)
    embedding = index["weight_map"]["model.embed_tokens.weight"]  # larger than a shard, so alone in its own
    assert max(size for name, size in sizes.items() if name != embedding) < 20_000 + 2_000  # and a header
    assert report.saved_max_diff == 0.0 and report.tied


def test_a_merge_that_changes_the_model_is_not_written(model_dir, tmp_path, monkeypatch):
    run = bundle(model_dir("llama"), tmp_path)

    def forgetful(adapted):
        return adapted.unload()  # the base without its adapter

    monkeypatch.setattr(merging, "merge_adapter", forgetful)
    with pytest.raises(CheckFailed, match="merged logits differ"):
        merge_run(plan_merge(str(run), tmp_path / "merged", None, False))
    assert not (tmp_path / "merged").exists()


def test_an_ordinary_model_has_nothing_to_merge(model_dir, tmp_path):
    with pytest.raises(InputError, match="has no adapter to merge"):
        plan_merge(str(model_dir("llama")), tmp_path / "merged", None, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha_multiplier": "0"}, "above 0 and up to 4"),
        ({"alpha_multiplier": "4.01"}, "above 0 and up to 4"),
        ({"alpha_multiplier": "nan"}, "above 0 and up to 4"),
        ({"alpha_multiplier": "half"}, "allowed are auto"),
        ({"restore": "v"}, "allowed is qk"),
        ({"nope_scale": "-1"}, "above 0 and up to 4"),
        ({"nope_scale": "log"}, "lose the scale without a message"),
        ({"nope_scale": "1.2", "length": "4k"}, "--length 4k"),
        ({"nope_scale": "auto", "length": "8"}, "allowed are 64 tokens"),
        ({"alpha_multiplier": "0.5", "data": "embedded"}, "this merge measures nothing"),
        ({"alpha_multiplier": "auto", "data": "./absent.txt"}, "absent.txt"),
    ],
    ids=str,
)
def test_what_cannot_be_baked_in_is_refused(given, said, hybrid_run, tmp_path):
    with pytest.raises(InputError, match=said):
        plan_merge(str(hybrid_run), tmp_path / "merged", None, False, **given)


def test_a_nope_scale_needs_a_layer_without_positions(model_dir, tmp_path):
    run = bundle(model_dir("llama"), tmp_path)
    with pytest.raises(InputError, match="FFFF has no N layer"):
        plan_merge(str(run), tmp_path / "merged", None, False, nope_scale="auto")


def test_text_that_was_trained_on_is_known(hybrid_run, tmp_path):
    source, text = resolve(str(hybrid_run)), hybrid_run.parent / "text.txt"
    (tmp_path / "other.txt").write_text("other")
    assert seen_in_training(source, str(text)) and seen_in_training(source, str(text.parent))
    assert not seen_in_training(source, "embedded") and not seen_in_training(source, str(tmp_path / "other.txt"))


@pytest.fixture(scope="module")
def hybrid_run(model_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    plan = plan_conversion(str(model_dir("llama")), "SN", out=place / "hybrid", sliding_window=16)
    run_conversion(plan, gate=False)
    return bundle(place / "hybrid", place)


def test_a_large_model_on_a_cpu_is_measured_on_less_text():
    """And the embedded model on as much as before."""
    tiny, large = resolve("tiny").shape, resolve("llama2-7b", weights=False).shape
    assert merge_tokens(tiny, 512, on_cpu=True) == merge_tokens(large, 512, on_cpu=False) == 8192
    assert merge_tokens(large, 512, on_cpu=True) == 1024
    middle = replace(large, num_layers=1, hidden_size=1024, intermediate_size=4096)
    assert 1024 < merge_tokens(middle, 512, on_cpu=True) < 8192
