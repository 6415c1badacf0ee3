"""Layers that see less: exactly nothing where a window is smaller, damage where the one layer is that looks back."""

import json
import random
import string
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ctxext.errors import ModelError
from ctxext.model.attention import Intervention, intervening
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.decode import generate
from ctxext.model.load import hidden_states, load_model, output_weight
from ctxext.model.source import resolve
from ctxext.probes.probe_spec import ReceptiveField
from ctxext.probes.receptive_field import measure, restrictions
from ctxext.probes.subject import Subject
from tests.probes.averaging import write_averaging

W, T = 8, 61
SMALL = {"length": 128, "tokens": 512, "samples": 2}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def hybrid(request, model_dir, tmp_path_factory):
    """SNSN with a window of W, in memory."""
    place = tmp_path_factory.mktemp("hybrid") / "model"
    run_conversion(plan_conversion(str(model_dir(request.param)), "SN", out=place, sliding_window=W), gate=False)
    return load_model(place).model


@pytest.fixture(scope="module")
def averaging(write_model, tmp_path_factory):
    return write_averaging(tmp_path_factory.mktemp("averaging") / "model", write_model)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file that begins with a line of random characters again and again, whose repetition needs a long context."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    line = "".join(random.Random(0).choices(string.ascii_letters, k=50)) + "\n"
    path.write_text(4 * line + (Path(__file__).parents[2] / "README.md").read_text("utf-8")[:5000], "utf-8")
    return str(path)


@pytest.fixture
def ids():
    return torch.randint(2, 260, (2, T), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def states(model, ids, changes=None):
    with intervening(model.get_decoder(), {i: Intervention(visible=R) for i, R in (changes or {}).items()}):
        return hidden_states(model, ids)


def test_a_window_is_never_widened_and_is_narrowed_below_it(hybrid, ids):
    whole = states(hybrid, ids)
    for R in (W, W + 1, 1000):
        assert torch.equal(states(hybrid, ids, {0: R, 2: R}), whole)
    narrowed = states(hybrid, ids, {0: W - 1, 2: W - 1})
    assert torch.equal(narrowed[:, : W - 1], whole[:, : W - 1])
    assert not torch.equal(narrowed[:, W - 1], whole[:, W - 1])  # the first that loses a token


def test_a_full_layer_sees_r_tokens_itself_included(hybrid, ids):
    whole, R = states(hybrid, ids), 20
    narrowed = states(hybrid, ids, {1: R, 3: R})
    assert torch.equal(states(hybrid, ids, {1: T, 3: T}), whole)
    assert torch.allclose(narrowed[:, :R], whole[:, :R], atol=1e-5)
    assert (narrowed[:, R] - whole[:, R]).abs().amax() > 1e-3


@pytest.mark.parametrize("changes", [{0: 3, 2: 5}, {1: 11}, {0: 3, 1: 4, 2: 5, 3: 20}])
def test_decoding_with_a_cache_is_the_full_forward_under_the_same_restriction(hybrid, ids, changes):
    prompt, new = ids[:1, :40], 12
    changed = {i: Intervention(visible=R) for i, R in changes.items()}
    with torch.no_grad(), intervening(hybrid.get_decoder(), changed):
        answer = generate(hybrid, prompt.tolist(), new)[0]
        chunked = generate(hybrid, prompt.tolist(), new, chunk=7)[0]
        whole = torch.cat([prompt, torch.tensor([answer])], 1)
        logits = hidden_states(hybrid, whole) @ output_weight(hybrid).t()
    assert answer == chunked == logits[0, 39:-1].argmax(-1).tolist()
    assert answer != generate(hybrid, prompt.tolist(), new)[0]  # it is a restriction


def test_the_model_is_as_before_after_the_block_and_after_an_exception(hybrid, ids):
    whole, parts = states(hybrid, ids), [set(vars(layer.self_attn)) for layer in hybrid.get_decoder().layers]
    with pytest.raises(KeyboardInterrupt), intervening(hybrid.get_decoder(), {1: Intervention(3), 3: Intervention(4)}):
        raise KeyboardInterrupt
    with (
        pytest.raises(ModelError, match="layer 4"),
        intervening(hybrid.get_decoder(), {0: Intervention(3), 4: Intervention(3)}),
    ):
        pass
    assert [set(vars(layer.self_attn)) for layer in hybrid.get_decoder().layers] == parts
    assert torch.equal(states(hybrid, ids), whole)


def test_the_one_layer_that_looks_back_is_the_one_that_hurts(averaging, text):
    subject = Subject(resolve(str(averaging)))
    finding = measure(subject, ReceptiveField(**SMALL, data=text, restrict=("full", "layers"), visible=(16, 64)), print)
    whole, groups = finding.facts["unrestricted"], finding.facts["restricted"]
    for layer, row in enumerate(groups["layers"]):
        assert row["layers"] == [layer] and row["visible"] == 16
        if layer == 1:
            assert row["loss"] > whole["loss"] + 0.1 and row["answer_loss"] != whole["answer_loss"]
        else:
            assert (row["loss"], row["answer_loss"]) == (whole["loss"], whole["answer_loss"])
    near, far = groups["full"]
    assert near["loss"] == groups["layers"][1]["loss"] and far["loss"] != whole["loss"]
    bars = next(picture for picture in finding.pictures if picture.name == "layers-loss")
    assert bars.values == (0.0, near["loss"] - whole["loss"], 0.0) and bars.letters == "FFF"


def test_as_a_hybrid_its_full_layer_hurts_and_its_sliding_layers_do_not(averaging, text, tmp_path):
    run_conversion(plan_conversion(str(averaging), "SFS", out=tmp_path / "hybrid", sliding_window=W), gate=False)
    subject = Subject(resolve(str(tmp_path / "hybrid")))
    finding = measure(subject, ReceptiveField(**SMALL, data=text, visible=(4, 16)), lambda done, total: None)
    whole, groups = finding.facts["unrestricted"], finding.facts["restricted"]
    assert [row["loss"] for row in groups["sliding"]] == [whole["loss"]] * 2
    assert all(row["loss"] > whole["loss"] + 0.1 for row in groups["full"])
    assert [len(row["layers"]) for row in groups["full"] + groups["sliding"]] == [1, 1, 2, 2]
    assert {line.label for line in finding.pictures[0].lines} == {"full layers", "sliding layers"}


def test_what_is_restricted_by_default_and_what_a_model_lacks():
    subject = Subject(resolve("tiny"))
    requested, notes = restrictions(subject, ReceptiveField(length=100))
    assert [(one.group, one.visible) for one in requested] == [("full", 16), ("full", 32), ("full", 64)] + [
        ("layers", 16)
    ] * 4
    assert len(notes) == 1 and "sliding" in notes[0]
    assert [one.visible for one in restrictions(subject, ReceptiveField(length=64, restrict=("full",)))[0]] == [16, 32]
    requested, notes = restrictions(subject, ReceptiveField(length=100, restrict=("sliding",)))
    assert not requested and len(notes) == 1


def test_on_tiny_everything_is_plain_finite_and_of_its_shape(text):
    ticks = []
    subject = Subject(resolve("tiny"))
    spec = ReceptiveField(**SMALL, data=text, visible=(16, 64), evaluator="tiny")
    finding = measure(subject, spec, lambda done, total: ticks.append((done, total)))
    json.dumps(asdict(finding), allow_nan=False)
    names = [picture.name for picture in finding.pictures]
    assert names == [
        name
        for part in ("", "layers-")
        for name in (part + "loss", part + "passkey", part + "answer-loss", part + "longppl-loss")
    ]
    for picture in finding.pictures[:4]:
        (line,) = picture.lines
        assert (line.label, line.x) == ("full layers", (16, 64)) and None not in (*line.y, picture.level)
    assert all(len(picture.values) == len(picture.letters) == 4 for picture in finding.pictures[4:])
    assert ticks[-1][0] == ticks[-1][1] and [done for done, _ in ticks] == sorted(done for done, _ in ticks)
    assert finding.facts["tokens"] == 512 - 4 and finding.facts["passkeys"] == 2
