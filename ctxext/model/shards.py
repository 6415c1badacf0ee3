"""Copies checkpoints shard by shard: at most one shard in memory, and every value is checked to be finite."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctxext.errors import ModelError
from ctxext.model.weights import EMBEDDING, HEAD, INDEX, SINGLE, TensorInfo, check_tensors, model_names, weight_files
from ctxext.progress import CountProgress, ignore


@contextmanager
def open_shard(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """Opens a weight file and yields (names, a function that reads one tensor).

    Pickles are opened with `weights_only`, which runs no code. Raises ModelError for a file that is missing or damaged,
    or that holds anything other than named tensors.
    """
    if path.suffix == ".bin":
        tensors = _unpickled(path)
        yield list(tensors), tensors.__getitem__
        return
    try:
        shard = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"{path} is not a valid safetensors file ({error})", hint="copy the file again") from None
    with shard:
        yield list(shard.keys()), shard.get_tensor


def _unpickled(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file", hint="the checkpoint is incomplete: copy it again")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged file raises many types: from pickle, from zipfile, from torch
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"{path} holds more than tensors, or is damaged ({type(error).__name__}: {reason})",
            hint="nothing in it was run; save the model as safetensors",
        ) from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelError(f"{path} must hold tensors by name, and holds something else")
    return dict(tensors)


def tensor_reader(directory: Path) -> Callable[[str], Tensor | None]:
    """Returns a function name -> tensor over a safetensors checkpoint; None for a missing name.

    Each call reads from the file. Names are the model's, with whatever prefix they are stored. Where only the head is
    stored, it also serves as the embeddings, as in a tied model. `check_tensors` has already checked that an untied
    model has both.
    """
    # Read the names of all shards once: stored name -> file, then the model's name -> stored name.
    where: dict[str, Path] = {}
    for path in weight_files(directory):
        with open_shard(path) as (names, _):
            where |= dict.fromkeys(names, path)
    stored = {own: name for name, own in model_names(where, tied=False).items()}
    if HEAD in stored:
        stored.setdefault(EMBEDDING, stored[HEAD])

    def read(name: str) -> Tensor | None:
        if name not in stored:
            return None
        with open_shard(where[stored[name]]) as (_, get):
            return get(stored[name])

    return read


def copy_weights(
    source: Path,
    out: Path,
    *,
    expected: Mapping[str, tuple[int, ...]],
    added: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    allow_pickle: bool = False,
    progress: CountProgress = ignore,
) -> None:
    """Writes `source`'s weights to `out`, cast to `dtype` if one is given, plus the `added` tensors.

    `expected` are name and shape of the weights to keep. A shard that needs no change is copied as a file; in other
    shards the tensors get the model's names. Raises ModelError for NaN or infinite values, for values that overflow in
    `dtype`, for a pickled checkpoint that disagrees with its config, and for a tied model whose stored head differs
    from its embeddings.
    """
    files = weight_files(source, allow_pickle)
    if not files:
        raise ModelError(f"{source}: no weights to copy")
    check_pickles(source, files, expected)
    copying = _Copying(files, _names(files, HEAD not in expected), expected, dtype)
    # The `added` tensors get a shard of their own at the end, so that the other shards can stay plain copies.
    weight_map: dict[str, str] = {}
    shards = len(files) + bool(added)
    for number, path in enumerate(files, start=1):
        name = SINGLE if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        kept = _copy_shard(path, out / name, copying)
        weight_map |= dict.fromkeys(kept, name)
        progress(number, shards)
    if added:
        name = f"model-{shards:05d}-of-{shards:05d}.safetensors"
        like = dtype or stored_dtype(files)
        tensors = {n: cast(tensor, like, n).contiguous() for n, tensor in added.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(added, name)
        progress(shards, shards)
    # transformers needs an index for more than one shard. A single file is model.safetensors and has none.
    if shards > 1:
        size = sum((out / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def replace_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces the values of some tensors of a safetensors checkpoint, in their stored dtypes.

    Every shard that holds one of them is written again. Raises ModelError for a name that no shard has, and for a value
    that overflows in the stored dtype.
    """
    # Read the whole shard before it is overwritten.
    left = set(tensors)
    for path in weight_files(directory):
        with open_shard(path) as (names, get):
            if left.isdisjoint(names):
                continue
            held = {name: get(name) for name in names}
        changed = left & held.keys()
        held |= {name: cast(tensors[name].reshape(held[name].shape), held[name].dtype, name) for name in changed}
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, metadata={"format": "pt"})
        left -= changed
    if left:
        raise ModelError(f"{directory}: no shard has {min(left)}")


@dataclass(frozen=True)
class _Copying:
    """The settings of one copy, for all its shards.

    files     the weight files of the source
    names     stored name -> the model's name
    expected  name and shape of every weight that the model needs
    dtype     the dtype to cast to; None keeps the stored dtype
    """

    files: list[Path]
    names: Mapping[str, str]
    expected: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype | None

    def find(self, wanted: str) -> Tensor:
        """Returns one tensor by the model's name, from any shard. Raises ModelError where no shard has it."""
        for path in self.files:
            with open_shard(path) as (names, get):
                for name in names:
                    if self.names[name] == wanted:
                        return get(name)
        raise ModelError(f"no shard has {wanted}")


def _names(files: Sequence[Path], tied: bool) -> dict[str, str]:
    stored: list[str] = []
    for path in files:
        with open_shard(path) as (names, _):
            stored += names
    return model_names(stored, tied)


def _copy_shard(path: Path, out: Path, copying: _Copying) -> list[str]:
    """Writes one shard's tensors under the model's names. Returns those names."""
    dtype, tensors = copying.dtype, {}
    with open_shard(path) as (stored, get):
        kept = {name: copying.names[name] for name in stored if copying.names[name] in copying.expected}
        # A safetensors file with nothing to rename, drop or cast is copied as a file, after its values are checked.
        as_it_is = dtype is None and list(kept.values()) == list(stored) and path.suffix != ".bin"
        for name in stored:
            tensor = get(name)
            check_finite(tensor, f"{path}: {name}")
            _check_head(path, copying.names[name], tensor, copying)
            if name in kept and not as_it_is:
                tensors[kept[name]] = (tensor if dtype is None else cast(tensor, dtype, name)).contiguous()
    if as_it_is:
        shutil.copyfile(path, out)
    else:
        save_file(tensors, out, metadata={"format": "pt"})
    return list(kept.values())


def _check_head(path: Path, name: str, tensor: Tensor, copying: _Copying) -> None:
    """Raises ModelError where a tied model stores a head that differs from its embeddings. The copy drops this head."""
    if name == HEAD and name not in copying.expected and not torch.equal(tensor, copying.find(EMBEDDING)):
        raise ModelError(
            f"{path}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}",
            hint="set tie_word_embeddings to false in config.json if the head has its own weights",
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises ModelError for NaN and infinite values. It looks at the minimum and maximum, which needs no copy."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    least, largest = tensor.detach().aminmax()
    if not (math.isfinite(least.item()) and math.isfinite(largest.item())):
        raise ModelError(f"{name} holds NaN or infinite values", hint="the checkpoint is damaged")


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns a finite tensor in another dtype. Raises ModelError where the cast makes a value infinite."""
    result = tensor.to(dtype)
    if result.is_floating_point() and result.numel() and not math.isfinite(result.abs().max().item()):
        kind = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"{name} holds {tensor.abs().max().item():g}, above the {torch.finfo(dtype).max:g} that {kind} can hold",
            hint="use bfloat16 or float32",
        )
    return result


def check_pickles(source: Path, files: list[Path], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Opens a pickled checkpoint (weights only) and compares names and shapes, because it has no header to check.

    Does nothing for safetensors. Raises ModelError where the checkpoint disagrees with `expected`.
    """
    if not any(path.suffix == ".bin" for path in files):
        return
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        with open_shard(path) as (names, get):
            tensors |= {name: TensorInfo(path.name, "", tuple(get(name).shape)) for name in names}
    check_tensors(source, tensors, expected)


def stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """Returns the dtype of the first stored tensor; float32 where no shard has a tensor."""
    for path in files:
        with open_shard(path) as (names, get):
            if names:
                return get(names[0]).dtype
    return torch.float32
