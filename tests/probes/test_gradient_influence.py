"""G by distance: against finite differences, against one backward pass through everything, and zero beyond windows."""

import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import hidden_states, load_model
from ctxext.model.source import resolve
from ctxext.probes.gradient_influence import bucket_edges, influence, measure
from ctxext.probes.probe_spec import GradientInfluence
from ctxext.probes.subject import Subject
from ctxext.probes.texts import text_rows

W, T, LAST = 4, 13, 3


@pytest.fixture(scope="module")
def place(model_dir, tmp_path_factory):
    """make(family, pattern) -> a conversion with a window of W."""
    made = {}

    def make(family, pattern):
        if (family, pattern) not in made:
            made[family, pattern] = tmp_path_factory.mktemp("hybrid") / "model"
            plan = plan_conversion(str(model_dir(family)), pattern, out=made[family, pattern], sliding_window=W)
            run_conversion(plan, gate=False)
        return made[family, pattern]

    return make


@pytest.fixture
def ids():
    return torch.randint(2, 260, (2, T), generator=torch.Generator().manual_seed(1))


def in_fp64(model):
    """transformers' norms compute in fp32 whatever they are given: torch's own do not, and give the same."""
    decoder = model.get_decoder()
    for layer in decoder.layers:
        for holder in (layer, layer.self_attn):
            for name in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"):
                if hasattr(holder, name):
                    setattr(holder, name, _norm(getattr(holder, name)))
    decoder.norm = _norm(decoder.norm)
    return model


def _norm(norm):
    made = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
    made.weight = norm.weight
    return made


def score(model, embeddings):
    """The sum over the vocabulary of the logits averaged over the last positions, the plain way: [B]."""
    states = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return model.lm_head(states)[:, -LAST:].mean(1).sum(-1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_a_central_finite_difference_over_every_coordinate(place, ids, family):
    model = in_fp64(load_model(place(family, "SN"), dtype="float64").model)
    embeddings, eps = model.get_input_embeddings()(ids[:1]).detach(), 1e-5
    E = embeddings.shape[-1]
    steps = eps * torch.eye(T * E, dtype=torch.float64).view(T * E, T, E)
    with torch.no_grad():
        slopes = (score(model, embeddings + steps) - score(model, embeddings - steps)) / (2 * eps)  # [T * E]
    found = influence(model, ids[:1], LAST)[0]
    assert found.min() > 1e-3
    torch.testing.assert_close(found, slopes.view(T, E).norm(dim=-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_by_layer_again_is_one_backward_pass_through_all(place, ids, family, dtype):
    model = load_model(place(family, "SSN"), dtype=dtype).model
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    score(model, embeddings).sum().backward()
    found = influence(model, ids, LAST)
    truth = embeddings.grad.double().norm(dim=-1)
    torch.testing.assert_close(found, truth, rtol=1e-5 if dtype == "float32" else 0.05, atol=0)
    assert found.dtype == torch.float64 and found.shape == ids.shape


def test_the_model_keeps_no_gradients_and_no_hooks(place, ids):
    model = load_model(place("llama", "SN")).model
    before = hidden_states(model, ids).detach()
    influence(model, ids, LAST)
    decoder = model.get_decoder()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in decoder.layers.modules()) and not model.training
    assert torch.equal(hidden_states(model, ids), before)


def test_exactly_zero_beyond_the_reach_of_all_windows(place):
    """Four layers of window 4 reach 12 tokens back; the first of the last three predictions 2 more."""
    subject = Subject(resolve(str(place("llama", "S"))))
    finding = measure(
        subject, GradientInfluence(length=40, samples=2, last=LAST, data="grass"), lambda done, total: None
    )
    ids = text_rows(subject.loaded.tokenizer, "grass", 40, 1, 0)
    by_distance = influence(subject.loaded.model, ids, LAST)[0].flip(0)
    reach = 4 * (W - 1) + LAST - 1
    assert (by_distance[: reach + 1] > 0).all() and (by_distance[reach + 1 :] == 0).all()
    assert all((bucket["influence"] > 0) == (bucket["start"] <= reach) for bucket in finding.facts["buckets"])
    assert finding.facts["share_beyond"]["16"] == 0 < finding.facts["share_beyond"]["8"]
    assert finding.notes[-1] == f"no layer is full, so it is exactly zero beyond {reach} tokens back"
    assert None in finding.pictures[0].lines[0].y  # a logarithmic axis has no zero


@pytest.mark.parametrize("length", [1, 2, 5, 64, 100, 8192])
def test_buckets_hold_every_distance_once(length):
    edges = bucket_edges(length)
    assert edges[0] == 0 and edges[-1] == length and edges == sorted(set(edges))
    assert edges[:9] == list(range(min(9, length + 1)))[:9]
    assert all(b / a <= 1.35 for a, b in pairwise(edges[4:]))


def test_on_tiny_everything_is_plain_finite_and_of_its_shape():
    subject, ticks = Subject(resolve("tiny")), []
    spec = GradientInfluence(length=128, samples=3, data="grass")
    finding = measure(subject, spec, lambda done, total: ticks.append((done, total)))
    json.dumps(asdict(finding), allow_nan=False)
    assert measure(subject, spec, lambda done, total: None) == finding
    (line,) = finding.pictures[0].lines
    assert len(line.x) == len(line.y) == len(finding.facts["buckets"]) - 1 and all(y > 0 for y in line.y)
    assert finding.facts["share_beyond"]["1"] < 1 and ticks == [(1, 3), (2, 3), (3, 3)]
    rows = text_rows(subject.loaded.tokenizer, "grass", 128, 3, 0)
    far = [float(influence(subject.loaded.model, row[None], 20)[0, 127]) for row in rows]
    assert finding.facts["buckets"][0]["influence"] == pytest.approx(sum(far) / 3)
