"""An evaluation says what it read of its data, keeps it, reads plain text as text, and refuses ids without a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ctxext.errors import ModelError
from ctxext.eval_and_merge import eval_models, plan_eval
from ctxext.evals import longppl
from ctxext.evals.eval_spec import eval_spec_from_options
from ctxext.evals.suite import evaluate

LINE = "The cat sat on the mat, and the <s>dog</s> did not. "


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    (place / "a.txt").write_text(LINE * 10)
    (place / "B.TXT").write_text(LINE * 10)
    (place / "c.pdf").write_bytes(b"%PDF")
    return place


@pytest.fixture
def model(write_model: Callable[..., Path], tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "llama", max_position_embeddings=128)


@pytest.mark.parametrize("suite", ["perplexity", "passkey", "niah", "longppl"])
def test_every_suite_with_data_says_and_keeps_what_it_read(suite: str, data: Path, model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": str(data), "lengths": [120]}
    if suite == "longppl":
        given |= {"evaluator": str(model), "short": 16, "step": 16}
    if suite in ("passkey", "niah"):
        given |= {"limit": 1, "lengths": [512], "extrapolate": True}
    plan = plan_eval([str(model)], suite, given, out=tmp_path / "out")
    said: list[str] = []
    eval_models(plan, notice=said.append)
    line = next(line for line in said if f"{suite}: read " in line)
    assert "2 files, 2 documents" in line and line.endswith("; skipped: c.pdf (suffix .pdf)")
    if suite in ("perplexity", "longppl"):
        assert f"{2 * len(LINE) * 10:,} tokens" in line or f"{len(LINE) * 10:,} tokens" in line
        assert any("control tokens in the text read as the characters they are" in line for line in said)
    facts = json.loads((tmp_path / "out" / "ctxext.json").read_text())["facts"]
    if suite != "longppl":
        assert facts["read"][suite][0]["files"] == 2
        assert facts["read"][suite][0]["beside"] == [["c.pdf", "suffix .pdf"]]


def test_control_tokens_in_text_change_no_loss(loaded: Any, data: Path) -> None:
    """The text is scored as its characters: one token a byte of it."""
    report = evaluate([loaded], eval_spec_from_options("perplexity", {"data": str(data), "lengths": [64]}))
    row = report.rows()[0]
    assert row["details"]["text_tokens"] == 2 * len(LINE) * 10


def test_a_token_without_a_row_is_refused_before_any_window(data: Path, model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra{number}>" for number in range(10)])
    tokenizer.save(str(model / "tokenizer.json"))
    (data / "a.txt").write_text(LINE * 10 + "<extra9>")
    said = f"its tokenizer gives token {tokenizer.get_vocab_size() - 1}, but the model has 260 tokens"
    with pytest.raises(ModelError, match=said):
        evaluate([str(model)], eval_spec_from_options("perplexity", {"data": str(data), "lengths": [64]}))
    given = {"data": str(data), "lengths": [120], "evaluator": str(model), "short": 16, "step": 16}
    (data / "B.TXT").unlink()
    (data / "a.txt").write_text("<extra9>" + LINE * 10)
    with pytest.raises(ModelError, match=said):
        evaluate([str(model)], eval_spec_from_options("longppl", given))


def test_longppl_joins_short_documents_and_counts_their_tokens_once(loaded: Any, data: Path) -> None:
    given = replace(
        eval_spec_from_options("longppl", {"data": str(data), "lengths": [900], "evaluator": "x"}).suites[0],
        lengths=(900,),
    )
    found = list(longppl.documents(given, 900, loaded.tokenizer))
    assert len(found) == 1
