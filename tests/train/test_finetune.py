"""A run, whole: what trains, what is saved, what comes back, what resumes, what is refused."""

import json
import os
import signal
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxext.config.loader import build
from ctxext.errors import CtxextError, EnvironmentFault, InputError, ModelError
from ctxext.model.adapters import attach, trainable
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import active_module, build_model, causal_lm, load_model, output_weight
from ctxext.model.merge import merge
from ctxext.model.source import resolve
from ctxext.ops.backends.choice import Backend
from ctxext.train import loop
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import AttentionSpec, FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.run_directory import newest_unfinished, plan_resumed, start_run
from ctxext.train.run_plan import plan_run

TEXT = "".join(f"Line {i} of a text that is long enough to be cut into many sequences. {i * i}\n" for i in range(400))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def make_plan(model: Path, text: Path, **fields):
    defaults = {
        "ctx": 128,
        "steps": 4,
        "global_batch_size": 2,
        "data": {"source": str(text)},
        "faults": {"save_steps": 100},
    }
    return plan_run(resolve(str(model)), build(FinetuneSpec, {**defaults, **fields}, source="test"))


def run(plan, directory: Path, **kwargs):
    start_run(plan, directory)
    return run_finetune(plan, directory, **kwargs)


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def hybrid(model_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hybrid") / "out"
    run_conversion(plan_conversion(str(model_dir("llama")), "SN", out=out, sliding_window=16), gate=False)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_everything_that_trains_moves_at_the_default_rate_and_is_found_in_the_bundle(
    tied, dtype, model_dir, text, tmp_path, monkeypatch
):
    seen = {}

    def watch(engine, *rest):
        seen.update({name: master.clone() for name, master in engine.masters().items()})
        return train(engine, *rest)

    train = loop.train
    monkeypatch.setattr("ctxext.train.finetune.train", watch)
    plan = make_plan(model_dir("llama", tie_word_embeddings=tied), text, dtype=dtype, steps=3)
    report = run(plan, tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    stored = {name.replace(".modules_to_save.default", "").replace(".default", ""): x for name, x in seen.items()}
    # A and B of q, k, v, o; embeddings; two norms a layer; the last norm
    assert len(stored) == 4 * 4 * 2 + 1 + 4 * 2 + 1
    still = [name for name, before in stored.items() if torch.equal(saved[name], before)]
    assert still == []
    assert report.finished and report.trained_tensors >= len(stored)


@pytest.mark.parametrize("tied", [False, True])
def test_a_bundle_reopened_gives_the_live_logits(tied, model_dir, text, tmp_path, monkeypatch):
    live = {}
    train = loop.train

    def watch(engine, *rest):
        live["model"] = engine.model
        return train(engine, *rest)

    monkeypatch.setattr("ctxext.train.finetune.train", watch)
    source = model_dir("llama", tie_word_embeddings=tied)
    run(make_plan(source, text, optimizer={"learning_rate": 1e-3}), tmp_path / "run")
    ids = torch.randint(2, 260, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = live["model"].eval()(ids).logits
        opened = load_model(tmp_path / "run").model(ids).logits
        before = load_model(source).model(ids).logits
    torch.testing.assert_close(opened, truth, atol=1e-5, rtol=0)
    assert (before - truth).abs().max() > 0.1


def test_a_tied_head_is_the_embedding_that_trains_and_an_untied_head_is_frozen(model_dir):
    for tied in (True, False):
        source = resolve(str(model_dir("llama", tie_word_embeddings=tied)))
        plan = plan_run(source, FinetuneSpec(ctx=64))
        model = attach(build_model(source.directory, source.config, torch.float32), plan.trainables, 8, "base")
        embedding = active_module(causal_lm(model).get_input_embeddings()).weight
        assert embedding.requires_grad
        assert (output_weight(model) is embedding) == tied
        assert output_weight(model).requires_grad == tied
        assert sum(p.numel() for p in trainable(model).values()) == plan.trainables.parameters


def test_full_tuning_leaves_an_ordinary_model(hybrid, text, tmp_path):
    plan = make_plan(hybrid, text, tuning="full", optimizer={"learning_rate": 1e-3, "warmup_steps": 0})
    run(plan, tmp_path / "run")
    before, after = load_file(hybrid / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert resolve(str(tmp_path / "run")).base is None
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_s2_attention_never_reaches_disk_and_positions_do(model_dir, text, tmp_path):
    plan = make_plan(model_dir("llama"), text, ctx=256, steps=1)
    assert plan.group_size == 64 and plan.positions.factor == 4.0
    run(plan, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert config["max_position_embeddings"] == 256 and config["original_max_position_embeddings"] == 64
    assert not [key for key in config if "s2" in key or "group_size" in key or "attn" in key]
    again = resolve(str(tmp_path / "run"))
    assert (again.original_length, again.usable_length) == (64, 256)


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(hybrid, text, tmp_path):
    plan = make_plan(hybrid, text, steps=5)
    run(plan, tmp_path / "whole")

    def interrupt(metrics):
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    report = run(plan, tmp_path / "cut", events=Events(on_step=interrupt))
    assert (report.finished, report.steps_done) == (False, 2)
    assert not (tmp_path / "cut" / "ctxext.json").exists()
    assert newest_unfinished(tmp_path) == tmp_path / "cut"
    run_finetune(plan_resumed(tmp_path / "cut"), tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_resumed_run_is_refused_when_its_model_or_its_data_changed(write_model, text, tmp_path):
    def interrupt(metrics):
        os.kill(os.getpid(), signal.SIGINT)

    base, data = write_model(tmp_path / "base", "llama"), tmp_path / "data.txt"
    data.write_text(text.read_text())
    run(make_plan(base, data), tmp_path / "run", events=Events(on_step=interrupt))
    assert plan_resumed(tmp_path / "run").source.original_length == 64
    data.write_text("other text " * 2000)
    with pytest.raises(InputError, match="the data changed"):
        plan_resumed(tmp_path / "run")
    write_model(base, "llama", seed=1)
    with pytest.raises(CtxextError, match="its weights are not those"):
        plan_resumed(tmp_path / "run")


def test_a_run_whose_last_save_fails_keeps_its_training(hybrid, text, tmp_path, monkeypatch):
    plan = make_plan(hybrid, text, steps=2)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ctxext.train.finetune.save_bundle", full)
        with pytest.raises(EnvironmentFault, match="the result of 2 steps was not written"):
            run(plan, tmp_path / "run")
    report = run_finetune(plan_resumed(tmp_path / "run"), tmp_path / "run", resume=True)
    assert report.finished and len(losses(tmp_path / "run")) == 2


def test_accumulated_micro_batches_equal_one_large_batch(hybrid, text, tmp_path):
    for size in (1, 3):
        run(make_plan(hybrid, text, steps=2, global_batch_size=3, micro_batch_size=size), tmp_path / str(size))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "3"), rel=1e-5)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_trains_and_merges_into_the_full_weights(quantize, model_dir, text, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = model_dir("llama", hidden_size=64, intermediate_size=128)
    plain, plan = (make_plan(source, text, memory={"quantize": name}) for name in ("none", quantize))
    assert plan.memory["weights"] < plain.memory["weights"]
    for name, planned in (("plain", plain), (quantize, plan)):
        run(planned, tmp_path / name)
    assert losses(tmp_path / quantize) != losses(tmp_path / "plain")  # other weights are what it ran on
    assert losses(tmp_path / quantize) == pytest.approx(losses(tmp_path / "plain"), rel=0.05)
    merge(
        resolve(str(tmp_path / quantize)),
        tmp_path / "merged",
        dtype=None,
        force=False,
        measure=lambda loaded: (1.0, "nothing"),
    )
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_the_named_backend_trains_is_said_and_a_missing_one_is_refused_at_once(hybrid, text, tmp_path):
    said = []
    for name in ("auto", "naive"):
        plan = make_plan(hybrid, text, steps=2, attention={"train": "s2", "backend": name})
        run(plan, tmp_path / name, events=Events(said.append))
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "naive"), rel=1e-5)
    lines = [line for line in said if line.startswith("attention:")]
    assert lines == [f"attention: sliding 16 by {x}, S² 32 by {x} (cpu, float32)" for x in ("blocked", "naive")]
    plan = make_plan(hybrid, text, attention={"backend": "varlen"})
    with pytest.raises(EnvironmentFault, match="varlen cannot be used: it needs a GPU"):
        run(plan, tmp_path / "refused")
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()


def test_the_spec_names_the_backends_there_are():
    assert get_args(get_type_hints(AttentionSpec)["backend"]) == get_args(Backend)


def test_a_bundle_whose_base_moved_is_refused(write_model, text, tmp_path):
    base = write_model(tmp_path / "base", "llama")
    run(make_plan(base, text, steps=1), tmp_path / "run")
    write_model(base, "llama", seed=1)
    with pytest.raises(CtxextError, match="not the one this adapter was trained on"):
        resolve(str(tmp_path / "run"))
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CtxextError, match="no longer exists"):
        resolve(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention": {"train": "s2", "group_size": 1}}, "allowed are 2 to ctx"),
        ({"attention": {"train": "s2", "group_size": 500}}, "allowed are 2 to ctx"),
        ({"attention": {"train": "dense", "group_size": 8}}, "full layers train dense"),
        ({"ctx": 32, "rope_scaling": "linear"}, "no scaling is needed"),
        ({"ctx": "3.5q"}, "is no number of tokens"),
        ({"ctx": 0}, "ctx"),
        ({"memory": {"quantize": "nf4"}}, "widths divisible by 64"),
        ({"tuning": "full", "memory": {"quantize": "nf4"}}, "freezes the weights"),
        ({"lora": {"rnk": 8}}, "lora.rnk"),
        ({"lora": {"target_modules": ["wq"]}}, "q_proj"),
        ({"lora": {"embeddings": "frozen", "norms": "frozen"}, "tuning": "lora", "steps": 0}, "steps"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_torch_is_needed(fields, words, model_dir, text):
    with pytest.raises(InputError) as caught:
        make_plan(model_dir("llama"), text, **fields)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_embeddings_as_lora_are_refused_on_a_tied_model(model_dir, text):
    with pytest.raises(InputError, match="tied"):
        make_plan(model_dir("llama", tie_word_embeddings=True), text, lora={"embeddings": "lora"})


def test_a_mistral_with_its_own_window_trains_as_it_is(model_dir, text, tmp_path):
    """Its layers hold no window of their own: they read the config's, and recomputing must not miss it."""
    plan = make_plan(model_dir("mistral", sliding_window=8), text, steps=2)
    assert plan.spec.memory.checkpoint and {kind.sliding_window for kind in plan.kinds} == {8}
    assert run(plan, tmp_path / "run").finished


def test_a_tied_model_with_a_head_of_its_own_is_refused(write_model, tmp_path):
    """PEFT would tie them anew, and what the head had learned would be gone."""
    path = write_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(path)).model is not None  # stored twice, and the same
    save_file(tensors | {"lm_head.weight": embeddings + 1}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="ties the embeddings, but"):
        load_model(str(path))


def test_the_embedding_of_a_pad_that_is_also_the_eos_trains(model_dir, text, tmp_path):
    plan = make_plan(model_dir("llama", pad_token_id=0), text)
    model = build_model(plan.source.directory, plan.config, torch.float32)
    model = attach(model, plan.trainables, plan.spec.lora.rank, str(plan.source.directory))
    hidden = causal_lm(model).get_decoder()(torch.tensor([[5, 0, 7]])).last_hidden_state
    hidden.square().sum().backward()
    gradient = active_module(causal_lm(model).get_input_embeddings()).weight.grad
    assert gradient[0].norm() > 0.01 * gradient[7].norm() > 0


def test_a_model_scaled_from_nobody_knows_where_trains_within_its_length(model_dir, text, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    source = model_dir("llama", rope_parameters=rope, max_position_embeddings=256)
    plan = make_plan(source, text, steps=2)
    assert plan.positions.original_length is None
    assert run(plan, tmp_path / "run").held_out is not None
    with pytest.raises(InputError, match="original training length"):
        make_plan(source, text, validation={"max_short_ppl_increase": 0.1})
