"""Writes outputs of the ctxext that is on PYTHONPATH, for test_compatibility.py to open with a later one.

    git worktree add /tmp/old a22c3a9
    PYTHONPATH=/tmp/old python tests/compatibility/make.py /tmp/old-outputs outputs-a22c3a9.tar.gz

A random llama of 2 layers, 16 wide: its conversion, an unfinished and a finished run, an evaluation, a merge and a
pipeline. The archive holds absolute paths in text files, under the placeholder that the test replaces.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

PLACEHOLDER = "/placeholder-for-the-directory-of-these-outputs"
SMALL = ("--set", "global_batch_size=1", "--set", "validation.every_steps=null", "--set", "lora.rank=2")


def write_model(directory: Path) -> None:
    """A random llama with a tokenizer of one token a byte."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                         initializer_range=0.2, bos_token_id=1, eos_token_id=0, tie_word_embeddings=True)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(directory)


def ctxext(place: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "ctxext", *map(str, arguments)]
    subprocess.run(command, cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def write_outputs(place: Path) -> None:
    """Every kind of output, made by the command line from `place`."""
    model, text = place / "model", place / "text.txt"
    write_model(model)
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(200)))
    ctxext(place, "convert", model, "--hybrid", "SN", "--sliding-window", "8", "--out", place / "conversion")
    training = (place / "conversion", "--ctx", "64", "--data", text, *SMALL, "--set", "attention.train=dense")
    keep = ("--set", "faults.keep_at_end=true", "--set", "faults.save_steps=1", "--set", "faults.keep=2")
    ctxext(place, "finetune", *training, "--steps", "3", *keep, "--out", place / "run")
    # A run that stopped after a checkpoint: the finished one without its result and without its last checkpoint.
    shutil.copytree(place / "run", place / "unfinished")
    steps = sorted((place / "unfinished").glob("checkpoints/*"))
    shutil.rmtree(steps[-1])
    shutil.rmtree(place / "run" / "checkpoints")
    for name in ("ctxext.json", "config.json", "adapter_model.safetensors", "adapter_config.json", "README.md"):
        (place / "unfinished" / name).unlink()
    ctxext(place, "merge", place / "run", "--out", place / "merged")
    ctxext(place, "eval", model, place / "merged", "--suite", "perplexity", "--lengths", "64", "--limit", "512",
           "--data", text, "--out", place / "evaluation")  # fmt: skip
    pipeline = {
        "steps": {
            "made": {"command": "convert", "model": str(model), "hybrid": "SF", "sliding_window": 8},
            "measured": {"command": "eval", "models": "${made}", "lengths": [64], "limit": 512, "data": str(text)},
        }
    }
    (place / "pipeline.yaml").write_text(json.dumps(pipeline))
    ctxext(place, "run", place / "pipeline.yaml", "--out", place / "pipeline")
    ids = torch.arange(2, 66)[None]
    stock = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.save(stock(ids).logits[0, -1].clone(), place / "logits-of-merged.pt")


def pack(place: Path, archive: Path) -> None:
    """The outputs as an archive, `place` in text files under the placeholder."""
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if str(place).encode() in data:
                path.write_bytes(data.replace(str(place).encode(), PLACEHOLDER.encode()))
    with tarfile.open(archive, "w:gz") as file:
        file.add(place, arcname="outputs")


if __name__ == "__main__":
    place, archive = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    place.mkdir(parents=True)
    write_outputs(place)
    pack(place, archive)
    print(f"{archive}: {archive.stat().st_size:,} bytes")
