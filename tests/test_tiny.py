"""The embedded model is what the README says: small, trained, good at its own length, from a recorded recipe."""

import pytest

from ctxext.config import manifest as manifests
from ctxext.config.loader import build
from ctxext.evals.eval_spec import EvalSpec
from ctxext.evals.suite import evaluate
from ctxext.model.source import resolve


@pytest.fixture(scope="module")
def tiny():
    return resolve("tiny")


def test_it_is_a_small_ordinary_llama_that_says_where_it_came_from(tiny):
    directory = tiny.directory
    assert sum(path.stat().st_size for path in directory.iterdir()) < 12 * 1024**2
    assert (tiny.config.family.name, tiny.original_length, tiny.usable_length) == ("llama", 512, 512)
    corpus = manifests.read(directory).facts["corpus"]
    assert corpus["sha256"] and len(corpus["files"]) == corpus["file_count"] > 100
    assert not [path for path in directory.iterdir() if path.suffix not in (".json", ".safetensors", ".md")]


def test_at_its_own_length_it_predicts_and_retrieves_and_past_it_it_fails(tiny):
    both = {"lengths": [512, 2048]}
    suites = [{"suite": "perplexity", "limit": 8192} | both, {"suite": "passkey", "cases": 2} | both]
    spec = build(EvalSpec, {"suites": suites, "extrapolate": True}, source="test")
    by_suite, passkeys = (suite.rows for suite in evaluate([tiny], spec).models[0].suites)
    at_512, at_2k = (row.value for row in by_suite)
    assert at_512 < 30, at_512  # a unigram model of the same text has more than 200
    assert at_2k > 1.3 * at_512, (at_512, at_2k)
    found = {row.length: row.value for row in passkeys}
    assert found[512] >= 0.5 and found[2048] <= 0.2, found  # chance is 1 in 90,000
