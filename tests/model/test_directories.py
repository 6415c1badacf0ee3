"""Model directories as people have them: opened as stock transformers opens them, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ctxext.data.documents import Document
from ctxext.doctor.model import model as doctor
from ctxext.errors import CtxextError, EnvironmentFault, ModelError
from ctxext.evals.perplexity import encode, perplexity
from ctxext.export.write import export, plan_export
from ctxext.model import convert as converting
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.model.weights import EMBEDDING, HEAD, INDEX, PICKLE, PICKLE_INDEX, SINGLE

IDS = torch.randint(2, 260, (1, 40), generator=torch.Generator().manual_seed(0))
STORIES = 2.487  # the perplexity of cases/stories.txt for stories260K in stock transformers, windows of 256 by 128


@pytest.fixture
def cases(shared_data: Path) -> Path:
    return shared_data.parent / "cases"


def put(directory: Path, model: Path, *names: str, **fields: Any) -> Path:
    """A copy of a model without some files, and with other fields in its config.json."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns(*names), copy_function=shutil.copyfile)
    directory.chmod(0o755)
    config = json.loads((model / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(str(model), device="cpu").model(IDS).logits


def stock_logits(model: Path) -> torch.Tensor:
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return stock(IDS, use_cache=False).logits


def convert(model: Path, out: Path, hybrid: str = "full", gate: bool = True, **options: Any) -> Any:
    return run_conversion(plan_conversion(str(model), hybrid, out=out, **options), gate=gate)


def story_perplexity(model: Path, text: Path) -> float:
    loaded = load_model(str(model), device="cpu")
    return perplexity(loaded, encode([Document(text.read_text(), "stories")], loaded.tokenizer), 256).perplexity


# what an optional file of sampling defaults may hold
GENERATION = {
    "none": None,
    "empty": "{}",
    "no JSON": "[",
    "no object": "[]",
    "temperature without sampling": '{"temperature": 0.5, "top_p": 0.9, "do_sample": false}',
    "a token that is text": '{"eos_token_id": "x"}',
    "its own ends": '{"eos_token_id": [2, 5]}',
}


@pytest.mark.parametrize("content", GENERATION.values(), ids=GENERATION)
def test_a_generation_config_of_any_content_converts(content: str | None, stories: Path, tmp_path: Path) -> None:
    """Without one, transformers read config.json of the directory being written, which is written last."""
    model = put(tmp_path / "model", stories, "generation_config.json")
    if content is not None:
        (model / "generation_config.json").write_text(content)
    report = convert(model, tmp_path / "out")
    assert report.gate["passed"]
    assert ("left out" in (report.warning or "")) == (content == "[]")
    torch.testing.assert_close(stock_logits(tmp_path / "out"), stock_logits(stories), atol=1e-4, rtol=0)
    ends = set(load_model(str(tmp_path / "out"), device="cpu").model.generation_config.eos_token_id or [])
    assert ends == {"[": {2}, '{"eos_token_id": [2, 5]}': {2, 5}, None: {2}, "[]": {2}}.get(content, set())


def tied_head_alone(model: Path, place: Path, shards: int = 1, prefix: str = "model.") -> Path:
    """The one matrix of a tied model under the head's name, in one file or two, other names with another prefix."""
    out = put(place, model, SINGLE)
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in load_file(model / SINGLE).items()}
    tensors[HEAD] = tensors.pop(f"{prefix}embed_tokens.weight")
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, out / SINGLE, metadata={"format": "pt"})
        return out
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, out / file, metadata={"format": "pt"})
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return out


@pytest.mark.parametrize(("shards", "prefix"), [(1, "model."), (2, "model."), (1, ""), (2, "model.model.")])
def test_a_tied_matrix_stored_as_the_head(shards: int, prefix: str, stories: Path, tmp_path: Path) -> None:
    model = tied_head_alone(stories, tmp_path / "model", shards, prefix)
    truth = stock_logits(stories)
    assert torch.equal(stock_logits(model), truth)
    torch.testing.assert_close(logits(model), truth, atol=1e-4, rtol=0)
    assert convert(model, tmp_path / "out").gate["passed"]
    stored = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert EMBEDDING in stored and HEAD not in stored
    torch.testing.assert_close(stock_logits(tmp_path / "out"), truth, atol=1e-4, rtol=0)
    assert not [finding for finding in doctor(str(model)) if finding.status == "failure"]
    export(plan_export(str(model), "hf", out=tmp_path / "exported"))
    assert torch.equal(stock_logits(tmp_path / "exported"), truth)


def test_the_case_of_a_head_stored_alone(cases: Path, tmp_path: Path) -> None:
    found = story_perplexity(cases / "tied-head-stored-alone" / "model", cases / "stories.txt")
    assert found == pytest.approx(STORIES, abs=5e-4)


def test_both_copies_of_a_tied_matrix_are_one_or_refused(stories: Path, tmp_path: Path) -> None:
    model = put(tmp_path / "model", stories)
    tensors = load_file(stories / SINGLE)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, model / SINGLE, metadata={"format": "pt"})
    torch.testing.assert_close(logits(model), stock_logits(stories), atol=1e-4, rtol=0)
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, model / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="differs"):
        logits(model)
    save_file(tensors | {HEAD: tensors[EMBEDDING][:7].clone()}, model / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="in the file"):
        logits(model)
    save_file(tensors | {"embed_tokens.weight": tensors[EMBEDDING] + 1}, model / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="both"):
        logits(model)


def test_one_file_comes_before_an_index(write_model: Any, tmp_path: Path) -> None:
    """transformers reads model.safetensors where both are there; stale shards beside it were read here."""
    model = write_model(tmp_path / "model", seed=1)
    stale = write_model(tmp_path / "stale", seed=2, shard="20KB")
    for path in [*stale.glob("model-*.safetensors"), stale / INDEX]:
        shutil.copy(path, model)
    (model / "consolidated.safetensors").write_bytes(b"nothing reads this")
    (model / PICKLE).write_bytes(b"nor this")
    torch.testing.assert_close(logits(model), stock_logits(model), atol=1e-4, rtol=0)
    assert convert(model, tmp_path / "out").gate["passed"]
    torch.testing.assert_close(stock_logits(tmp_path / "out"), stock_logits(model), atol=1e-4, rtol=0)


def test_links_of_the_hubs_cache_and_names_with_spaces(write_model: Any, tmp_path: Path) -> None:
    """A snapshot's files are links into a directory of blobs."""
    blobs, model = tmp_path / "модель с пробелом" / "blobs", tmp_path / "модель с пробелом" / "snapshots" / "1 é"
    write_model(blobs, shard="20KB")
    model.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        (model / path.name).symlink_to(os.path.relpath(path.rename(blobs / f"{number:040x}"), model))
    torch.testing.assert_close(logits(model), stock_logits(model), atol=1e-4, rtol=0)
    assert convert(model, tmp_path / "out put").gate["passed"]
    torch.testing.assert_close(stock_logits(tmp_path / "out put"), stock_logits(model), atol=1e-4, rtol=0)
    shard = next(model.glob("model-*.safetensors"))
    shard.resolve().unlink()
    with pytest.raises(ModelError, match="no such file"):
        logits(model)


def test_a_link_to_nothing_is_named(write_model: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / SINGLE).unlink()
    (model / SINGLE).symlink_to("../blobs/absent")
    with pytest.raises(ModelError, match="links to"):
        resolve(str(model))


def test_pickles_are_chosen_as_transformers_chooses_them(write_model: Any, tmp_path: Path) -> None:
    """pytorch_model.bin alone is read where it is there, and not a stale shard or another precision beside it."""
    model = write_model(tmp_path / "model", seed=1)
    truth = stock_logits(model)
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    torch.save(tensors, model / PICKLE)
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model.fp16.bin"):
        torch.save({name: tensor + 1 for name, tensor in tensors.items()}, model / name)
    convert(model, tmp_path / "out", gate=False, allow_pickle=True)
    torch.testing.assert_close(stock_logits(tmp_path / "out"), truth, atol=1e-4, rtol=0)
    (model / PICKLE).unlink()
    (model / PICKLE_INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-00001-of-00002.bin")})
    )
    convert(model, tmp_path / "other", gate=False, allow_pickle=True)
    assert not torch.allclose(stock_logits(tmp_path / "other"), truth, atol=1e-2)
    (model / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(ModelError, match="no such file"):
        convert(model, tmp_path / "third", gate=False, allow_pickle=True)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"metadata": {}, "weight_map": {}}])
def test_an_index_that_transformers_does_not_read(index: Any, write_model: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shard="20KB")
    whole = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps({"weight_map": whole["weight_map"]} if index == {} else index))
    with pytest.raises(ModelError, match="index"):
        resolve(str(model))


def test_padding_beyond_the_rows_is_named(cases: Path, stories: Path, tmp_path: Path) -> None:
    """transformers makes no model of it: it was a traceback."""
    config = json.loads((cases / "pad-out-of-bounds" / "model" / "config.json").read_text())
    model = put(tmp_path / "model", stories, **config)
    for call in (lambda: resolve(str(model)), lambda: convert(model, tmp_path / "out"), lambda: logits(model)):
        with pytest.raises(ModelError, match="pad_token_id 512 is outside the 512 rows of the embedding"):
            call()
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    assert story_perplexity(model, cases / "stories.txt") == pytest.approx(STORIES, abs=5e-4)


def test_a_token_without_a_row_is_named(cases: Path, stories: Path, tmp_path: Path) -> None:
    from ctxext.evals import perplexity as suite
    from ctxext.evals.eval_spec import Perplexity

    case = cases / "token-without-a-row"
    model = put(tmp_path / "model", stories, "tokenizer.json")
    shutil.copy(case / "model" / "tokenizer.json", model)
    loaded = load_model(str(model), device="cpu")
    text = next(
        json.loads(line)["text"] for line in (case / "text.jsonl").read_text().splitlines() if "<think>" in line
    )
    ids = torch.tensor([loaded.tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert ids.max() == 512
    said = "its tokenizer gives token 512, but the model has 512"
    with pytest.raises(ModelError, match=said):
        loaded.model(ids)
    spec = Perplexity(data=str(case / "text.jsonl"), lengths=(256,), limit=2048)
    with pytest.raises(ModelError, match=said):
        suite.job(loaded, spec, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_that_does_not_hold_a_weight(dtype: str, write_model: Any, tmp_path: Path) -> None:
    """A finite weight became inf in the copy, without a word."""
    model = write_model(tmp_path / "model")
    tensors = load_file(model / SINGLE)
    tensors["model.norm.weight"][3] = 7e4 if dtype == "float16" else 3.4e38
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"model.norm.weight holds .*, above the .* that {dtype} can hold"):
        convert(model, tmp_path / "out", dtype=dtype, gate=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=rf"model.norm.weight holds .*, above the .* that {dtype} can hold"):
        load_model(str(model), dtype=dtype, device="cpu")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="model.norm.weight holds NaN or infinite values"):
        load_model(str(model), device="cpu")


def test_the_room_that_a_conversion_needs(write_model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Pickles counted for nothing, and stray safetensors files counted."""
    model = write_model(tmp_path / "model", "qwen2")
    size = (model / SINGLE).stat().st_size
    (model / "stray.safetensors").write_bytes(b"\0" * 10 * size)
    needed: list[int] = []
    monkeypatch.setattr(converting, "format_bytes", lambda count: needed.append(count) or str(count))
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(EnvironmentFault):
        convert(model, tmp_path / "out")
    added = 4 * 32 * 4  # o_proj biases of 4 layers, in fp32
    others = sum(path.stat().st_size for path in model.iterdir() if "token" in path.name or "gener" in path.name)
    assert needed[0] == size + added + others
    torch.save(load_file(model / SINGLE), model / PICKLE)
    (model / SINGLE).unlink()
    with pytest.raises(EnvironmentFault):
        convert(model, tmp_path / "out", allow_pickle=True)
    assert needed[2] == (model / PICKLE).stat().st_size + added + others


def test_the_cache_of_a_float64_model(write_model: Any, tmp_path: Path) -> None:
    """It was reported at 2 bytes per value."""
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    found = {}
    for dtype in ("float64", "float32", "bfloat16", None):
        (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        report = convert(model, tmp_path / str(dtype), gate=False)
        assert report.kv_cache_bytes == report.kv_cache_bytes_source
        found[dtype] = report.kv_cache_bytes / (2 * 4 * 2 * 8 * report.kv_cache_length)  # 4 layers, 2 heads of 8
    assert found == {"float64": 8, "float32": 4, "bfloat16": 2, None: 2}


BOTH = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_parameters": {"rope_theta": 500.0, **BOTH}, "rope_scaling": BOTH, "rope_theta": 500.0}, None),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_scaling": None}, None),
        ({"rope_parameters": {"rope_theta": 500.0, **BOTH}, "rope_scaling": BOTH}, "differ in rope_theta"),
        ({"rope_parameters": {**BOTH, "factor": 2.0}, "rope_scaling": BOTH}, "differ in factor"),
        ({"rope_parameters": BOTH, "original_max_position_embeddings": None}, "is null"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "needs factor"),
        ({"rope_parameters": None, "rope_theta": None}, "needs rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": None}}, None),
        ({"rope_parameters": {"rope_type": "default", "short_factor": None, "long_factor": None}}, None),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": None}},
            "partial_rotary_factor is null, from which transformers cannot compute linear RoPE",
        ),
        ({"rope_parameters": BOTH | {"truncate": None}}, "yarn with truncate None"),
        ({"rope_parameters": BOTH | {"truncate": True, "mscale": None, "beta_fast": None}}, None),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ({"is_causal": False}, "is_causal"),
        ({"return_dict": False}, "return_dict"),  # the stock class loads, and its forward fails
        ({"layer_types": None, "head_dim": None, "num_key_value_heads": None, "sliding_window": 7}, None),
    ],
    ids=str,
)
def test_fields_are_read_as_transformers_reads_them(
    fields: Any, said: str | None, write_model: Any, tmp_path: Path
) -> None:
    rope = fields.get("rope_parameters") or {}
    if None in rope.values() and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("what stock transformers makes of a null RoPE parameter was measured with 5.23")
    kv = {"num_key_value_heads": 4} if "num_key_value_heads" in fields else {}
    model = write_model(tmp_path / "model", **kv)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    if said is not None:
        with pytest.raises(CtxextError, match=said):
            logits(model)
        return
    torch.testing.assert_close(logits(model), stock_logits(model), atol=1e-4, rtol=0)
