"""Where an answer becomes readable: chance before the layer that fetches it, all right after; not with false labels."""

import json
import random
from dataclasses import asdict

import pytest
import torch

from ctxext.data.haystack import GRASS
from ctxext.data.near_numbers import MIDDLE, near_cases
from ctxext.errors import InputError, SpecError
from ctxext.model.load import hidden_states, load_tokenizer
from ctxext.model.source import resolve
from ctxext.probes import layer_niah
from ctxext.probes.layer_niah import measure, readable
from ctxext.probes.probe_spec import LayerNiah, probe_spec_from_options
from ctxext.probes.subject import Subject
from tests.probes.averaging import write_averaging

SMALL = LayerNiah(length=128, samples=40, classes=4)


@pytest.fixture(scope="module")
def averaging(write_model, tmp_path_factory):
    return write_averaging(tmp_path_factory.mktemp("averaging") / "model", write_model)


def silent(done, total):
    pass


@pytest.mark.parametrize("at", ["parting", "question"])
def test_readable_from_the_layer_that_fetches_it_and_not_before(averaging, at):
    finding = measure(Subject(resolve(str(averaging))), LayerNiah(length=128, samples=80, classes=4, at=at), silent)
    facts = finding.facts
    assert [one["accuracy"] for one in facts["residual"]] == [0.25, 1.0, 1.0]
    assert [one["accuracy"] for one in facts["change"]] == [0.25, 1.0, 0.25]
    assert facts["embedding"]["accuracy"] == facts["chance"] == 0.25
    assert (facts["train"], facts["test"]) == (64, 16)
    residual, change = finding.pictures
    assert residual.values == (0.25, 1.0, 1.0) and change.letters == "FFF" and change.level == 0.25


def test_planted_features_are_read_and_shuffled_labels_are_not():
    generator = torch.Generator().manual_seed(0)
    spec = LayerNiah(length=64, samples=800)
    labels = torch.arange(800) % 8
    noise = torch.randn(800, 24, generator=generator)
    planted = noise + 6 * torch.eye(24)[labels]
    assert readable(planted, labels, spec) == (160, 160)
    shuffled = labels[torch.randperm(800, generator=generator)]
    for features, of in ((planted, shuffled), (noise, labels)):
        hits, n = readable(features, of, spec)
        assert n == 160 and hits < 35  # 20 by chance, standard deviation 4.2


def test_the_classifier_is_as_asked():
    """Stronger regularisation keeps what is written small from being read; a share of the questions is set apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 150, generator=generator)
    features[:, 0] += 1.5 * labels
    _, n = readable(features, labels, LayerNiah(length=64, samples=200, classes=2, test=0.4))
    assert n == 80
    hits = [
        readable(features, labels, LayerNiah(length=64, samples=200, classes=2, inverse_regularisation=c, seed=s))[0]
        for c in (0.1, 1e-9)
        for s in range(3)
    ]
    assert hits[:3] != hits[3:]
    # Scaling is part of the classifier: units do not matter.
    scaled = features * torch.logspace(-3, 3, 150)
    spec = LayerNiah(length=64, samples=200, classes=2)
    assert readable(scaled, labels, spec) == readable(features, labels, spec)


def test_residuals_are_the_models_own_at_the_last_token():
    subject = Subject(resolve("tiny"))
    cases = near_cases(subject.loaded.tokenizer, GRASS, 96, classes=4, samples=5, parting=True, seed=0)
    states = layer_niah._states(subject, cases, lambda done: None)  # [L+1,N,E]
    ids = torch.tensor([case.prompt_ids for case in cases])
    decoder = subject.loaded.model.get_decoder()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder.layers)
    with torch.no_grad():
        truth = decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        final = hidden_states(subject.loaded.model, ids)[:, -1]
        normed = decoder.norm(states[-1])
    torch.testing.assert_close(states[:-1], torch.stack([state[:, -1] for state in truth[:-1]]))
    torch.testing.assert_close(normed, final)  # the last of transformers' hidden states is normed


@pytest.mark.parametrize("parting", [True, False])
def test_cases_differ_in_the_needle_alone_and_their_length_is_exact(parting):
    tokenizer = load_tokenizer(resolve("tiny").directory)
    cases = near_cases(tokenizer, GRASS, 200, classes=8, samples=40, parting=parting, seed=3)
    assert [case.label for case in cases] == list(range(8)) * 5
    end = "The pass key is 3141592" if parting else "The pass key is "
    for case in cases:
        text = tokenizer.decode(case.prompt_ids)
        assert len(case.prompt_ids) == 200 and text.endswith(end) and MIDDLE[0] <= case.depth <= MIDDLE[1]
        assert text.count(f"3141592{case.label}") == 2 and text.count("3141592") == 2 + parting
        assert MIDDLE[0] - 0.1 < text.index("3141592") / len(text) < MIDDLE[1]
    assert len({case.prompt_ids[-30:] for case in cases}) < 40 or parting
    assert cases == near_cases(tokenizer, GRASS, 200, classes=8, samples=40, parting=parting, seed=3)
    assert cases != near_cases(tokenizer, GRASS, 200, classes=8, samples=40, parting=parting, seed=4)
    with pytest.raises(InputError, match="at least"):
        near_cases(tokenizer, GRASS, 40, classes=8, samples=1, parting=parting, seed=3)


def test_on_tiny_the_same_seed_gives_the_same_plain_finite_numbers():
    subject, ticks = Subject(resolve("tiny")), []
    finding = measure(subject, SMALL, lambda done, total: ticks.append((done, total)))
    random.random(), torch.randn(1)  # global generators are nobody's business
    assert measure(subject, SMALL, silent) == finding
    json.dumps(asdict(finding), allow_nan=False)
    assert [len(picture.values) for picture in finding.pictures] == [4, 4] and len(finding.tables[0].rows) == 5
    assert ticks[-1] == (49, 49) and finding.facts["residual"][-1]["low"] <= finding.facts["residual"][-1]["accuracy"]


def test_too_few_samples_for_the_classes_are_refused():
    with pytest.raises(SpecError, match="10 classes"):
        probe_spec_from_options(["layer-niah"], {"samples": 45, "classes": 10})
