"""A retrieval head that is known, followed through a run; every step's weights where they belong."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxext.errors import InputError, ModelError
from ctxext.model.load import build_model, load_model
from ctxext.model.source import resolve
from ctxext.probes.checkpoints import history, put
from ctxext.probes.plan_probes import plan_probe
from ctxext.probes.probe_spec import RetrievalTrace
from ctxext.probes.retrieval_heads import answer_attention, questions
from ctxext.probes.retrieval_trace import measure
from ctxext.probes.subject import Subject
from tests.probes.conftest import INDUCTION

GENTLE = {"learning_rate": 1e-5, "warmup_steps": 0}


@pytest.fixture(scope="module")
def run(induction, letters, kept_run, tmp_path_factory):
    return kept_run(induction, tmp_path_factory.mktemp("trace"), letters, optimizer=GENTLE, lora={"alpha": 16.0})


def logits(model):
    ids = torch.randint(2, 260, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_the_retrieval_head_is_followed_first(run, letters):
    told = []
    subject = Subject(resolve(str(run)), device="cpu")
    before = logits(subject.loaded.model)
    spec = RetrievalTrace(length=150, samples=3, heads=2, data=str(letters))
    finding = measure(subject, spec, lambda *of: told.append(of))
    json.dumps(asdict(finding), allow_nan=False)
    assert torch.equal(logits(subject.loaded.model), before)  # the result's weights are back
    first, second = finding.facts["heads"]
    assert (first["layer"], first["head"]) == INDUCTION and (second["layer"], second["head"]) != INDUCTION
    assert finding.facts["steps"] == [0, 1, 2, 3, 4] and finding.facts["result_step"] == 4
    assert min(first["mass"]) > 0.9 > max(second["mass"]) and max(first["entropy"]) < 2
    assert [picture.name for picture in finding.pictures] == ["mass", "entropy"]
    assert finding.pictures[0].lines[0].label == "layer 1 head 5" and finding.pictures[0].lines[0].x == (0, 1, 2, 3, 4)
    assert told[-1] == (5, 5)

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(subject, spec, interrupt)
    assert torch.equal(logits(subject.loaded.model), before)
    alone = load_model(run, device="cpu")
    mass = answer_attention(alone, questions(alone, str(letters), 150, 3, 0))[0]
    assert first["mass"][-1] == pytest.approx(float(mass[INDUCTION]), abs=1e-9)


def test_the_heads_are_those_of_the_result(induction, letters, kept_run, tmp_path):
    """At the end of this run, and only there, the retrieval head has changed places with another."""
    path = kept_run(induction, tmp_path, letters, tuning="full", optimizer=GENTLE, steps=2)
    layer, head = INDUCTION
    weights = load_file(path / "model.safetensors")
    for name in "qkvo":
        key, axis = f"model.layers.{layer}.self_attn.{name}_proj.weight", int(name == "o")
        heads = list(weights[key].chunk(8, axis))
        heads[head], heads[2] = heads[2], heads[head]
        weights[key] = torch.cat(heads, axis).contiguous()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    spec = RetrievalTrace(length=150, samples=2, heads=1, data=str(letters))
    (followed,) = measure(Subject(resolve(str(path)), device="cpu"), spec, lambda *_: None).facts["heads"]
    assert (followed["layer"], followed["head"]) == (layer, 2)
    assert max(followed["mass"][:2]) < 0.3 and followed["mass"][2] > 0.9


@pytest.mark.parametrize(("tuning", "tied"), [("lora", True), ("full", False)])
def test_every_state_is_what_the_run_had(tuning, tied, model_dir, letters, kept_run, tmp_path):
    base = model_dir("llama", tie_word_embeddings=tied)
    path = kept_run(base, tmp_path, letters, tuning=tuning, steps=3)
    loaded, said = load_model(path, device="cpu"), list[str]()
    end, story = logits(loaded.model), history(resolve(str(path)), said.append)
    assert [state.step for state in story.states] == [0, 1, 2, 3] and story.result.step == 3 and said == []
    assert story.checkpoints == 2
    put(loaded.model, story.start)
    start = logits(build_model(base, loaded.source.config, torch.float32).eval())
    torch.testing.assert_close(logits(loaded.model), start, atol=1e-6, rtol=0)
    put(loaded.model, story.states[2])
    stored = load_file(path / "checkpoints/step-000002/tensors.safetensors")
    masters = {name.removeprefix("master/"): x for name, x in stored.items() if name.startswith("master/")}
    live = dict(loaded.model.named_parameters())
    assert masters.keys() <= live.keys() and all(torch.equal(live[name], x) for name, x in masters.items())
    middle = logits(loaded.model)
    assert (middle - start).abs().max() > 1e-3 and (middle - end).abs().max() > 1e-3
    put(loaded.model, story.result)
    assert torch.equal(logits(loaded.model), end)


def test_a_damaged_checkpoint_is_said_and_passed_over(run, letters, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    tensors = copy / "checkpoints/step-000002/tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    shutil.rmtree(copy / "checkpoints/step-000003")
    said = []
    story = history(resolve(str(copy)), said.append)
    assert [state.step for state in story.states] == [0, 1, 4]
    assert len(said) == 1 and "step-000002 is damaged" in said[0] and "sha256" in said[0]
    spec = RetrievalTrace(length=150, samples=1, heads=1, data=str(letters))
    assert measure(Subject(resolve(str(copy)), device="cpu"), spec, lambda *_: None).notes == tuple(said)


def test_what_cannot_be_followed_is_refused_before_anything_is_loaded(run, letters, induction, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match="no checkpoints left") as caught:
        plan_probe(str(copy), ["retrieval-trace"], out=tmp_path / "out")
    assert "faults.keep" in caught.value.hint
    with pytest.raises(InputError, match="no checkpoints left"):
        measure(
            Subject(resolve(str(copy)), device="cpu"), RetrievalTrace(length=150, data=str(letters)), lambda *_: None
        )
    with pytest.raises(InputError, match="is not a finetune run"):
        plan_probe(str(induction), ["retrieval-trace"], out=tmp_path / "out")
    with pytest.raises(InputError, match="is not a finetune run"):
        history(resolve(str(induction)), print)

    def named(path):
        return {probe.probe for probe in plan_probe(str(path), ["all"], out=tmp_path / "out").spec.probes}

    assert "retrieval-trace" in named(run) and "qk-distance" in named(copy)
    assert "retrieval-trace" not in named(copy) and "qk-distance" not in named(induction)


def test_weights_of_another_run_are_refused(run, plain_run):
    story = history(resolve(str(plain_run)), print)
    with pytest.raises(ModelError, match=r"embed_tokens.* is \[260, 32\], not \[260, 192\]"):
        put(load_model(run, device="cpu").model, story.states[1])
