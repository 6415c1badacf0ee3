"""Text that a model samples: drawn from what it predicts, as long as asked, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ctxext.data.documents import Document
from ctxext.data.samples import sample_documents
from ctxext.data.store import tokenise
from ctxext.errors import DataError
from ctxext.model.decode import generate, greedy, sampled


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3)
    for temperature, expected in ((1.0, [0.1, 0.2, 0.7]), (0.5, [0.01 / 0.54, 0.04 / 0.54, 0.49 / 0.54])):
        drawn = Counter(sampled(temperature, 0)(logits).tolist())
        assert [drawn[i] / 4000 for i in range(3)] == pytest.approx(expected, abs=0.03)


def test_a_cold_sampler_is_greedy_and_seeds_differ(loaded_small):
    model = loaded_small.model
    prompts = [[1, 5, 9], [1, 7]]
    assert generate(model, prompts, 8, choose=sampled(1e-6, 0)) == generate(model, prompts, 8, choose=greedy)
    one, again, other = (generate(model, prompts, 8, choose=sampled(1.0, seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_documents_have_the_length_and_the_tokens_asked_for(loaded_small):
    given = {"tokens": 200, "length": 24, "batch": 4, "temperature": 1.0, "seed": 0}
    told: list[int] = []
    documents = list(sample_documents(loaded_small.model, loaded_small.tokenizer, progress=told.append, **given))
    tokens = [len(document.ids) + 1 for document in documents]  # with the EOS that joins documents
    assert max(tokens) == 24 and sum(tokens) - 2 * len(tokens) == told[-1] >= 200 > told[-2]
    assert {document.ids[0] for document in documents} == {loaded_small.tokenizer.eos_token_id}, "it adds no BOS"
    assert documents == list(sample_documents(loaded_small.model, loaded_small.tokenizer, **given))


def test_a_model_that_says_nothing_is_refused(loaded_small, monkeypatch):
    monkeypatch.setattr("ctxext.data.samples.generate", lambda model, prompts, *_, **__: [[] for _ in prompts])
    given = {"tokens": 200, "length": 24, "batch": 4, "temperature": 1.0, "seed": 0}
    with pytest.raises(DataError, match="ends every sampled document at its first token"):
        list(sample_documents(loaded_small.model, loaded_small.tokenizer, **given))


def test_the_store_keeps_the_tokens_as_they_were_sampled(loaded_small, tmp_path):
    """Another division of the same letters, or no BOS, would be text that the model did not write."""
    documents = [Document("ab", "one", ids=(1, 9, 200, 7)), Document("cd", "two")]
    store = tokenise(iter(documents), loaded_small.tokenizer, tmp_path / "store", eos_id=0, source_fingerprint="x")
    plain = loaded_small.tokenizer("cd", add_special_tokens=False)["input_ids"]
    assert store.read(0, store.meta.tokens).tolist() == [1, 9, 200, 7, 0, *plain, 0]
