"""A GGUF file given as MODEL: weights, positions and ids of the model it was made from, or a refusal by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ctxext.errors import CtxextError, EnvironmentFault, InputError, ModelError
from ctxext.model import gguf as opening
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.frequencies import inverse_frequencies
from ctxext.model.gguf_config import config_of
from ctxext.model.gguf_header import TYPES, read_header
from ctxext.model.load import load_model, load_tokenizer
from ctxext.model.source import resolve
from tests.model.gguf_files import gguf_name, tokenizer_fields, write_gguf

TEXT = (
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.  In 2026:  42 × 3.14 = 131.88!\n"
    "def f(x):\n\treturn x  # naïve café, 'tis it's WE'LL\r\n\r\n   7 77 777 7777\n"
    "你好，世界。 Привет, мир! こんにちは 안녕하세요 שלום नमस्ते 🙂👍🏽 <|turn|> <think> end"
)
ROWS = 480


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this module's own, so that what lies in it can be counted."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("gguf-cache")))
    yield
    patch.undo()


def write_bpe(directory: Path, first: Any = None) -> None:
    """A tokenizer of byte-level BPE, trained on TEXT, with a control token and a plain added one."""
    own = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=first is None or type(first).__name__ == "Digits"
    )
    own.pre_tokenizer = byte_level if first is None else pre_tokenizers.Sequence([first, byte_level])
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440, special_tokens=["</s>", "<s>", "<|turn|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    own.train_from_iterator([TEXT, TEXT.lower()] * 3, trainer)
    own.add_tokens(["<think>"])
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", bos_token="<s>").save_pretrained(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Any:
    """made(family, **config changes): a model directory whose widths are whole blocks."""
    kept: dict[str, Path] = {}

    def make(family: str = "llama", **changes: Any) -> Path:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in kept:
            kept[key] = write_model(
                tmp_path_factory.mktemp(family) / "model", family, vocab_size=ROWS, intermediate_size=64, **changes
            )
            write_bpe(kept[key])
        return kept[key]

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def logits(directory: Path) -> torch.Tensor:
    ids = torch.arange(3, 60)[None] * 7 % ROWS
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_of_floats_is_the_model_it_was_made_from(made: Any, tmp_path: Path, family: str, tied: bool) -> None:
    source = made(family, tie_word_embeddings=tied)
    found = resolve(str(write_gguf(source, tmp_path / "model.gguf")))
    assert torch.equal(logits(found.directory), logits(source))
    mine, theirs = weights(found.directory), weights(source)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    ours, stated = found.config, resolve(str(source)).config
    same = ("rope_parameters", "rms_norm_eps", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    assert [ours.fields[name] for name in same] == [stated.fields[name] for name in same]
    assert ours.dtype == "float32" and found.name == "model"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_quantised_weights_are_those_of_the_file(made: Any, tmp_path: Path, family: str, kind: str) -> None:
    """Bit by bit: those of the gguf package, and those that transformers' own reader makes of the whole file."""
    source = made(family)
    file = write_gguf(source, tmp_path / "model.gguf", matrices=kind)
    found = resolve(str(file))
    mine, form = weights(found.directory), gguf.GGMLQuantizationType[kind]
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert all(torch.equal(mine[name], value) for name, value in read.state_dict().items())
    for name, value in weights(source).items():
        if value.dim() == 2 and not (family == "llama" and (".q_proj" in name or ".k_proj" in name)):
            stored = gguf.dequantize(gguf.quantize(value.numpy(), form), form)
            assert torch.equal(mine[name], torch.from_numpy(stored)), name
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(load_model(found, device="cpu").model(ids).logits, read(ids).logits)
    manifest = found.manifest
    assert manifest is not None and kind in manifest.facts["gguf"]["quantisation"]
    assert kind in (found.directory / "README.md").read_text()


def test_sixteen_bits_stay_sixteen_where_that_is_exact(made: Any, tmp_path: Path) -> None:
    """Norms are stored in fp32 beside 16-bit matrices: they decide whether the model is stored in 16 bits."""
    source = tmp_path / "exact"
    shutil.copytree(made("llama"), source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.half().float().save_pretrained(source)
    found = resolve(str(write_gguf(source, tmp_path / "exact.gguf", matrices="F16")))
    assert found.config.dtype == "float16" and torch.equal(logits(found.directory), logits(source))
    inexact = resolve(str(write_gguf(made("llama"), tmp_path / "inexact.gguf", matrices="F16")))
    assert inexact.config.dtype == "float32"


def test_a_header_is_enough_for_a_plan(made: Any, tmp_path: Path) -> None:
    file = write_gguf(made("qwen3"), tmp_path / "q.gguf", matrices="Q8_0")
    program = (
        "import sys\nfrom ctxext.model.source import resolve\n"
        f"found = resolve({str(file)!r}, weights=False)\n"
        "assert found.path is None and found.name == 'q' and found.usable_length == 64, found\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf'} & set(sys.modules)\nassert not heavy - {'numpy'}, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert resolve(str(file), weights=False).shape == resolve(str(made("qwen3"))).shape


SPLITS = {"gpt-2": None, "smollm": pre_tokenizers.Digits(individual_digits=True)}


def ids(tokenizer: Any, text: str = TEXT, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


@pytest.mark.parametrize("pre", SPLITS)
def test_ids_of_byte_level_bpe_are_those_of_the_original(made: Any, tmp_path: Path, pre: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(made("llama"), source)
    write_bpe(source, SPLITS[pre])
    file = write_gguf(source, tmp_path / "m.gguf", tokenizer=tokenizer_fields(source, pre))
    original, mine = AutoTokenizer.from_pretrained(source), load_tokenizer(resolve(str(file)).directory)
    assert ids(mine) == ids(original) and mine.decode(ids(mine)) == TEXT
    assert ids(mine, "a  2 b  <|turn|>\n  <think>") == ids(original, "a  2 b  <|turn|>\n  <think>")
    assert (mine.bos_token, mine.eos_token) == ("<s>", "</s>")


def test_the_splits_are_those_that_transformers_has_for_the_same_names(made: Any, tmp_path: Path) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    splits = getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", None)
    if splits is None:
        pytest.skip("this transformers names no splits: the comparison is made with newer ones")
    from ctxext.model.gguf_tokenizer import SAME, SPLITS, WHOLE

    for pre in [*SPLITS, *SAME]:
        assert splits[pre] == SPLITS[SAME.get(pre, pre)]
        fields = tokenizer_fields(made("llama"), pre)
        found = resolve(str(write_gguf(made("llama"), tmp_path / f"{pre}.gguf", tokenizer=fields))).directory
        stored = json.loads((found / "tokenizer.json").read_text())
        assert stored["model"]["ignore_merges"] == (SAME.get(pre, pre) in WHOLE)
        begins = ids(load_tokenizer(found), "x")[0] == 1
        assert begins == (SAME.get(pre, pre) in WHOLE), pre  # Llama 3 and Tekken add BOS where a file does not say


def test_ids_of_sentencepiece_are_those_of_the_original(stories: Path, tmp_path: Path) -> None:
    stored = json.loads((stories / "tokenizer.json").read_text())
    vocabulary = sorted(stored["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    # SentencePiece's converter numbers merges by the score of their result: here scores follow from the merges.
    rank: dict[str, int] = {}
    for number, pair in enumerate(stored["model"]["merges"]):
        rank.setdefault("".join(pair), number)
    kinds = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t.startswith("<0x") else 1 for t in tokens]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "token_type": kinds,
        "scores": [-float(rank.get(token, 100_000)) for token in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    more = {"tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    found = resolve(str(write_gguf(stories, tmp_path / "stories.gguf", tokenizer=fields, more=more)))
    original, mine = AutoTokenizer.from_pretrained(stories), load_tokenizer(found.directory)
    for text in (TEXT, "Once upon a time", " two  spaces ", "", "<s> there</s>"):
        assert ids(mine, text) == ids(original, text) and ids(mine, text, False) == ids(original, text, False)
        assert mine.decode(ids(mine, text)) == original.decode(ids(original, text))
    assert mine.chat_template == more["tokenizer.chat_template"]
    assert torch.equal(logits_of(found.directory), logits_of(stories))


def logits_of(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(torch.arange(3, 60)[None]).logits


def factors(rope: dict[str, Any]) -> dict[str, np.ndarray]:
    """What llama.cpp's converter stores of a scaling: what each frequency is divided by."""
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": 5e5}, 8, 64)[0]
    return {"rope_freqs.weight": (np.array(plain) / inverse_frequencies(rope, 8, 64)[0]).astype(np.float32)}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_scalings_are_read_or_refused(made: Any, tmp_path: Path) -> None:
    source = made("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})

    def rope(name: str, **given: Any) -> Any:
        return config_of(read_header(write_gguf(source, tmp_path / f"{name}.gguf", **given)))

    assert rope("three", extra=factors(LLAMA3))["rope_parameters"] == LLAMA3
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope("linear", more=scaled)["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    original = {"llama.rope.scaling.original_context_length": 32}
    yarn = rope("yarn", more=scaled | {"llama.rope.scaling.type": "yarn"} | original)
    assert yarn["rope_parameters"]["original_max_position_embeddings"] == 32 == yarn["original_max_position_embeddings"]
    betas = {"llama.rope.scaling.yarn_beta_fast": 16.0, "llama.rope.scaling.yarn_ext_factor": 1.0}
    fast = rope("fast", more=scaled | {"llama.rope.scaling.type": "yarn"} | original | betas)
    assert fast["rope_parameters"]["beta_fast"] == 16
    refused = {
        "bands": ({"extra": factors(LLAMA3 | {"low_freq_factor": 2.0})}, "not those of Llama 3.1"),
        "longrope": ({"more": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}}, "'longrope'"),
        "bare yarn": ({"more": scaled | {"llama.rope.scaling.type": "yarn"}}, "original_context_length"),
        "both": ({"more": scaled, "extra": factors(LLAMA3)}, "together"),
        "window": (
            {"more": {"llama.attention.sliding_window": 16}},
            "llama.attention.sliding_window 16: not supported",
        ),
        "scale": ({"more": {"llama.attention.scale": 0.5}}, "llama.attention.scale 0.5: not supported"),
        "experts": ({"more": {"llama.expert_count": 8}}, "llama.expert_count 8"),
        "yarn's own": ({"more": {"llama.rope.scaling.attn_factor": 0.5}}, "attn_factor"),
        "partial": ({"more": {"llama.attention.value_length": 4}}, "value_length 4 in heads of 8"),
    }
    for name, (given, words) in refused.items():
        with pytest.raises(ModelError, match=words):
            rope(name, **given)


def test_what_is_no_model_here_is_refused_by_name(made: Any, tmp_path: Path) -> None:
    source = made("llama")
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "split": ({"more": {"split.count": 3, "split.no": 0}}, "one of 3 parts of a split"),
        "gemma2": ({"architecture": "gemma2"}, "architecture 'gemma2', which is not supported; supported are llama"),
        "extra": (
            {"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
            "attn_sinks.weight: does not belong to this class",
        ),
        "pre": ({"tokenizer": tokenizer_fields(source, "poro-chat")}, "tokenizer.ggml.pre 'poro-chat'"),
        "none": ({"tokenizer": {}}, "no vocabulary"),
        "wordpiece": ({"tokenizer": tokenizer_fields(source) | {"model": "bert"}}, "a tokenizer of type 'bert'"),
    }
    for name, (given, words) in cases.items():
        file = write_gguf(source, tmp_path / f"{name}.gguf", **given)
        with pytest.raises(ModelError, match=words):
            resolve(str(file))
    assert not list(opening.cache_root().glob(".*.partial-*"))
    for name, words in (("absent.gguf", "no such file"), ("a/absent.GGUF", "no such file")):
        with pytest.raises(InputError, match=words):
            resolve(name)
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(InputError, match="neither a model directory nor a GGUF file"):
        resolve(str(other))


def test_types_are_those_of_the_gguf_package() -> None:
    for number, (name, entries, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (entries, size))
        if name not in ("F32", "F16"):
            assert gguf.dequantize(np.zeros((2, size), np.uint8), kind).shape == (2, entries)


def test_damaged_files_are_refused(made: Any, tmp_path: Path) -> None:
    whole = write_gguf(made("llama"), tmp_path / "whole.gguf", matrices="Q8_0").read_bytes()
    header = read_header(tmp_path / "whole.gguf")
    begin, drawn, file = min(one.begin for one in header.tensors.values()), random.Random(0), tmp_path / "ill.gguf"
    for end in [0, 3, 4, 7, 23, 24, *(drawn.randrange(begin) for _ in range(60)), begin, len(whole) - 1]:
        file.write_bytes(whole[:end])
        with pytest.raises(CtxextError) as told:
            resolve(str(file), weights=False)
        assert isinstance(told.value, ModelError | InputError) and told.value.hint
    survived = 0
    for _ in range(300):
        ill = bytearray(whole)
        for _ in range(drawn.randrange(1, 4)):
            ill[drawn.randrange(4, begin)] = drawn.randrange(256)
        file.write_bytes(ill)
        try:
            resolve(str(file), weights=False)
            survived += 1
        except CtxextError:
            pass
    assert survived < 300
    number = whole.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    file.write_bytes(whole[:number] + b"\x63" + whole[number + 1 :])
    with pytest.raises(ModelError, match="blk.0.attn_q.weight is stored as ggml type 99, which is not supported"):
        resolve(str(file))
    place = header.tensors["blk.0.attn_norm.weight"].begin
    file.write_bytes(whole[:place] + np.array([np.nan], np.float32).tobytes() + whole[place + 4 :])
    with pytest.raises(ModelError, match="blk.0.attn_norm.weight holds NaN"):
        resolve(str(file))


def test_a_file_is_dequantised_once_and_again_when_it_changed(made: Any, tmp_path: Path) -> None:
    file = write_gguf(made("qwen2"), tmp_path / "once.gguf", matrices="Q4_1")
    first = resolve(str(file)).directory
    written = (first / "model.safetensors").stat()
    again = resolve(str(shutil.copy(file, tmp_path / "elsewhere.gguf")))
    assert again.directory == first and again.name == "elsewhere"
    assert (first / "model.safetensors").stat().st_ino == written.st_ino
    (first / "model.safetensors").unlink()
    assert resolve(str(file)).directory == first and (first / "model.safetensors").is_file()
    write_gguf(made("qwen2"), file, matrices="Q8_0")
    assert resolve(str(file)).directory != first


def test_two_processes_open_one_file_at_once(made: Any, tmp_path: Path) -> None:
    file = write_gguf(made("llama"), tmp_path / "two.gguf", matrices="Q5_0")
    program = f"from ctxext.model.source import resolve; print(resolve({str(file)!r}).directory)"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    places = {process.communicate(timeout=300)[0].strip().split("\n")[-1] for process in running}
    assert [process.returncode for process in running] == [0, 0] and len(places) == 1
    assert not list(opening.cache_root().glob(".*.partial-*"))
    (place,) = places
    assert len(weights(Path(place))) == len(resolve(str(file)).config.tensors)


def test_without_the_package_a_plan_goes_and_the_rest_says_what_to_install(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(made("llama"), tmp_path / "bare.gguf", matrices="Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert resolve(str(file), weights=False).shape.num_layers == 4
    with pytest.raises(EnvironmentFault, match="needs the gguf package") as told:
        resolve(str(file))
    assert told.value.hint == "pip install 'ctxext[gguf]'"


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_before_and_while_writing(
    made: Any, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(made("llama", num_hidden_layers=40), tmp_path / "large.gguf", matrices="Q8_0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    with pytest.raises(EnvironmentFault, match=r"dequantised to float32 it takes .*free at"):
        resolve(str(file))
    # The weights fit, and what follows them does not.
    small = write_gguf(made("llama", num_hidden_layers=1), tmp_path / "small.gguf", matrices="Q8_0")
    needed = 4 * sum(int(np.prod(one.shape)) for one in read_header(small).tensors.values())
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - needed - 8192))
    with pytest.raises(EnvironmentFault, match="is full"):
        resolve(str(small))
    assert not [path for path in opening.cache_root().iterdir() if path.is_dir()]


def test_a_conversion_of_a_file_passes_its_gate_and_names_the_file(made: Any, tmp_path: Path) -> None:
    file = write_gguf(made("llama", seed=3), tmp_path / "source.gguf", matrices="Q8_0")
    plan = plan_conversion(str(file), "SN", out=tmp_path / "out", sliding_window=8)
    report = run_conversion(plan)
    assert report.gate is not None and report.gate["identity_max_diff"] == 0
    assert "source.gguf: Q8_0" in (tmp_path / "out" / "README.md").read_text()
    assert os.path.isdir(json.loads((tmp_path / "out" / "ctxext.json").read_text())["parents"]["source"]["path"])
    assert gguf_name("model.layers.3.self_attn.q_proj.weight") == "blk.3.attn_q.weight"
