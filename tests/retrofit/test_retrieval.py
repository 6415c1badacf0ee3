"""The warning of `convert` where a layer that retrieves becomes sliding."""

from __future__ import annotations

import pytest
import torch

from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.model.convert import plan_conversion
from ctxext.model.load import load_tokenizer
from ctxext.retrofit import retrieval
from ctxext.retrofit.calibration import joined
from ctxext.retrofit.damage import head_scores, head_scores_and_states, source_states
from ctxext.retrofit.fitted_sinks import open_conversion
from ctxext.retrofit.retrieval import hidden_retrieval, with_questions


@pytest.mark.parametrize(
    ("layout", "options", "hidden"),
    [
        ("SSSN", {"sliding_window": 128}, "1"),  # layer 1 of `tiny` retrieves (LOG.md), layer 3 stays full
        ("NS", {"sliding_window": 128}, "1"),
        ("swa128-nope", {}, None),  # layers 1 and 3 stay full
        ("SN", {"sliding_window": 256}, None),
        ("S", {"sliding_window": 128}, None),  # no full layer to keep it in
        ("SSSN", {"sliding_window": 300}, None),  # too wide for passkeys beyond it within 512 tokens
        ("full", {}, None),
    ],
)
def test_it_names_the_layer_that_retrieves_and_is_hidden(layout, options, hidden):
    line = hidden_retrieval(plan_conversion("tiny", layout, **options), device="cpu")
    assert (line is None) == (hidden is None)
    if line is not None:
        assert line.startswith("warning: 1 of the ") and f"become sliding: {hidden};" in line
        assert "--full-layers retrieval" in line


def test_nothing_is_said_of_models_that_do_not_retrieve_or_are_too_large(model_dir, monkeypatch):
    plan = plan_conversion(str(model_dir("llama", max_position_embeddings=512)), "SSSN", sliding_window=64)
    assert hidden_retrieval(plan, device="cpu") is None
    plan = plan_conversion("tiny", "SSSN", sliding_window=128)
    monkeypatch.setattr(retrieval, "CPU_FLOPS", 1e6)
    assert hidden_retrieval(plan, device="cpu") is None


def test_one_pass_gives_what_two_give():
    plan = plan_conversion("tiny", "SSSN", sliding_window=128)
    tokenizer = load_tokenizer(plan.source.directory)
    filler = joined(read_documents(EMBEDDED), tokenizer, 2048)
    samples = with_questions(filler[:256].view(1, 256), tokenizer, filler.tolist(), 64, 3)
    assert samples.texts == 1 and samples.ids.shape == (4, 256)
    layers = open_conversion(plan, [], torch.device("cpu"))
    scores, states = head_scores_and_states(layers, samples)
    assert torch.equal(scores, head_scores(layers, samples))
    torch.testing.assert_close(states, source_states(layers, samples.ids[1:]))
