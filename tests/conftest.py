"""Models and text that tests share: random ones of every family written to disk, and the real ones where they lie."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 260
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


SLOW = [
    line for line in (Path(__file__).parent / "slow.txt").read_text("utf-8").splitlines() if not line.startswith("#")
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that slow.txt lists. A test that was renamed there or here is an error, where files are whole."""
    listed, found = set(SLOW), {item.nodeid.partition("[")[0] for item in items}
    for item in items:
        if item.nodeid in listed:
            item.add_marker("slow")
    whole = (
        {item.nodeid.partition("::")[0] for item in items} if not any("::" in name for name in config.args) else set()
    )
    lost = {name.partition("[")[0] for name in listed if name.partition("::")[0] in whole} - found
    if lost:
        raise pytest.UsageError(f"tests/slow.txt lists {min(lost)}, which there is not")


@pytest.fixture(scope="session", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the user's cache of hashes and tokens."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # more than are free cost most


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own at `path`, which a test fills up and makes room on."""

    path: Path

    def used(self) -> int:
        """Bytes in use."""
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Leave this many bytes free, rounded down to whole pages."""
        status = os.statvfs(self.path)
        take = status.f_bfree - leave // status.f_frsize
        assert take >= 0, f"{leave:,} bytes are not free"
        (self.path / "filler").write_bytes(bytes(take * status.f_frsize))

    def make_room(self) -> None:
        """Take back what `fill` took."""
        (self.path / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., SmallDisk]]:
    """make(bytes, inodes=None) -> a SmallDisk: a tmpfs, mounted until the test ends. It takes root; else tests skip."""
    mounted = list[Path]()

    def make(size: int, inodes: int | None = None) -> SmallDisk:
        place = tmp_path_factory.mktemp("disk")
        options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a full disk is a small tmpfs, and it cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return SmallDisk(place)

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def disk_acts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced, renamed and removed, in order: (act, the path; the new one of a rename)."""
    acts = list[tuple[str, str]]()
    fsync, rename, replace, rmtree = os.fsync, Path.rename, Path.replace, shutil.rmtree
    monkeypatch.setattr(
        os, "fsync", lambda file: (acts.append(("sync", os.readlink(f"/proc/self/fd/{file}"))), fsync(file))[1]
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: (acts.append(("rename", str(to))), rename(self, to))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (acts.append(("rename", str(to))), replace(self, to))[1])
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, *rest, **named: (
            acts.append(("remove", str(path))), rmtree(path, *rest, **named))[1]
    )  # fmt: skip
    return acts


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real books and a real checkpoint, beside the checkout; not part of the project."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data is absent: tests on real weights and books are not run")
    return path


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """Small inputs that went wrong once, beside the checkout; not part of the project."""
    path = Path(__file__).parents[2] / "shared" / "cases"
    if not path.is_dir():
        pytest.skip("../shared/cases is absent: inputs that went wrong once are not run")
    return path


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """stories260K, a Llama of 260,032 parameters trained by others."""
    return shared_data / "stories260K"


def write_byte_tokenizer(directory: Path) -> None:
    """A tokenizer of one token a byte, ids below VOCAB."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(directory)


def _write_model(directory: Path, family: str = "llama", seed: int = 0, shard: str = "5GB", **changes: Any) -> Path:
    """A random model of a family, with norms and biases that are not ones and zeros, as a plain checkpoint."""
    torch.manual_seed(seed)
    rope = changes.pop("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    extra = {"head_dim": 8} if family == "qwen3" else {}
    config = CONFIGS[family](**{**SIZES, **extra, "rope_parameters": rope, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory, max_shard_size=shard)
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(family, **config changes) -> directory; the same arguments give the same directory, do not write to it."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **changes: Any) -> Path:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            made[key] = _write_model(tmp_path_factory.mktemp(family) / "model", family, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """write(directory, family, shard=..., **config changes) -> directory: a model of the test's own, to break."""
    return _write_model
