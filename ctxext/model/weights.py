"""What a checkpoint's files hold, from the safetensors headers alone: no torch, no tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ctxext.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
HEAD = "lm_head.weight"
AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: the file it lies in, its safetensors dtype name (F32, BF16, ...) and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises ModelError when it is truncated or lies about its sizes."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(path.name, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
            }
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", hint="the checkpoint is incomplete: copy it again") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is no whole safetensors file, or truncated ({error})", hint=AGAIN) from None


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a (possibly sharded) safetensors checkpoint, by name.

    Raises ModelError when there is none, a shard is missing or truncated, or the index names a tensor no shard has.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise _no_weights(directory)
        return read_header(directory / SINGLE)
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index ({error!r})") from None
    if any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
        raise ModelError(f"{index}: shard names must be plain file names beside the index")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        tensors |= read_header(directory / shard)
    lost = sorted(name for name, shard in weight_map.items() if tensors.get(name, TensorInfo("", "", ())).file != shard)
    if lost:
        raise ModelError(f"{index}: {len(lost)} tensors are not in the shard it names, first {lost[0]!r}")
    return tensors


def only_pickles(directory: Path) -> bool:
    """Whether the weights are pytorch_model*.bin and nothing else."""
    safe = (directory / INDEX).exists() or (directory / SINGLE).exists()
    return not safe and any(directory.glob("pytorch_model*.bin"))


def _no_weights(directory: Path) -> ModelError:
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        return ModelError(
            f"{directory}: only pickled weights ({pickles[0]}), which can run code when opened",
            hint="convert accepts them with --allow-pickle; or save the model as safetensors first",
        )
    return ModelError(f"{directory}: no {SINGLE} and no {INDEX}", hint="is this the model's directory?")


def check_tensors(directory: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare stored tensors with what config.json implies; raises ModelError naming the first disagreements.

    A tied model may store its head a second time; that it equals the embeddings is checked where tensors are read.
    """
    faults = [f"{name}: missing, should be {list(shape)}" for name, shape in expected.items() if name not in tensors]
    faults += [
        f"{name}: {list(tensors[name].shape)} in the file, {list(shape)} by config.json"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    tied_head = {HEAD} if HEAD not in expected and tensors.get(HEAD) else set()
    faults += [
        f"{name}: in the file, unknown to config.json"
        for name in tensors.keys() - expected.keys() - tied_head
        if not ignored(name)
    ]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"{directory}: config.json disagrees with the weights\n{shown}{more}")


def ignored(name: str) -> bool:
    """Stored tensors that carry nothing: old checkpoints keep RoPE's frequencies, which config.json implies."""
    return name.endswith("rotary_emb.inv_freq")
