"""Every protocol against a slow twin that walks the windows and holds all logits."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxext.data.documents import Document, read_documents
from ctxext.errors import DataError, InputError, ModelError
from ctxext.evals import PROTOCOLS
from ctxext.evals.perplexity import EncodedText, encode, perplexity
from ctxext.model.load import load_model

LETTERS = "abcdefgh .,\n"


def text(size: int, seed: int = 0) -> Document:
    rng = random.Random(seed)
    return Document("".join(rng.choice(LETTERS) for _ in range(size)), f"d{seed}")


@torch.no_grad()
def twin(model: torch.nn.Module, ids: torch.Tensor, length: int, protocol: str, stride: int) -> list[list[float]]:
    """[(position in the window, loss)] of every scored target, by the words of the protocol."""
    scored: list[list[float]] = []
    seen = 1
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + length]
        if protocol != "hf-stride" and len(window) < length:
            break
        losses = torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none")
        for at in range(1, len(window)):
            if protocol != "hf-stride" or begin + at >= seen:
                scored.append([at, losses[at - 1].item()])
        seen = begin + len(window)
        if begin + length >= len(ids):
            break
    return scored


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("size", "length"), [(700, 300), (643, 129), (300, 300), (301, 33)])
def test_protocols_against_the_twin(loaded: Any, protocol: str, size: int, length: int) -> None:
    texts = encode([text(size)], loaded.tokenizer)
    assert len(texts[0].ids) == size
    result = perplexity(loaded, texts, length, protocol=protocol)
    scored = twin(loaded.model, texts[0].ids, length, protocol, result.stride)
    mean = sum(loss for _, loss in scored) / len(scored)
    assert result.tokens_scored == len(scored)
    assert result.nats_per_token == pytest.approx(mean, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(mean / math.log(2), rel=1e-5)  # one token a byte
    for bucket in result.buckets:
        mine = [loss for at, loss in scored if bucket.start <= at < bucket.stop]
        assert bucket.tokens == len(mine), f"positions {bucket.start}..{bucket.stop}"
        if mine:
            assert bucket.nats_per_token == pytest.approx(sum(mine) / len(mine), rel=1e-5)
    assert sum(bucket.tokens for bucket in result.buckets) == len(scored)


def test_hf_stride_scores_every_token_but_the_first_once(loaded: Any) -> None:
    texts = encode([text(500)], loaded.tokenizer)
    for length, stride in [(64, 1), (64, 63), (100, 50), (500, 7), (499, None)]:
        result = perplexity(loaded, texts, length, stride=stride)
        assert result.tokens_scored == 499, f"length {length}, stride {stride}"


def test_the_size_of_batches_changes_nothing(loaded: Any) -> None:
    texts = encode([text(900)], loaded.tokenizer)
    for protocol in PROTOCOLS:
        one = perplexity(loaded, texts, 64, protocol=protocol, tokens_per_batch=1)
        many = perplexity(loaded, texts, 64, protocol=protocol, tokens_per_batch=10**6)
        assert one.nats_per_token == pytest.approx(many.nats_per_token, rel=1e-6), protocol
        assert (one.windows, one.tokens_scored) == (many.windows, many.tokens_scored)


def test_documents_alone_and_joined(loaded: Any) -> None:
    docs = [text(100, 1), text(30, 2), text(20, 3), text(64, 4)]
    texts = encode(docs, loaded.tokenizer)
    result = perplexity(loaded, texts, 50)
    assert (result.documents_alone, result.documents_joined, result.dropped_tokens) == (2, 2, 0)
    assert result.tokens_scored == 99 + (30 + 1 + 20 + 1 - 1) + 63
    assert result.text_tokens == 100 + 64 + 52
    joined = torch.cat([texts[1].ids, torch.tensor([0]), texts[2].ids, torch.tensor([0])])
    scored = [s for ids in (texts[0].ids, texts[3].ids, joined) for s in twin(loaded.model, ids, 50, "hf-stride", 25)]
    assert result.nats_per_token == pytest.approx(sum(loss for _, loss in scored) / len(scored), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(result.nats_per_token / math.log(2) * 216 / 214, rel=1e-6)
    dropped = perplexity(loaded, texts, 60)
    assert (dropped.documents_joined, dropped.dropped_tokens) == (0, 52)
    same = [perplexity(loaded, texts, length, alone_from=60).text_tokens for length in (10, 30, 60)]
    assert same == [164, 164, 164], "the lengths were not measured on the same text"


def test_a_limit_cuts_tokens_and_bytes_alike(loaded: Any) -> None:
    texts = encode([text(100, 1), text(100, 2), text(100, 3)], loaded.tokenizer, max_tokens=150)
    assert [len(t.ids) for t in texts] == [100, 50]
    assert texts[1].text_bytes == 50
    rows = iter([text(100, 1), text(100, 2)])
    encode(rows, loaded.tokenizer, max_tokens=100)
    assert next(rows).name == "d2", "more was read than the limit needs"


def test_progress_says_first_how_many_windows(loaded: Any) -> None:
    calls: list[tuple[int, int]] = []
    perplexity(
        loaded,
        encode([text(2000)], loaded.tokenizer),
        512,
        protocol="longlora",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[0] == (0, 6)
    assert calls[-1] == (6, 6)


def test_refusals(loaded: Any) -> None:
    texts = encode([text(50)], loaded.tokenizer)
    for options, said in [
        ({"protocol": "mean"}, "hf-stride, longlora, truncate"),
        ({"stride": 40}, "allows 1 to 39"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": 0, "protocol": "longlora"}, "longlora at length 40 allows 1 or more"),
        ({"protocol": "truncate", "stride": 3}, "are adjacent"),
    ]:
        with pytest.raises(InputError, match=said):
            perplexity(loaded, texts, 40, **options)
    with pytest.raises(DataError, match="has 51 tokens; one window needs 64"):
        perplexity(loaded, texts, 64)
    with pytest.raises(DataError, match="has 0 tokens"):
        perplexity(loaded, [], 64)


def test_a_loss_that_is_not_finite_is_refused(model_dir: Callable[..., Path]) -> None:
    broken = load_model(model_dir(), device="cpu")
    with torch.no_grad():
        broken.model.model.norm.weight[0] = math.nan
    with pytest.raises(ModelError, match=f"{broken.name} gives a loss that is not finite"):
        perplexity(broken, encode([text(100)], broken.tokenizer), 64)


def test_a_trained_model_is_better_with_more_to_look_at(stories: Path, shared_data: Path) -> None:
    story = load_model(stories, device="cpu")
    novel = read_documents(str(shared_data / "books" / "norris_the_octopus.md"))
    texts = encode(novel, story.tokenizer, max_tokens=16384)
    found = {length: perplexity(story, texts, length).perplexity for length in (32, 128, 512, 2048)}
    assert found[32] > found[128] > found[512], found
    assert found[2048] > found[512], f"no damage beyond the trained length: {found}"
    assert 33 < found[512] < 42, f"the beginning of this novel at 512 tokens was measured at 37.6: {found}"


@pytest.mark.slow
def test_32k_tokens_in_bounded_memory() -> None:
    """In a process of its own: T x V logits alone would be 2 GiB."""
    code = """
import resource, torch
from types import SimpleNamespace
from transformers import LlamaConfig, LlamaForCausalLM
from ctxext.evals.perplexity import EncodedText, perplexity
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=16384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=32768))
loaded = SimpleNamespace(model=model, tokenizer=SimpleNamespace(eos_token_id=0), name="wide")
ids = torch.randint(16384, (32768,))
perplexity(loaded, [EncodedText(ids[:2048], 1.0)], 2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = perplexity(loaded, [EncodedText(ids, 1.0)], 32768)
assert result.tokens_scored == 32767, result
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout.split()[-1])
    assert grown < 512 * 1024, f"grew by {grown / 1024:.0f} MiB from 2k to 32k tokens"


def test_encoded_text_is_what_perplexity_reads(loaded: Any) -> None:
    by_hand = [EncodedText(torch.arange(2, 102), 100.0)]
    assert perplexity(loaded, by_hand, 64).tokens_scored == 99
