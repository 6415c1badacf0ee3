"""Text becomes the ids of tokenizer.json, whichever class transformers picks, and an output is read to the same ids."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from ctxext.data.documents import read_documents
from ctxext.doctor.model import model as examine
from ctxext.errors import CheckFailed, ModelError
from ctxext.evals.perplexity import encode, perplexity
from ctxext.export.write import export, plan_export
from ctxext.generation import Conversation, plan_generation
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model
from ctxext.model.tokenizer import CHAT_PROBE, PROBES, difference, load_tokenizer, probe_texts, settle

PIECES = ("▁", *"abcdefghijklmnopqrstuvwxyzOTHAI.,'[]/0123456789")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "mellum")
CLASSES = (
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)


def bos(tokenizer: Tokenizer, single: str) -> None:
    named = [(word, tokenizer.token_to_id(word)) for word in ("<s>", "</s>") if word in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)


def sentencepiece(single: str = "<s> $A") -> Tokenizer:
    """As Llama 2's tokenizer.json: a space before every text, bytes for what is unknown, no pre-tokenizer."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "▁t", "▁a", "th", "▁▁"]
    merges = [("▁", "t"), ("▁", "a"), ("t", "h"), ("▁", "▁")]
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(vocabulary)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    words = Tokenizer(bpe)
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in ("<unk>", "<s>", "</s>")])
    bos(words, single)
    return words


def byte_level(single: str = "<s> $A") -> Tokenizer:
    """As Llama 3's: bytes, and digits in threes, which the classes of transformers divide otherwise."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = {"12": ("1", "2"), "123": ("12", "3"), "Ġt": ("Ġ", "t"), "ĠĠ": ("Ġ", "Ġ"), "'s": ("'", "s")}
    words = ["<unk>", "<s>", "</s>", *letters, *merged]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merged.values())))
    split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in ("<unk>", "<s>", "</s>")])
    bos(tokenizer, single)
    return tokenizer


FILES: dict[str, Callable[..., Tokenizer]] = {"sentencepiece": sentencepiece, "byte_level": byte_level}
SETTINGS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}


def directory(place: Path, model_type: str, file: Tokenizer, settings: dict[str, Any] | None) -> Path:
    """A directory as far as AutoTokenizer reads it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    file.save(str(place / "tokenizer.json"))
    if settings is not None:
        (place / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return place


def texts() -> list[str]:
    return [*PROBES, "<s>Hi </s> there</s>\n<s> x", "th 123 1234's  a", ""]


def assert_ids_of(file: Tokenizer, tokenizer: Any, about: object) -> None:
    for text in texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == file.encode(text, add_special_tokens=False).ids, (about, text)
        assert tokenizer(text)["input_ids"] == file.encode(text).ids, (about, text)
        assert tokenizer.decode(ids) == file.decode(ids, skip_special_tokens=False), (about, text)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_ids_are_those_of_the_file(tmp_path: Path, model_type: str, kind: str) -> None:
    """Under every class, with SentencePiece's old and new spaces, with BOS and EOS by the file's post-processor."""
    changed = 0
    flags = itertools.product(CLASSES, (None, True, False), (None, True, False))
    for (name, legacy, add), single in itertools.product(flags, ("<s> $A", "$A", "<s> $A </s>")):
        llama = (name or "").startswith("LlamaTokenizer")
        if (single != "<s> $A" and add is None) or (legacy is not None and (not llama or add is True)):
            continue
        settings = SETTINGS | {"tokenizer_class": name, "legacy": legacy, "add_bos_token": add, "chat_template": CHAT}
        settings |= {"add_eos_token": add, "add_prefix_space": legacy}
        file = FILES[kind](single)
        place = directory(tmp_path / "model", model_type, file, settings)
        tokenizer: Any = load_tokenizer(place)
        assert_ids_of(file, tokenizer, settings)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
        assert tokenizer.chat_template == CHAT and tokenizer.model_max_length == 512
        stock = AutoTokenizer.from_pretrained(place)
        changed += stock("  a 1234")["input_ids"] != tokenizer("  a 1234")["input_ids"]
    if model_type == "qwen2":
        assert changed, "AutoTokenizer reads all of these as their files: this test has no case any more"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", FILES)
def test_a_directory_without_tokenizer_config(tmp_path: Path, model_type: str, kind: str) -> None:
    """Special tokens that the class of transformers names are kept where the file has them."""
    file = FILES[kind]()
    place = directory(tmp_path / "model", model_type, file, None)
    tokenizer: Any = load_tokenizer(place)
    assert_ids_of(file, tokenizer, model_type)
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(place)
    assert_ids_of(file, tokenizer, model_type)
    if model_type == "qwen3" and kind == "sentencepiece":
        # LlamaTokenizer, whose EOS is </s> where nothing else is said.
        assert tokenizer.eos_token == "</s>"


def test_settings_beside_the_file_are_kept(tmp_path: Path) -> None:
    """Tokens that added_tokens_decoder alone has, several templates, special_tokens_map.json."""
    new = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    old = {"content": "<s>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    more = {"300": new | {"normalized": False}, "1": old | {"normalized": False}}
    settings = SETTINGS | {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": more, "eos_token": None}
    place = directory(tmp_path / "model", "qwen2", sentencepiece(), settings)
    (place / "chat_template.jinja").write_text(CHAT)
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (place / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "</s>"}')
    tokenizer: Any = load_tokenizer(place)
    assert_ids_of(sentencepiece(), tokenizer, "added")
    assert tokenizer.convert_tokens_to_ids("<|new|>") == sentencepiece().get_vocab_size()
    assert tokenizer("a<|new|>")["input_ids"][-1] == sentencepiece().get_vocab_size()
    assert tokenizer.chat_template == {"default": CHAT, "tools": "tools"}


def test_a_class_that_transformers_does_not_know_or_has_no_code_of_leaves_the_file(tmp_path: Path) -> None:
    for settings in ({"tokenizer_class": "OursTokenizer"}, {"auto_map": {"AutoTokenizer": ["ours.Slow", "ours.Fast"]}}):
        place = directory(tmp_path / "model", "smollm3", sentencepiece(), SETTINGS | settings)
        assert_ids_of(sentencepiece(), load_tokenizer(place), settings)


def test_files_that_are_none(tmp_path: Path) -> None:
    place = directory(tmp_path / "model", "llama", sentencepiece(), SETTINGS)
    (place / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="the tokenizer cannot be opened"):
        load_tokenizer(place)
    (place / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(place)
    (place / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(place)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_directory_with_vocab_and_merges_alone(tmp_path: Path, model_type: str) -> None:
    """AutoTokenizer reads it, and a conversion of it gets a tokenizer.json with these ids."""
    place = directory(tmp_path / "model", model_type, byte_level("$A"), {"tokenizer_class": "Qwen2Tokenizer"})
    byte_level().model.save(str(place))
    (place / "tokenizer.json").unlink()
    tokenizer: Any = load_tokenizer(place)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert tokenizer("th 123")["input_ids"] == AutoTokenizer.from_pretrained(place)("th 123")["input_ids"]
    for target in ("smollm3", "mellum"):
        assert_same_elsewhere(place, tmp_path / "out", target)


def assert_same_elsewhere(source: Path, out: Path, target: str) -> bool:
    """What `settle` writes is read by AutoTokenizer to the source's ids, or it says that it is not. True: it is."""
    config = {"model_type": target, "vocab_size": 400}
    settled = settle(source, config)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    for name, data in settled.files.items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text(json.dumps(config))
    mine, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(out)
    same = difference(mine, theirs) is None
    assert same == (settled.problem is None), settled.problem
    for text in [*texts(), *probe_texts(mine)]:
        for special in (True, False):
            ids = [tokenizer(text, add_special_tokens=special)["input_ids"] for tokenizer in (mine, theirs)]
            assert ids[0] == ids[1] or not same, (source, target, text)
    return same


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("source", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_output_is_read_to_the_ids_of_its_source(tmp_path: Path, source: str, kind: str) -> None:
    """In the class that a conversion becomes always; in its own where transformers lets a file name the class."""
    for name, legacy in ((None, None), ("LlamaTokenizer", True), ("LlamaTokenizer", None), ("Qwen2Tokenizer", None)):
        settings = SETTINGS | {"tokenizer_class": name, "legacy": legacy, "chat_template": CHAT}
        place = directory(tmp_path / "model", source, FILES[kind](), settings)
        for target in ("smollm3", "mellum"):
            assert assert_same_elsewhere(place, tmp_path / "out", target), (name, target)
        assert assert_same_elsewhere(place, tmp_path / "out", source) or source == "qwen2", name


def test_files_that_are_read_alike_are_copied_as_they_are(tmp_path: Path) -> None:
    settings = SETTINGS | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    for kind, model_type, target in itertools.product(FILES, ("llama", "mistral"), ("smollm3", "llama")):
        place = directory(tmp_path / "model", model_type, FILES[kind](), settings)
        assert settle(place, {"model_type": target}).files == {}, (kind, model_type, target)


@pytest.fixture
def foreign(write_model: Any, tmp_path: Path) -> Path:
    """A qwen2 with a SentencePiece tokenizer.json, as CodeQwen1.5: transformers 5 always takes Qwen2Tokenizer."""
    place = write_model(tmp_path / "foreign", "qwen2", vocab_size=400)
    sentencepiece().save(str(place / "tokenizer.json"))
    settings = SETTINGS | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def test_a_conversion_has_the_ids_of_its_source_or_is_refused(foreign: Path, tmp_path: Path) -> None:
    plan = plan_conversion(str(foreign), "full", out=tmp_path / "out")
    run_conversion(plan, gate=False)
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert_ids_of(sentencepiece(), stock, "converted")
    shown = stock.apply_chat_template(list(CHAT_PROBE), tokenize=False)
    assert stock(shown)["input_ids"] == sentencepiece().encode(shown).ids
    kept = dataclasses.replace(plan, config=plan.source.config, out=tmp_path / "kept")
    with pytest.raises(ModelError, match="would read other ids than the source's tokenizer: Qwen2Tokenizer reads"):
        run_conversion(kept, gate=False)
    assert not (tmp_path / "kept").exists()


def test_an_export_that_others_would_read_otherwise(foreign: Path, tmp_path: Path) -> None:
    """Refused for programs that open it by AutoTokenizer; for Python the card says what to use."""
    with pytest.raises(CheckFailed, match="vllm opens the tokenizer with AutoTokenizer"):
        export(plan_export(str(foreign), "vllm", out=tmp_path / "vllm"))
    assert not (tmp_path / "vllm").exists()
    export(plan_export(str(foreign), "hf", out=tmp_path / "hf"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained(where)" in card and "Do not use AutoTokenizer" in card
    run_conversion(plan_conversion(str(foreign), "full", out=tmp_path / "made"), gate=False)
    export(plan_export(str(tmp_path / "made"), "vllm", out=tmp_path / "vllm"))
    assert_ids_of(sentencepiece(), AutoTokenizer.from_pretrained(tmp_path / "vllm"), "exported")


def made(shared_cases: Path, stories: Path, case: str, place: Path) -> Path:
    """The model of a case, with the weights that its make.py gives it."""
    shutil.copytree(shared_cases / case / "model", place / "model")
    weights = load_file(stories / "model.safetensors")
    config = json.loads((place / "model" / "config.json").read_text())
    if config["model_type"] == "qwen2":
        for i, name in itertools.product(range(config["num_hidden_layers"]), "qkv"):
            rows = len(weights[f"model.layers.{i}.self_attn.{name}_proj.weight"])
            weights[f"model.layers.{i}.self_attn.{name}_proj.bias"] = torch.zeros(rows)
    save_file(weights, place / "model" / "model.safetensors", metadata={"format": "pt"})
    return place / "model"


def test_the_case_of_a_tokenizer_that_a_class_replaces(shared_cases: Path, stories: Path, tmp_path: Path) -> None:
    """Perplexity 753.664 and text with U+2581 before; 2.487 is that of the llama it was made from."""
    model = made(shared_cases, stories, "tokenizer-replaced-by-class", tmp_path)
    loaded = load_model(model)
    texts = encode(read_documents(str(shared_cases / "stories.txt")), loaded.tokenizer)
    assert perplexity(loaded, texts, 256).perplexity == pytest.approx(2.487, abs=5e-4)
    said = Conversation(plan_generation(str(model), max_new_tokens=12)).ask("Once upon a time, there was a little")
    assert said.text.startswith(" girl named") and "\u2581" not in said.text
    found = {finding.name: finding for finding in examine(str(model))}["token ids"]
    assert found.status == "warning" and "Qwen2Tokenizer reads" in found.found and "PreTrained" in found.remedy


def test_the_case_of_a_conversion_that_changes_tokens(shared_cases: Path, stories: Path, tmp_path: Path) -> None:
    """With "legacy": true, false and absent. For smollm3, transformers loads the class that the settings name."""
    model = made(shared_cases, stories, "convert-changes-tokens", tmp_path)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for number, legacy in enumerate((True, False, None)):
        changed = {name: value for name, value in (settings | {"legacy": legacy}).items() if value is not None}
        (model / "tokenizer_config.json").write_text(json.dumps(changed))
        run_conversion(plan_conversion(str(model), "full", out=tmp_path / f"out{number}"), gate=False)
        before, after = (AutoTokenizer.from_pretrained(place) for place in (model, tmp_path / f"out{number}"))
        shown = before.apply_chat_template(list(CHAT_PROBE), tokenize=False)
        assert after.apply_chat_template(list(CHAT_PROBE), tokenize=False) == shown
        for text in ("  def f(x):\n    return x", "\nHello", shown):
            assert after(text)["input_ids"] == before(text)["input_ids"]
        assert_ids_of(Tokenizer.from_file(str(model / "tokenizer.json")), after, legacy)
