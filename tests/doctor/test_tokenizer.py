"""Every fault of a tokenizer that doctor names, planted one by one; a healthy one has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors

from ctxext.doctor.finding import Finding
from ctxext.doctor.tokenizer import tokenizer as findings

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def place(model_dir: Any, tmp_path: Path) -> Path:
    shutil.copytree(model_dir("qwen2"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


def found(path: Path) -> dict[str, Finding]:
    """The findings that are not ok, by name."""
    made = findings(path, json.loads((path / "config.json").read_text())["vocab_size"])
    assert {"tokenizer", "special tokens"} <= {finding.name for finding in made}
    return {finding.name: finding for finding in made if finding.status != "ok"}


def edit(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | changes))


def test_a_healthy_tokenizer_has_no_fault(place: Path) -> None:
    file = Tokenizer.from_file(str(place / "tokenizer.json"))
    assert file.normalizer is None  # and Qwen2Tokenizer normalises: its ids are others
    edit(place / "config.json", model_type="llama")
    assert found(place) == {}


def test_ids_of_another_class(place: Path) -> None:
    warning = found(place)["token ids"]
    assert warning.status == "warning" and "ctxext uses tokenizer.json" in warning.found
    assert "Qwen2Tokenizer reads" in warning.found and "set tokenizer_class" not in warning.remedy
    assert f"PreTrainedTokenizerFast.from_pretrained({str(place)!r})" in warning.remedy


def test_ids_of_another_class_that_a_setting_mends(place: Path) -> None:
    """A qwen3, whose tokenizer_class transformers reads."""
    edit(place / "config.json", model_type="qwen3")
    edit(place / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    warning = found(place)["token ids"]
    assert warning.remedy.startswith("set tokenizer_class to PreTrainedTokenizerFast")
    edit(place / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert found(place) == {}


def test_spaces_of_another_class(place: Path) -> None:
    """Llama 2's file: LlamaTokenizer has one leading space less."""
    edit(place / "config.json", model_type="llama")
    file = Tokenizer.from_file(str(place / "tokenizer.json"))
    file.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    file.pre_tokenizer, file.post_processor = None, None  # type: ignore[assignment]
    file.decoder = decoders.Replace("▁", " ")
    file.add_tokens(["▁"])
    file.save(str(place / "tokenizer.json"))
    edit(place / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert "LlamaTokenizer reads" in found(place)["token ids"].found


def test_tokens_without_rows(place: Path) -> None:
    edit(place / "config.json", model_type="llama", vocab_size=200)
    assert "the embedding has 200 rows" in found(place)["tokenizer"].found


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_out_of_range(place: Path, name: str) -> None:
    edit(place / "config.json", model_type="llama")
    edit(place / name, eos_token_id=[0, 4_000])
    assert f"{name}: eos_token_id 4000 is outside" in found(place)["special tokens"].found


def test_an_eos_that_is_absent(place: Path) -> None:
    edit(place / "config.json", model_type="llama")
    edit(place / "generation_config.json", eos_token_id=[7, 0])
    assert found(place) == {}
    edit(place / "tokenizer_config.json", eos_token=None)
    assert "has no EOS" in found(place)["EOS"].found


def test_a_bos_that_is_asked_for_and_not_added(place: Path) -> None:
    edit(place / "config.json", model_type="llama")
    edit(place / "tokenizer_config.json", add_bos_token=True)
    assert "add_bos_token true, and the tokenizer adds none" in found(place)["BOS"].found
    file = Tokenizer.from_file(str(place / "tokenizer.json"))
    file.add_special_tokens([AddedToken("<s>", special=True)])
    file.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    file.save(str(place / "tokenizer.json"))
    assert found(place) == {}
    edit(place / "tokenizer_config.json", add_bos_token=False)
    assert "add_bos_token false, and the tokenizer adds one" in found(place)["BOS"].found


def test_a_file_that_does_not_open(place: Path) -> None:
    (place / "tokenizer.json").write_text("{}")
    assert "cannot be opened" in found(place)["tokenizer"].found
