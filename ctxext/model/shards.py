"""Copying a checkpoint shard by shard: at most one shard in memory, every value checked to be finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctxext.errors import ModelError
from ctxext.model.weights import HEAD, INDEX, SINGLE, TensorInfo, check_tensors, ignored

EMBEDDING = "model.embed_tokens.weight"
Progress = Callable[[int, int], None]  # shards done, shards in all


def weight_files(directory: Path, allow_pickle: bool) -> list[Path]:
    """The weight files of a checkpoint: safetensors if there are any, pickles only when allowed."""
    if (directory / INDEX).exists():
        weight_map = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"]
        return [directory / name for name in sorted(set(weight_map.values()))]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    return sorted(directory.glob("pytorch_model*.bin")) if allow_pickle else []


@contextmanager
def open_shard(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """(names, a function that reads one tensor). Pickles are opened with `weights_only`, which runs no code.

    Raises ModelError for a file that is not what its name says.
    """
    if path.suffix == ".bin":
        tensors = _unpickled(path)
        yield list(tensors), tensors.__getitem__
        return
    try:
        shard = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"{path} is no sound safetensors file ({error})", hint="copy the file again") from None
    with shard:
        yield list(shard.keys()), shard.get_tensor


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # of the reader of pickles, of zip files, of torch: whatever a damaged file calls forth
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"{path} holds more than tensors, or is damaged ({type(error).__name__}: {reason})",
            hint="nothing in it was run; save the model as safetensors",
        ) from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelError(f"{path} holds something else than tensors by name")
    return dict(tensors)


def tensor_reader(directory: Path) -> Callable[[str], Tensor | None]:
    """A function name -> tensor over a safetensors checkpoint, None for a name it does not hold; reads when called."""
    where = {}
    for path in weight_files(directory, allow_pickle=False):
        with open_shard(path) as (names, _):
            where |= dict.fromkeys(names, path)

    def read(name: str) -> Tensor | None:
        if name not in where:
            return None
        with open_shard(where[name]) as (_, get):
            return get(name)

    return read


def copy_weights(
    source: Path,
    out: Path,
    *,
    expected: Mapping[str, tuple[int, ...]],
    added: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    allow_pickle: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write `source`'s weights to `out`, cast to `dtype` if one is given, plus `added` tensors of zeros.

    A shard that needs no change is copied as a file. Raises ModelError for NaN or infinite values, for a pickled
    checkpoint that disagrees with its config, and for a tied model whose stored head is not its embedding.
    """
    files = weight_files(source, allow_pickle)
    if not files:
        raise ModelError(f"{source}: no weights to copy")
    check_pickles(source, files, expected)
    weight_map: dict[str, str] = {}
    shards = len(files) + bool(added)
    for number, path in enumerate(files, start=1):
        name = SINGLE if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        kept = _copy_shard(path, out / name, files, expected, dtype)
        weight_map |= dict.fromkeys(kept, name)
        progress(number, shards)
    if added:
        name = f"model-{shards:05d}-of-{shards:05d}.safetensors"
        like = dtype or stored_dtype(files[0])
        save_file(
            {n: torch.zeros(shape, dtype=like) for n, shape in added.items()}, out / name, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(added, name)
        progress(shards, shards)
    if shards > 1:
        size = sum((out / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def find_tensor(files: list[Path], wanted: str) -> Tensor:
    """One tensor, in whichever shard it lies."""
    for path in files:
        with open_shard(path) as (names, get):
            if wanted in names:
                return get(wanted)
    raise ModelError(f"no shard has {wanted}")


def _copy_shard(
    path: Path, out: Path, siblings: list[Path], expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> list[str]:
    with open_shard(path) as (names, get):
        kept = [name for name in names if name in expected]
        for name in names:
            tensor = get(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{path}: {name} holds NaN or infinite values", hint="the checkpoint is damaged")
            if name == HEAD and name not in expected and not torch.equal(tensor, find_tensor(siblings, EMBEDDING)):
                raise ModelError(
                    f"{path}: config.json says tied embeddings, but {HEAD} differs from {EMBEDDING}",
                    hint="set tie_word_embeddings to false in config.json if the head is its own",
                )
        if dtype is None and kept == names and path.suffix != ".bin":
            shutil.copyfile(path, out)
            return kept
        tensors = {name: get(name) if dtype is None else get(name).to(dtype) for name in kept}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out, metadata={"format": "pt"})
    return kept


def check_pickles(source: Path, files: list[Path], expected: Mapping[str, tuple[int, ...]]) -> None:
    """A pickled checkpoint has no header to check: open it (weights only) and compare names and shapes."""
    if not any(path.suffix == ".bin" for path in files):
        return
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        with open_shard(path) as (names, get):
            tensors |= {name: TensorInfo(path.name, "", tuple(get(name).shape)) for name in names if not ignored(name)}
    check_tensors(source, tensors, expected)


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype of a shard's first tensor."""
    with open_shard(path) as (names, get):
        return get(names[0]).dtype
