"""An exported directory: equal logits in stock transformers, a card that parses, no local path; or nothing at all."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from ctxext.cli.export import export as command
from ctxext.config import manifest as manifests
from ctxext.errors import CheckFailed, CtxextError, InputError, ModelError
from ctxext.export import write
from ctxext.export.export_card import history, hub_id
from ctxext.model.companions import FRONT, stated_licence
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model


@pytest.fixture
def hybrid(model_dir, tmp_path):
    out = tmp_path / "work" / "mine"
    run_conversion(plan_conversion(str(model_dir()), "SN", out=out, sliding_window=16), gate=False)
    return out


def front(directory: Path) -> dict:
    return yaml.safe_load(FRONT.match((directory / "README.md").read_text())[1])


def exported(model, target, out, **more):
    return write.export(write.plan_export(str(model), target, out, **more))


def logits_in_stock_transformers(directory: Path, ids) -> torch.Tensor:
    torch.save(ids, directory.parent / "ids.pt")
    code = (
        "import sys; sys.modules['ctxext'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r}).eval()\n"
        f"AutoTokenizer.from_pretrained({str(directory)!r})('text')\n"
        "torch.save(model(torch.load('ids.pt')).logits.detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=directory.parent, check=True, capture_output=True)
    return torch.load(directory.parent / "logits.pt")


def test_it_loads_in_stock_transformers_with_the_same_logits(hybrid, tmp_path):
    done = exported(hybrid, "hf", tmp_path / "out")
    ids = torch.randint(2, 260, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        meant = load_model(hybrid).model(ids).logits
    assert torch.allclose(logits_in_stock_transformers(tmp_path / "out", ids), meant, atol=1e-4)
    assert done.linked == 1
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == (hybrid / "model.safetensors").stat().st_ino
    assert done.commands[0].startswith("hf upload ") and str(tmp_path / "out") in done.commands[0]


def test_the_card_tells_layers_history_figures_and_limits_and_its_front_matter_parses(hybrid, tmp_path):
    exported(hybrid, "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert front(tmp_path / "out") == {"library_name": "transformers", "pipeline_tag": "text-generation",
                                       "tags": ["ctxext", "long-context"]}  # fmt: skip
    assert "| 0, 2 | the last 16 tokens | RoPE |" in card and "| 1, 3 | full | none (NoPE) |" in card
    assert "converted to SNSN, window 16" in card and "transformers 5.17 or newer" in card
    assert "licence of the base is not known" in card and "has no name on the hub" in card
    assert "expect damage" in card


def test_licence_and_base_are_taken_from_where_they_are_known(write_model, tmp_path):
    source = write_model(tmp_path / "models--org--some-model" / "snapshots" / "abc")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nA model.\n")
    run_conversion(plan_conversion(str(source), "SN", out=tmp_path / "hybrid", sliding_window=16), gate=False)
    exported(tmp_path / "hybrid", "hf", tmp_path / "out")
    assert front(tmp_path / "out")["license"] == "apache-2.0"
    assert front(tmp_path / "out")["base_model"] == "org/some-model" == hub_id(source)
    assert "not known" not in (tmp_path / "out" / "README.md").read_text()


def test_licence_and_chat_templates_go_along_from_the_source_to_the_export(write_model, tmp_path):
    source = write_model(tmp_path / "source")
    card = "---\nlicense: other\nlicense_name: their-own\nlicense_link: 'LICENSE.txt'\ntags: [a]\n---\n\nlicense: mit\n"
    texts = {"README.md": card, "LICENSE.txt": "Keep this.", "NOTICE": "And this.", "license-of-the-data/x": "no"}
    texts |= {"additional_chat_templates/tools.jinja": "{{ messages }}", "additional_chat_templates/x.bin": "no"}
    for name, text in texts.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    run_conversion(plan_conversion(str(source), "SN", out=tmp_path / "hybrid", sliding_window=16), gate=False)
    shutil.rmtree(source)
    done = exported(tmp_path / "hybrid", "hf", tmp_path / "out")
    for name in ("LICENSE.txt", "NOTICE", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "out" / name).read_text() == texts[name] and name in done.files
    assert not [name for name in done.files if name.endswith(("/x", ".bin"))]
    stated = {"license": "other", "license_name": "their-own", "license_link": "LICENSE.txt"}
    assert front(tmp_path / "out").items() >= stated.items() and front(tmp_path / "hybrid").items() >= stated.items()


@pytest.mark.parametrize(
    ("line", "stated"),
    [("license: mit  # theirs", {"license": "mit"}), ('license: "mit"', {"license": "mit"}), ("license: [mit, x]", {}),
     ("license: >-", {}), ("  license: mit", {}), ("license:", {}), ("licenses: mit", {})],
)  # fmt: skip
def test_a_licence_is_read_from_its_line_alone(line, stated, tmp_path):
    (tmp_path / "README.md").write_text(f"---\ntags: &a [*a, {{\n{line}\n---\n")
    assert stated_licence(tmp_path) == stated


def test_measured_figures_of_the_chain_are_in_the_card(tmp_path):
    run_conversion(plan_conversion("tiny", "swa128-nope", out=tmp_path / "hybrid"))
    exported(tmp_path / "hybrid", "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tiny-swa128-nope | source layout against the source, max logit difference | 0 |" in card
    assert [step.name for step in history(tmp_path / "hybrid")] == ["tiny", "tiny-swa128-nope"]


@pytest.mark.parametrize(
    ("teacher", "unit"), [(None, "nats a token"), ("itself before conversion", "of the distillation objective")]
)
def test_training_losses_have_a_unit(teacher, unit, tmp_path):
    run_conversion(plan_conversion("tiny", "swa128-nope", out=tmp_path / "hybrid"))
    written = manifests.read(tmp_path / "hybrid")
    facts = written.facts | {"first_loss": 2.5, "final_loss": 1.25, "teacher": teacher}
    manifests.write(tmp_path / "hybrid", replace(written, facts=facts))
    exported(tmp_path / "hybrid", "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"first training loss, {unit} | 2.5 |" in card and f"final training loss, {unit} | 1.25 |" in card


def test_no_place_of_this_machine_is_told(hybrid, tmp_path, monkeypatch):
    settings = json.loads((hybrid / "tokenizer_config.json").read_text())
    (hybrid / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": str(hybrid)}))
    config = json.loads((hybrid / "config.json").read_text())
    (hybrid / "config.json").write_text(json.dumps(config | {"_name_or_path": str(hybrid)}))
    for target in ("hf", "vllm"):
        exported(hybrid, target, tmp_path / target)
        for path in (tmp_path / target).iterdir():
            if path.suffix != ".safetensors":
                assert str(tmp_path) not in path.read_text(), path
                assert str(Path.home()) not in path.read_text(), path
    (hybrid / "generation_config.json").write_text(json.dumps({"note": f"made in {hybrid}"}))
    with pytest.raises(CheckFailed, match="generation_config.json would contain"):
        exported(hybrid, "hf", tmp_path / "again")
    (hybrid / "generation_config.json").unlink()
    (hybrid / "config.json").write_text(json.dumps(config | {"note": f"made in {hybrid}"}))
    with pytest.raises(CheckFailed, match="a path of this machine"):
        exported(hybrid, "hf", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "ctxext.json"])
def test_a_file_that_holds_something_else_is_named(name, hybrid, tmp_path):
    manifest = json.loads((hybrid / "ctxext.json").read_text()) | {"parents": {"source": {"path": None}}}
    (hybrid / name).write_text("[]" if name != "ctxext.json" else json.dumps(manifest))
    with pytest.raises(ModelError, match=name):
        exported(hybrid, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_refused_before_its_base_is_looked_for(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError) as refused:
        write.plan_export(str(run), "hf")
    assert refused.value.hint == f"merge it first: ctxext merge {run}"


@pytest.mark.parametrize("target", ["gguf", "ollama"])
def test_what_is_not_honoured_is_not_written(hybrid, target, model_dir, tmp_path):
    with pytest.raises(CheckFailed, match=f"{target} does not support smollm3 SNSN") as refused:
        exported(hybrid, target, tmp_path / "out")
    assert f"`ctxext convert {model_dir()} --hybrid FFFN` (full" in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_gone_is_named_as_it_was_called(hybrid):
    manifest = json.loads((hybrid / "ctxext.json").read_text())
    manifest["parents"]["source"]["path"] = "/nowhere/my model"
    (hybrid / "ctxext.json").write_text(json.dumps(manifest))
    assert "`ctxext convert 'my model' --hybrid FFFN`" in write.plan_export(str(hybrid), "gguf").verdict.nearest[0]


def test_gguf_and_ollama_get_the_directory_and_the_commands(model_dir, tmp_path):
    done = exported(model_dir(), "gguf", tmp_path / "gguf")
    assert done.commands[0].startswith("python llama.cpp/convert_hf_to_gguf.py") and "--outtype f32" in done.commands[0]
    done = exported(model_dir(), "ollama", tmp_path / "ollama")
    assert (tmp_path / "ollama" / "Modelfile").read_text() == "FROM ./model.gguf\nPARAMETER num_ctx 64\n"
    assert done.commands[1].startswith("ollama create model -f ")


def test_a_dense_mellum_is_served_by_the_transformers_backend_by_name(model_dir, tmp_path):
    run_conversion(
        plan_conversion(str(model_dir("qwen3")), "SN", out=tmp_path / "hybrid", sliding_window=16), gate=False
    )
    assert "--model-impl transformers" in exported(tmp_path / "hybrid", "vllm", tmp_path / "out").commands[0]


def test_shards_and_their_index_go_along(write_model, tmp_path):
    source = write_model(tmp_path / "source", shard="20KB")
    done = exported(source, "hf", tmp_path / "out")
    shards = {path.name for path in source.glob("*.safetensors*")}
    assert len(shards) > 2 and shards <= set(done.files)


def test_where_links_cannot_be_made_files_are_copied(hybrid, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert exported(hybrid, "hf", tmp_path / "out").linked == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (hybrid / "model.safetensors").read_bytes()


def test_an_interrupted_export_leaves_nothing(hybrid, tmp_path, monkeypatch):
    seen = []

    def stop(directory, manifest):
        seen.extend(sorted(path.name for path in directory.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(manifests, "write", stop)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        exported(hybrid, "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "model.safetensors" in seen and "config.json" not in seen  # config.json is the last to appear


def test_an_existing_output_is_kept_unless_forced(hybrid, tmp_path):
    exported(hybrid, "hf", tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        exported(hybrid, "hf", tmp_path / "out")
    exported(hybrid, "hf", tmp_path / "out", force=True)
    with pytest.raises(InputError):  # the model itself is never replaced
        exported(hybrid, "hf", hybrid, force=True)


def test_the_manifest_says_what_the_weights_are(hybrid, tmp_path):
    exported(hybrid, "hf", tmp_path / "out")
    found = manifests.read(tmp_path / "out")
    assert found.kind == "export" and found.facts["weights"] == manifests.weight_hashes(tmp_path / "out")


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_checks_only_or_writes_and_prints_json(run, hybrid, tmp_path):
    done = run(hybrid, "--target", "vllm", "--check-only", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["honoured"] is True and not (tmp_path / "out").exists()
    refused = run(hybrid, "--check-only", "--out", tmp_path / "out")
    assert isinstance(refused.exception, InputError) and "--check-only writes nothing" in refused.exception.message
    done = run(hybrid, "--target", "gguf", "--check-only", "--json")
    assert isinstance(done.exception, CheckFailed) and json.loads(done.stdout)["honoured"] is False
    done = run(hybrid, "--target", "gguf", "--check-only")
    assert "ggml-org/llama.cpp, src/models/smollm3.cpp" in done.stdout and "checked 2026-11" in done.stdout
    done = run(hybrid, "--out", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["commands_run"] is False and (tmp_path / "out" / "config.json").is_file()
    done = run(hybrid, "--target", "onnx")
    assert isinstance(done.exception, CtxextError) and done.exception.exit_code == 2
