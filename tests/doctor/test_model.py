"""Every illness of a model is planted in a healthy one, and is named with its remedy; the healthy ones have none."""

import json
import shutil

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ctxext.cli.doctor import doctor as command
from ctxext.doctor.model import model as examine
from ctxext.errors import CheckFailed, InputError
from ctxext.export import write
from ctxext.model import shards
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.families import FAMILIES
from ctxext.model.weights import ADAPTER_FILE, HEAD


def ill(path):
    """Name -> finding, of those that are failures."""
    return {finding.name: finding for finding in examine(str(path)) if finding.status == "failure"}


def edit(path, name="config.json", **changes):
    settings = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({k: v for k, v in (settings | changes).items() if v != "gone"}))


@pytest.fixture
def copy(chain, tmp_path):
    def make(name):
        shutil.copytree(chain / name, tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["source", "hybrid", "run", "merged"])
def test_a_healthy_chain_has_no_failure(name, chain):
    assert ill(chain / name) == {}


def test_tiny_and_an_export_of_it_are_healthy(tmp_path):
    write.export(write.plan_export("tiny", "hf", tmp_path / "out"))
    assert ill("tiny") == ill(tmp_path / "out") == {}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_models_of_others_and_their_conversions_are_healthy(family, model_dir, tmp_path):
    assert ill(model_dir(family)) == {}
    run_conversion(plan_conversion(str(model_dir(family)), "SN", out=tmp_path / "out", sliding_window=16), gate=False)
    assert ill(tmp_path / "out") == {}
    assert FAMILIES[family].targets[0] in {"smollm3", "mellum"}


def test_a_missing_shard(write_model, tmp_path):
    path = write_model(tmp_path / "model", shard="20KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    found = ill(path)["files"]
    assert shard.name in found.found and "copy" in found.remedy


def test_a_truncated_shard(copy):
    path = copy("hybrid")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    found = ill(path)["files"]
    assert "truncated" in found.found and found.remedy


def test_a_stray_shard_is_a_warning(write_model, tmp_path):
    path = write_model(tmp_path / "model", shard="20KB")
    shutil.copy(sorted(path.glob("model-*.safetensors"))[0], path / "model-old.safetensors")
    assert ill(path) == {}
    assert any("model-old" in finding.found for finding in examine(str(path)) if finding.status == "warning")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("made", ["hybrid", "merged"])
def test_a_changed_byte(copy, made):
    path = copy(made)
    flip(path / "model.safetensors")
    assert "the content differs from what was written" in ill(path)["hashes"].found


def test_a_changed_byte_of_an_export(model_dir, tmp_path):
    write.export(write.plan_export(str(model_dir()), "hf", tmp_path / "out"))
    weights = tmp_path / "out" / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()  # it is a hard link
    weights.write_bytes(data)
    assert ill(tmp_path / "out") == {}
    flip(weights)
    assert "the content differs from what was written" in ill(tmp_path / "out")["hashes"].found


def test_names_and_shapes_against_the_config(copy):
    path = copy("hybrid")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["model.stray.weight"] = torch.ones(7)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = ill(path)["tensors"].found
    assert "model.norm.weight: [7] in the file" in found and "model.stray.weight: in the file, but not" in found


def test_tensors_of_other_dtypes_are_named_and_not_read(write_model, tmp_path, monkeypatch):
    """They counted as 0 bytes, so that all of a large checkpoint was read."""
    path = write_model(tmp_path / "model")
    stored = load_file(path / "model.safetensors")
    stored = {name: value.to(torch.float8_e4m3fn) if "_proj" in name else value for name, value in stored.items()}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    read = []
    reader = shards.tensor_reader
    monkeypatch.setattr(shards, "tensor_reader", lambda path: lambda name: read.append(name) or reader(path)(name))
    found = {finding.name: finding for finding in examine(str(path))}
    assert found["values"].status == "ok" and "28 tensors not read: stored as F8_E4M3" in found["values"].found
    assert "stored as F8_E4M3; supported are" in found["tensors"].found and "model.norm.weight" in read
    assert not [name for name in read if "_proj" in name]


def test_a_wrong_vocabulary(copy):
    path = copy("hybrid")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<more>"] = 400
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = ill(path)["tokenizer"]
    assert "largest id is 400, the embedding has 260 rows" in found.found and "tokenizer" in found.remedy
    (path / "tokenizer.json").write_text("{}")
    assert "cannot be opened" in ill(path)["tokenizer"].found
    (path / "tokenizer.json").unlink()
    assert "no tokenizer" in ill(path)["tokenizer"].found


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_special_tokens_out_of_range(file, copy):
    path = copy("hybrid")
    edit(path, file, eos_token_id=[0, 260])
    found = ill(path)["special tokens"]
    assert f"{file}: eos_token_id 260" in found.found and found.remedy


def test_tied_by_the_config_and_not_by_the_weights(copy):
    path = copy("source")
    edit(path, tie_word_embeddings=True)
    found = ill(path)["tied embeddings"]
    assert HEAD in found.found and "tie_word_embeddings to false" in found.remedy


def test_not_tied_by_the_config_and_without_a_head(write_model, tmp_path):
    path = write_model(tmp_path / "model", tie_word_embeddings=True)
    assert ill(path) == {}
    edit(path, tie_word_embeddings=False)
    found = ill(path)
    assert set(found) == {"tied embeddings"} and "tie_word_embeddings to true" in found["tied embeddings"].remedy


def test_a_config_whose_rope_is_ignored(copy):
    """SmolLM3 rotates whole heads by default, and the part that partial_rotary_factor says under linear scaling."""
    path = copy("hybrid")
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 0.5}
    edit(path, rope_parameters=rope)
    found = ill(path)["config"]
    assert "partial_rotary_factor" in found.found


def test_a_conversion_that_lost_its_theta(copy):
    """transformers takes 2e6 for a SmolLM3 that says nothing, whatever the source had."""
    path = copy("hybrid")
    edit(path, rope_parameters="gone", rope_theta="gone", rope_scaling="gone")
    found = ill(path)["intended positions"]
    assert "the conversion set" in found.found and "2000000" in found.found and found.remedy


def test_positions_that_are_not_those_of_the_run(copy):
    path = copy("run")
    edit(path, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    found = ill(path)["intended positions"]
    assert "the run set" in found.found and found.remedy


def test_an_adapter_without_its_embeddings(copy):
    path = copy("run")
    tensors = load_file(path / ADAPTER_FILE)
    del tensors["base_model.model.model.embed_tokens.weight"]
    save_file(tensors, path / ADAPTER_FILE, metadata={"format": "pt"})
    edit(path, "ctxext.json", facts=json.loads((path / "ctxext.json").read_text())["facts"] | {"trained_tensors": None})
    found = ill(path)["adapter"]
    assert "embed_tokens" in found.found and found.remedy
    edit(path, "adapter_config.json", modules_to_save=[])  # the run's spec still says that they trained
    assert "embed_tokens" in ill(path)["adapter"].found


def test_an_adapter_without_one_matrix(copy):
    path = copy("run")
    tensors = load_file(path / ADAPTER_FILE)
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, path / ADAPTER_FILE, metadata={"format": "pt"})
    assert "layers.1.self_attn.v_proj.lora_B" in ill(path)["adapter"].found


def test_a_base_that_moved_or_changed(copy, tmp_path):
    base, path = copy("hybrid"), copy("run")
    manifest = json.loads((path / "ctxext.json").read_text())
    manifest["parents"]["base"]["path"] = str(base)
    (path / "ctxext.json").write_text(json.dumps(manifest))
    assert ill(path) == {}
    flip(base / "model.safetensors")
    assert "have changed" in ill(path)["base"].found
    base.rename(tmp_path / "moved")
    found = ill(path)["base"]
    assert f"{base} is missing" in found.found and "put the base back" in found.remedy


def test_a_broken_manifest_and_a_broken_config(copy):
    path = copy("hybrid")
    (path / "ctxext.json").write_text("{")
    assert "is broken" in ill(path)["manifest"].found
    (path / "config.json").write_text("[]")
    assert "not a JSON object" in ill(path)["config"].found
    (path / "config.json").unlink()
    (path / "spec.yaml").touch()
    assert "--resume" in ill(path)["config"].remedy


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"facts": {"usable_length": "long"}}, "usable_length is 'long'"),
        ({"parents": {"source": {"path": 3}}}, "path is 3"),
        ({"parents": {"source": {"weights": {}}}}, "path is None"),
    ],
)
def test_a_manifest_of_the_wrong_kinds_is_one_finding(changes, named, copy):
    path = copy("hybrid")
    edit(path, "ctxext.json", **changes)
    assert named in ill(path)["manifest"].found


@pytest.mark.parametrize("text", ["[]", "{", '"a word"'])
def test_tokenizer_files_that_hold_something_else(text, copy):
    path = copy("hybrid")
    (path / "generation_config.json").write_text(text)
    assert "generation_config.json: not" in ill(path)["special tokens"].found
    (path / "tokenizer_config.json").write_text(text)
    assert "tokenizer" in ill(path)


def test_exports_that_would_be_refused_are_warnings_with_the_way_out(chain):
    found = {finding.name: finding for finding in examine(str(chain / "merged"))}
    assert found["export hf"].status == found["export vllm"].status == "ok"
    assert (
        found["export gguf"].status == "warning"
        and f"`ctxext convert {chain / 'source'} --hybrid FFFN`" in found["export gguf"].remedy
    )
    assert "ctxext merge" in {f.name: f for f in examine(str(chain / "run"))}["exports"].found


def test_nothing_is_fetched_to_be_examined():
    for name in ("org/some-model", "llama2-7b", "./absent"):
        with pytest.raises(InputError, match="doctor downloads nothing"):
            examine(name)


def test_the_command_prints_findings_and_fails_where_one_fails(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    app = typer.Typer()
    app.command()(command)
    path = copy("hybrid")
    done = CliRunner().invoke(app, [str(path), "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and set(found) == {"environment", str(path)}
    assert all(set(finding) == {"name", "status", "found", "remedy"} for part in found.values() for finding in part)
    flip(path / "model.safetensors")
    done = CliRunner().invoke(app, [str(path)])
    assert isinstance(done.exception, CheckFailed) and "failure  hashes" in done.stdout
