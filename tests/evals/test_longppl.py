"""Keys against hand-built models and a naive twin, their way to another tokenizer, flags and refusals."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctxext.errors import DataError, InputError, ModelError
from ctxext.evals import longppl
from ctxext.evals.eval_spec import LongPpl
from ctxext.evals.item_runner import Ledger, Outcome, run_job
from ctxext.model.load import LoadedModel, load_model, load_tokenizer

WORDS = ["one", "two", "three", "four", "seven", "nine", "sun", "moon", "star", "rain", "wind", "fire", "tree", "leaf"]


def prose(size: int, seed: int = 0) -> str:
    rng, parts = random.Random(seed), []
    while sum(map(len, parts)) < 2 * size:
        parts.append(rng.choice(WORDS) + " ")
    return "".join(parts)[:size]


class Induction(torch.nn.Module):
    """Says what followed the latest earlier appearance of the present token; nothing where there is none."""

    def __init__(self, vocab: int = 260):
        super().__init__()
        self.head = torch.nn.Linear(vocab, vocab, bias=False)
        self.head.weight = torch.nn.Parameter(20 * torch.eye(vocab))

    def get_decoder(self) -> Any:
        return self

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        ids = input_ids[0].tolist()
        hidden = torch.zeros(1, len(ids), self.head.in_features)
        for at, token in enumerate(ids):
            earlier = [i for i in range(at) if ids[i] == token]
            if earlier:
                hidden[0, at, ids[earlier[-1] + 1]] = 1
        return SimpleNamespace(last_hidden_state=hidden)


def test_known_keys_of_a_hand_built_model() -> None:
    """Tokens 0 to 63 all differ, but for three pairs that come again."""
    ids = list(range(64))
    ids[50:52] = [5, 6]  # seen long before: 6 is a key
    ids[40:42] = [37, 38]  # seen 3 tokens before, in the short context: no key
    ids[30:32] = [7, 60]  # 7 was followed by 8: the full context is sure, and wrong
    runs = []
    assert longppl.find_keys(Induction(), ids, 8, 2, lambda: runs.append(1)) == [51]
    assert len(runs) == (64 - 10) // 2
    # A short context that reaches back to 5, 6 leaves no key; in a run all share the context of its first token.
    assert longppl.find_keys(Induction(), ids, 45, 1, lambda: None) == [51]
    assert longppl.find_keys(Induction(), ids, 46, 1, lambda: None) == []
    assert longppl.find_keys(Induction(), ids, 45, 5, lambda: None) == []
    assert longppl.find_keys(Induction(), ids, 40, 5, lambda: None) == [51]


def confident(directory: Path) -> Path:
    """A random model that chooses among the bytes of `prose` with logits six times as far apart: losses from 0 to above
    10, so that some tokens are keys."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    used = load_tokenizer(directory)("".join(WORDS) + " ", add_special_tokens=False)["input_ids"]
    scale = torch.zeros(260, 1)
    scale[used] = 6
    weights["lm_head.weight"] *= scale
    save_file(weights, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def evaluator(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evaluator") / "judge"
    return confident(write_model(place, max_position_embeddings=128, num_hidden_layers=2))


@pytest.fixture(scope="module")
def judge(evaluator: Path) -> LoadedModel:
    return load_model(evaluator, device="cpu")


@torch.no_grad()
def loss_of_the_last(model: Any, ids: list[int]) -> float:
    logits = model(torch.tensor([ids[:-1]])).logits[0, -1].double()
    return -torch.log_softmax(logits, -1)[ids[-1]].item()


@pytest.mark.parametrize(("short", "step"), [(8, 3), (4, 16)])
def test_keys_against_a_naive_walk(judge: LoadedModel, short: int, step: int) -> None:
    ids, _ = longppl.encode(judge.tokenizer, prose(48, 3))
    keys = []
    for i in range(short + step, len(ids)):
        run = short + (i - short) // step * step  # where the run that i is of begins
        near = loss_of_the_last(judge.model, ids[run - short : i + 1])
        full = loss_of_the_last(judge.model, ids[: i + 1])
        if near - full > 2 and full < 2:
            keys.append(i)
    assert keys, "the test needs keys"
    assert longppl.find_keys(judge.model, ids, short, step, lambda: None) == keys


def write_text(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def spec_of(evaluator: Path, data: str, **changes: Any) -> LongPpl:
    return replace(LongPpl(evaluator=str(evaluator), lengths=(96,), data=data), **changes)


def prepared(spec: LongPpl, place: Path) -> list[tuple[str, int, int]]:
    calls: list[tuple[str, int, int]] = []
    longppl.prepare(spec, place, "float32", "cpu", lambda *call: calls.append(call))
    return calls


def test_a_model_on_its_keys_against_logits(
    evaluator: Path, judge: LoadedModel, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    texts = [prose(130, 1), prose(100, 2)]
    spec = spec_of(evaluator, write_text(tmp_path / "two.jsonl", *texts), step=12)
    calls = prepared(spec, tmp_path)
    assert calls[0][1:] == (0, 12) and calls[-1][1:] == (12, 12), "runs of 12 tokens, from 24 to 96, of two texts"
    model = load_model(model_dir(max_position_embeddings=128, seed=5), device="cpu")
    job = longppl.job(model, spec, tmp_path)
    ledger = Ledger()
    rows = run_job(job, ledger, 1000, lambda *_: None)
    short, step = 12, 12
    nats, n = 0.0, 0
    for number, text in enumerate(texts):
        ids, _ = longppl.encode(judge.tokenizer, text[:96])
        keys = longppl.find_keys(judge.model, ids, short, step, lambda: None)
        with torch.no_grad():
            log_p = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), -1)
        losses = [-log_p[i - 1, ids[i]].item() for i in range(1, 96)]
        outcome = ledger.outcomes[f"96/{number}"]
        assert outcome.weight == len(keys) > 0
        assert outcome.score == pytest.approx(sum(losses[i - 1] for i in keys), rel=1e-5)
        assert outcome.details["all_nats"] == pytest.approx(sum(losses), rel=1e-5)
        assert outcome.details["all_tokens"] == 95
        nats, n = nats + outcome.score, n + len(keys)
    (row,) = rows
    assert (row.n, row.length, row.metric) == (n, 96, "longppl")
    assert row.value == pytest.approx(math.exp(nats / n)), "not weighted by keys"
    assert row.details["few_keys"] and row.details["n_key"] == n
    assert "short length / 8, step 12, scalable truncation, keys by judge" in row.protocol
    assert (row.details["short"], row.details["step"]) == (12, 12)
    assert any(f"{n} key tokens: give more text" in note for note in job.notes)
    assert not any("its own keys" in note for note in job.notes)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with the words of `prose` and pairs of letters made one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {"</s>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def test_spans_carry_over_to_another_tokenizer(evaluator: Path, judge: LoadedModel, tmp_path: Path) -> None:
    text = prose(94, 4) + "é" + prose(40, 5)  # é is two bytes, the 95th and 96th token
    spec = spec_of(evaluator, write_text(tmp_path / "one.jsonl", text))
    prepared(spec, tmp_path)
    row = json.loads((tmp_path / "keys" / "longppl-96.jsonl").read_text())
    assert row["text"] == text[:95], "the text is not cut where the evaluator's first 96 tokens end"
    inside = {at for start, end in row["spans"] for at in range(start, end)}
    tokenizers = {"bytes": judge.tokenizer, "merged": merging_tokenizer()}
    counts = {}
    for name, tokenizer in tokenizers.items():
        source = replace(judge.source, config=judge.source.config.with_fields(vocab_size=len(tokenizer)))
        model = SimpleNamespace(tokenizer=tokenizer, source=source, name=name, usable_length=128, model=None)
        (part,) = longppl.job(model, spec, tmp_path).items
        ids, offsets = longppl.encode(tokenizer, text[:95])
        naive = [i for i, (start, end) in enumerate(offsets) if i and inside.intersection(range(start, end))]
        assert part.keys == naive and part.ids == ids
        counts[name] = len(naive), len(ids)
    assert counts["merged"][1] < counts["bytes"][1] and 0 < counts["merged"][0] <= counts["bytes"][0], counts


def test_spans_by_hand() -> None:
    assert longppl.merged([(4, 6), (0, 2), (2, 3), (9, 9), (5, 7)]) == [(0, 3), (4, 7)]
    tokens = [(0, 0), (0, 2), (2, 4), (4, 8), (8, 9), (9, 9), (9, 12)]
    assert longppl.meeting(tokens, [(3, 4), (9, 10)]) == [2, 6]
    assert longppl.meeting(tokens, [(7, 9)]) == [3, 4]
    assert longppl.meeting(tokens, []) == []


def test_documents_whole_and_joined(evaluator: Path, judge: LoadedModel, tmp_path: Path) -> None:
    texts = [prose(40, 1), prose(120, 2), prose(30, 3), prose(40, 4), prose(20, 5), prose(96, 6)]
    data = write_text(tmp_path / "d.jsonl", *texts)
    found = list(longppl.documents(spec_of(evaluator, data), 96, judge.tokenizer))
    joined = "\n\n".join([texts[0], texts[2], texts[3]])
    assert [document.text for document, _, _ in found] == [texts[1][:96], joined[:96], texts[5]]
    assert [document.name for document, _, _ in found] == [f"{data}:2", f"{data}:1 + {data}:3 + {data}:4", f"{data}:6"]
    assert all(len(ids) == len(offsets) == 96 for _, ids, offsets in found)
    limited = list(longppl.documents(spec_of(evaluator, data, limit=2), 96, judge.tokenizer))
    assert [document.name for document, _, _ in limited] == [document.name for document, _, _ in found[:2]]
    with pytest.raises(DataError, match="has 346 tokens in all; longppl at length 400"):
        list(longppl.documents(spec_of(evaluator, data), 400, judge.tokenizer))


def test_keys_are_found_once_and_again_when_something_changed(evaluator: Path, tmp_path: Path) -> None:
    data = write_text(tmp_path / "d.jsonl", prose(120, 1))
    spec = spec_of(evaluator, data, lengths=(64, 96), step=16)
    assert {call[0] for call in prepared(spec, tmp_path)} == {"keys by judge at 64", "keys by judge at 96"}
    assert prepared(spec, tmp_path) == []
    assert {call[0] for call in prepared(replace(spec, short=20), tmp_path)} == {
        "keys by judge at 64",
        "keys by judge at 96",
    }
    keys = tmp_path / "keys" / "longppl-64.jsonl"
    keys.write_text(keys.read_text().replace("spans", "spins"))
    assert {call[0] for call in prepared(replace(spec, short=20), tmp_path)} == {"keys by judge at 64"}
    write_text(tmp_path / "d.jsonl", prose(130, 1))
    assert prepared(replace(spec, short=20), tmp_path) != []
    manifest = json.loads((tmp_path / "keys" / "longppl-96.jsonl.manifest.json").read_text())
    assert manifest["evaluator"]["path"] == str(evaluator) and manifest["evaluator"]["weights"]
    assert (manifest["short"], manifest["step"], manifest["gain_nats"]) == (20, 16, 2.0)


def test_keys_of_another_request_are_not_taken(evaluator: Path, judge: LoadedModel, tmp_path: Path) -> None:
    spec = spec_of(evaluator, write_text(tmp_path / "d.jsonl", prose(120, 1)), step=16)
    prepared(spec, tmp_path)
    for other in (replace(spec, short=20), replace(spec, data=write_text(tmp_path / "e.jsonl", prose(120, 2)))):
        with pytest.raises(InputError, match="keys of another evaluator, text or truncation"):
            longppl.job(judge, other, tmp_path)


def test_a_model_judged_by_itself_and_one_too_short(evaluator: Path, judge: LoadedModel, tmp_path: Path) -> None:
    spec = spec_of(evaluator, write_text(tmp_path / "d.jsonl", prose(120, 1)), step=16)
    prepared(spec, tmp_path)
    notes = "\n".join(longppl.job(judge, spec, tmp_path).notes)
    assert "judge has the weights of the evaluator: it defines its own keys" in notes
    assert "none was cut off" not in notes
    small = replace(judge, source=replace(judge.source, usable_length=64))
    job = longppl.job(small, spec, tmp_path)
    assert "1 of 1 documents are longer with judge (up to 96 tokens) than its usable length 64; none" in "\n".join(
        job.notes
    )
    assert [item.size for item in job.items] == [96]


def test_no_keys_no_value(judge: LoadedModel, evaluator: Path, tmp_path: Path) -> None:
    """The row says so and does not divide; where there are keys, it weighs by them."""
    spec = spec_of(evaluator, write_text(tmp_path / "d.jsonl", prose(120, 1)), step=16)
    prepared(spec, tmp_path)
    job = longppl.job(judge, spec, tmp_path)
    details = {"document": "d", "all_nats": 190.0, "all_tokens": 95}
    (row,) = job.rows([Outcome("96/0", "", 96, 0.0, 0, details)])
    assert row.value is None and row.n == 0 and row.details["few_keys"]
    assert row.details["perplexity"] == pytest.approx(math.exp(2))
    uneven = [Outcome("96/0", "", 96, 10.0, 1, details), Outcome("96/1", "", 96, 99.0, 99, details)]
    (row,) = job.rows(uneven)
    assert row.value == pytest.approx(math.exp(1.09)) and row.n == 100 and not row.details["few_keys"]


def test_truncation() -> None:
    assert longppl.truncation(LongPpl(), 102_400) == (4096, 1024)
    assert longppl.truncation(LongPpl(), 32_768) == (4096, 1024)
    assert longppl.truncation(LongPpl(), 2048) == (256, 64)
    assert longppl.truncation(LongPpl(short=100), 2048) == (100, 64)
    with pytest.raises(InputError, match="at length 512: a short context of 500 and a step of 16"):
        longppl.truncation(LongPpl(short=500), 512)


def test_refusals(
    evaluator: Path, judge: LoadedModel, write_model: Callable[..., Path], tmp_path: Path, stand_in: Any
) -> None:
    data = write_text(tmp_path / "d.jsonl", prose(120, 1))
    with pytest.raises(InputError, match="needs an evaluator"):
        longppl.check(LongPpl(lengths=(96,)))
    with pytest.raises(InputError, match="no such directory"):
        longppl.check(spec_of(tmp_path / "nothing" / "here", data))
    with pytest.raises(ModelError, match="the evaluator judge has a usable length of 128, below 129 tokens"):
        prepared(spec_of(evaluator, data, lengths=(96, 129)), tmp_path)
    bare = write_model(tmp_path / "bare", max_position_embeddings=128)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        longppl.check(spec_of(bare, data))
    with pytest.raises(InputError, match="no keys at"):
        longppl.job(judge, spec_of(evaluator, data), tmp_path)
    with pytest.raises(DataError, match="tokens in all"):
        prepared(spec_of(evaluator, write_text(tmp_path / "short.jsonl", prose(50))), tmp_path)
    assert not (tmp_path / "keys").exists()
    slow = stand_in(None, SimpleNamespace(is_fast=False))
    with pytest.raises(ModelError, match="slow one"):
        longppl.job(slow, spec_of(evaluator, data), tmp_path)


def test_a_loss_that_is_not_finite_is_refused(evaluator: Path, tmp_path: Path) -> None:
    spec = spec_of(evaluator, write_text(tmp_path / "d.jsonl", prose(120, 1)), step=16)
    prepared(spec, tmp_path)
    broken = load_model(evaluator, device="cpu")
    with torch.no_grad():
        broken.model.model.norm.weight[0] = math.nan
    job = longppl.job(broken, spec, tmp_path)
    with pytest.raises(ModelError, match="a loss is not finite at 96 tokens"):
        job.run(job.items)
    with pytest.raises(ModelError, match="not finite"):
        longppl.find_keys(broken.model, job.items[0].ids, 8, 2, lambda: None)


def test_check_costs_no_torch(evaluator: Path) -> None:
    code = f"""
import sys
from ctxext.evals.longppl import check
from ctxext.evals.eval_spec import LongPpl
assert check(LongPpl(evaluator={str(evaluator)!r}, lengths=(64,))).name == "judge"
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_joined_document_is_counted_again(tmp_path: Path, evaluator: Path) -> None:
    """Four line breaks where two texts meet are one token, the two there were before two: 19 in all, not 20."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*letters, "ĊĊ", "ĊĊĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ"), ("ĊĊ", "ĊĊ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    data = write_text(tmp_path / "d.jsonl", "a" * 9 + "\n", "\n" + "b" * 9, "c" * 5)
    ((document, ids, _),) = longppl.documents(spec_of(evaluator, data), 20, fast)
    assert document.text == "a" * 9 + "\n\n\n\n" + "b" * 9 + "\n\n" and len(ids) == 20
    assert document.name == f"{data}:1 + {data}:2 + {data}:3"
