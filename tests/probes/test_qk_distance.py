"""Distances of Wq and Wk against weights that were merged the ordinary way; zero to themselves."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxext.errors import InputError, ModelError
from ctxext.model.adapters import merge_adapter
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.probes.checkpoints import history, put
from ctxext.probes.probe_spec import QkDistance
from ctxext.probes.qk_distance import measure
from ctxext.probes.subject import Subject

LAYERS, HEADS = 4, {"q": 4, "k": 2}
ADAPTERS = {
    "plain": {},
    "two alphas": {"lora": {"alpha": "curvature", "target_modules": ["down_proj", "q_proj", "k_proj"]}},
    "no adapter on k": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "full": {"tuning": "full"},
}


@pytest.fixture(scope="module", params=ADAPTERS)
def run(request, model_dir, letters, kept_run, plain_run, tmp_path_factory):
    if request.param == "plain":
        return request.param, plain_run
    place = tmp_path_factory.mktemp("qk")
    return request.param, kept_run(model_dir("llama"), place, letters, **ADAPTERS[request.param], steps=3)


def requested(path, to="base"):
    finding = measure(Subject(resolve(str(path)), device="cpu"), QkDistance(to=to), lambda *_: None)
    json.dumps(asdict(finding), allow_nan=False)
    return finding


def whole(path, step):
    """All weights of a run at a step, by their names in an ordinary checkpoint, by PEFT's own merging."""
    loaded, source = load_model(path, device="cpu"), resolve(str(path))
    put(loaded.model, next(state for state in history(source, print).states if state.step == step))
    model = merge_adapter(loaded.model) if source.base else loaded.model
    return {name: x.clone() for name, x in model.state_dict().items()}


def truth(weights, others, of):
    """[2,L,heads]: absolute, and divided by the norm of `others`."""
    rows = [[], []]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.{of}_proj.weight"
        mine, theirs = (x[name].double().unflatten(0, (HEADS[of], 8)) for x in (weights, others))
        apart, size = ((mine - theirs).pow(2).sum((1, 2)).sqrt(), theirs.pow(2).sum((1, 2)).sqrt())
        rows[0].append(apart)
        rows[1].append(apart / size)
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("to", ["base", "final"])
def test_distances_are_those_of_merged_weights(to, run, model_dir):
    kind, path = run
    finding = requested(path, to)
    steps = {step: whole(path, step) for step in finding.facts["steps"]}
    assert list(steps) == [0, 1, 2, 3] and finding.facts["result_step"] == 3 and finding.notes == ()
    base = load_file(model_dir("llama") / "model.safetensors")
    assert all(torch.equal(steps[0][name], x) for name, x in base.items() if "_proj" in name)
    target = steps[0] if to == "base" else steps[3]
    far = 3 if to == "base" else 0
    for i, measured in enumerate(("absolute", "relative")):
        means = finding.facts["by_step"][measured]
        for of in "qk":
            expected = {step: truth(weights, target, of)[i] for step, weights in steps.items()}
            got = torch.tensor(finding.facts["start_to_result"][measured][of], dtype=torch.float64)
            torch.testing.assert_close(got, expected[far], atol=1e-6, rtol=1e-5)
            assert means[of] == pytest.approx([float(x.mean()) for x in expected.values()], rel=1e-5, abs=1e-6)
            (grid,) = (grid for grid in finding.pictures if grid.name == f"{of}-{measured}")
            assert (len(grid.rows), len(grid.columns)) == (LAYERS, HEADS[of])
        assert means["q + k"] == pytest.approx([a + b for a, b in zip(means["q"], means["k"], strict=True)])
        curves = next(picture for picture in finding.pictures if picture.name == f"{measured}-by-step")
        assert [(line.label, line.x) for line in curves.lines] == [(of, (0, 1, 2, 3)) for of in ("q", "k", "q + k")]
        assert means["q"][3 - far] == 0 and means["q"][far] > 1e-3
        assert (means["k"][far] == 0) == (kind == "no adapter on k")


def test_a_run_that_went_nowhere_is_at_zero(plain_run, tmp_path):
    path = shutil.copytree(plain_run, tmp_path / "run")
    adapter = path / "adapter_model.safetensors"
    stored = load_file(adapter)
    save_file({name: x * ("lora_B" not in name) for name, x in stored.items()}, adapter)
    shutil.rmtree(path / "checkpoints")
    for to in ("base", "final"):
        finding = requested(path, to)
        assert finding.facts["by_step"]["absolute"] == {"q": [0, 0], "k": [0, 0], "q + k": [0, 0]}
        assert "only these two are compared" in finding.notes[0] and finding.facts["steps"] == [0, 3]


def test_a_run_whose_start_is_gone_is_refused(model_dir, letters, kept_run, write_model, tmp_path):
    base = write_model(tmp_path / "base")
    path = kept_run(base, tmp_path, letters, tuning="full", steps=1)
    write_model(base, seed=1)
    with pytest.raises(ModelError, match="trained from") as caught:
        requested(path)
    assert "first step" in caught.value.hint
    with pytest.raises(InputError, match="not a finetune run"):
        requested(model_dir("llama"))


def test_no_model_is_loaded(plain_run):
    subject = Subject(resolve(str(plain_run)), device="cpu")
    measure(subject, QkDistance(), lambda *_: None)
    assert "loaded" not in vars(subject)
