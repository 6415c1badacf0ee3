"""Finds the weight files of a directory and lists their tensors from headers alone. No torch; it reads no tensor.

The rules are those of transformers' `from_pretrained`: model.safetensors has priority over an index of shards,
safetensors have priority over pickles, and a stored name may lack the prefix `model.` or have it twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ctxext.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
PREFIX = "model."
FLOATS = ("F64", "F32", "F16", "BF16")
AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its file, its safetensors dtype name (F32, BF16, ...; empty for a pickle) and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of one safetensors file. Raises ModelError when it is missing, truncated or inconsistent."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(path.name, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
            }
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", hint="the checkpoint is incomplete: copy it again") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is not a valid safetensors file, or is truncated ({error})", hint=AGAIN) from None


def weight_files(directory: Path, allow_pickle: bool = False) -> list[Path]:
    """Returns the weight files that transformers reads, in its order.

    Returns [] where there are none, or only pickles that are not allowed. Raises ModelError for an index that
    transformers does not read.
    """
    single, several = (PICKLE, PICKLE_INDEX) if allow_pickle and only_pickles(directory) else (SINGLE, INDEX)
    if (directory / single).is_file():
        return [directory / single]
    if (directory / several).is_file():
        return [directory / name for name in sorted(set(read_index(directory / several).values()))]
    return []


def read_index(path: Path) -> dict[str, str]:
    """Returns an index's `weight_map`: tensor name -> shard. Raises ModelError where transformers does not read it."""
    try:
        index = json.loads(path.read_text("utf-8"))
        weight_map = dict(index["weight_map"])
        shards, metadata = set(weight_map.values()), index.get("metadata")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a safetensors index ({error!r})") from None
    if any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
        raise ModelError(f"{path}: shard names must be plain file names beside the index")
    if not weight_map:
        raise ModelError(f"{path}: its weight_map names no tensor", hint=AGAIN)
    if not isinstance(metadata, dict):
        raise ModelError(
            f'{path}: no "metadata" object, without which transformers does not read an index',
            hint='add "metadata": {} to it',
        )
    return weight_map


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of a (possibly sharded) safetensors checkpoint, by its stored name.

    Raises ModelError when there is no checkpoint, when a shard is missing or truncated, or when the index names a
    tensor that is not in its shard.
    """
    files = weight_files(directory)
    if not files:
        raise _no_weights(directory)
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        tensors |= read_header(path)
    if files[0].name == SINGLE:
        return tensors
    index = directory / INDEX
    stray = [
        name for name, shard in read_index(index).items() if tensors.get(name, TensorInfo("", "", ())).file != shard
    ]
    if stray:
        raise ModelError(f"{index}: {len(stray)} tensors are not in the shard that it names, first {min(stray)!r}")
    return tensors


def only_pickles(directory: Path) -> bool:
    """Returns whether the weights are only pytorch_model.bin, or shards of it."""
    safe = (directory / INDEX).is_file() or (directory / SINGLE).is_file()
    return not safe and ((directory / PICKLE).is_file() or (directory / PICKLE_INDEX).is_file())


def _no_weights(directory: Path) -> ModelError:
    # The error for the most likely cause: a broken link of a hub download, pickles only, or a wrong directory.
    for name in (SINGLE, INDEX):
        if (directory / name).is_symlink():
            return ModelError(
                f"{directory / name} links to {(directory / name).readlink()}, which does not exist",
                hint="the download is incomplete: download the model again",
            )
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        return ModelError(
            f"{directory}: only pickled weights ({pickles[0]}), which can run code when they are opened",
            hint="convert accepts pytorch_model.bin with --allow-pickle; or save the model as safetensors first",
        )
    return ModelError(f"{directory}: no {SINGLE} and no {INDEX}", hint="is this the model's directory?")


def model_name(stored: str) -> str:
    """Returns the model's name of a tensor with the stored name `stored`.

    As transformers does, this adds `model.` to a name that lacks it (checkpoints of a model without its head), and
    removes one of two.
    """
    if not stored.startswith(PREFIX):
        return stored if stored == HEAD else PREFIX + stored
    rest = stored.removeprefix(PREFIX)
    return rest if rest.startswith(PREFIX) or rest == HEAD else stored


def model_names(stored: Iterable[str], tied: bool) -> dict[str, str]:
    """Returns stored name -> the model's name, for all tensors of a checkpoint.

    Where a tied model stores its one matrix as the head, the head gets the name of the embeddings. Raises ModelError
    where two stored tensors get the same name.
    """
    names = {name: model_name(name) for name in stored}
    if tied and EMBEDDING not in names.values():
        names = {name: EMBEDDING if own == HEAD else own for name, own in names.items()}
    of: dict[str, str] = {}
    for name, own in names.items():
        if of.setdefault(own, name) != name:
            raise ModelError(f"{of[own]} and {name} are both stored, and both are {own}", hint="remove one of them")
    return names


def check_tensors(directory: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares stored tensors with those that config.json implies. Raises ModelError with the first differences.

    A tied model may store its head as a second copy, or in place of the embeddings. Whether two copies are equal is
    checked where tensors are read.
    """
    # A second copy of the embeddings is allowed, but it needs their shape.
    tied = HEAD not in expected
    own = {name: tensors[stored] for stored, name in model_names(tensors, tied).items()}
    wanted = dict(expected) | ({HEAD: expected[EMBEDDING]} if tied and HEAD in own and EMBEDDING in expected else {})
    faults = [f"{name}: missing, should be {list(shape)}" for name, shape in wanted.items() if name not in own]
    faults += [
        f"{name}: {list(own[name].shape)} in the file, but {list(shape)} by config.json"
        for name, shape in wanted.items()
        if name in own and own[name].shape != tuple(shape)
    ]
    faults += [
        f"{name}: stored as {info.dtype}; supported are {', '.join(FLOATS)}"
        for name, info in own.items()
        if name in wanted and info.dtype and info.dtype not in FLOATS  # a tensor of a pickle has no dtype name here
    ]
    faults += [
        f"{name}: in the file, but not in config.json's architecture"
        for name in sorted(own.keys() - wanted.keys())
        if not ignored(name)
    ]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"{directory}: config.json does not match the weights\n{shown}{more}")


def ignored(name: str) -> bool:
    """Returns whether a stored tensor has no use: old checkpoints store RoPE's frequencies, known from config.json."""
    return name.endswith("rotary_emb.inv_freq")
