"""Turns a GGUF file given as MODEL into an ordinary model directory: dequantises its weights once, into a cache.

This package reads the header, the names and the tokenizer; the `gguf` package dequantises. transformers' own reader
(5.17 to 5.23) ignores the factors of Llama 3's RoPE (`rope_freqs.weight`), RoPE scalings, the biases of a llama and
Qwen3's head size, splits digits as GPT-2 does whatever the file states, and holds the whole model in memory. Here
only one shard is in memory at a time. The tests check that weights and logits equal those of transformers' reader
bit by bit.

Stored dtype: bfloat16 or float16 if the file stores its weights in that type and every other tensor is exact in it;
float32 for quantised weights. A value of a quantised block is a scale times a small number (plus a minimum), which
the 8 bits of bfloat16's mantissa cannot hold: each weight would be off by up to 2^-9 of itself, half of the error of
Q8_0 itself for a large weight. The model in the cache equals the model that llama.cpp runs, and takes twice the
disk; `convert --dtype bfloat16` writes a smaller one.

Cache: `ctxext/gguf/` in XDG_CACHE_HOME or ~/.cache, one directory per file, named by the sha256 of the file's
contents. A moved file is not dequantised again; a changed file is. The hash is cached by path, size and modification
time. An adapter trained on the model names the cache directory as its base. The import needs no torch.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config.output import environment_fault
from ctxext.errors import EnvironmentFault, ModelError
from ctxext.model.card import model_card
from ctxext.model.config_fields import Fields
from ctxext.model.gguf_config import FACTORS, PERMUTED, config_of, quantisation, special_ids, tensor_names
from ctxext.model.gguf_header import FLOATS, TYPES, Header, Stored, read_header
from ctxext.model.model_config import ModelConfig, parse_config
from ctxext.model.weights import INDEX, SINGLE
from ctxext.units import format_bytes

FORMAT = 1  # version of the cache's layout
SHARD_BYTES = 2 * 1024**3
PIECE = 2**24  # entries dequantised at once


def stored_as(manifest: manifests.Manifest | None) -> str | None:
    """Returns what a manifest states about the model's GGUF file, or None if the model was not read from one."""
    facts = manifest.facts.get("gguf") if manifest else None
    if not isinstance(facts, dict):
        return None
    return f"{facts.get('file')}: {facts.get('quantisation')}; dequantised to {facts.get('dequantised_to')}"


def cache_root() -> Path:
    """Returns the directory of all dequantised models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxext" / "gguf"


def dequantised(file: Path) -> Path:
    """Returns the model directory of a GGUF file, and writes it first if the cache does not have it.

    Raises the errors of `read_header` and `config_of`, ModelError for weights that are not finite, and
    EnvironmentFault if the `gguf` package is not installed or the cache's disk has no space.
    """
    # Check everything that the header can decide before hashing the file, which reads all of it.
    header = read_header(file)
    config = parse_config(config_of(header))
    tensor_names(header, config)
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentFault(
            f"{file}: a GGUF file needs the gguf package, which is not installed", hint="pip install 'ctxext[gguf]'"
        )
    digest = manifests.file_hash(file)
    out = cache_root() / f"{FORMAT}-{digest[:40]}"
    # Check under the lock: another process may finish the directory while this one waits.
    with _alone(out):
        if not _is_whole(out):
            _write(header, out, digest)
    return out


def _is_whole(out: Path) -> bool:
    """Checks that a cache directory has all its files: it appears as a whole, but a user may have deleted some."""
    try:
        manifest = manifests.read(out)
    except ModelError:
        return False
    stored = manifest.facts.get("weights") if manifest else None
    return bool(stored) and (out / "config.json").is_file() and all((out / name).is_file() for name in stored or ())


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Waits for another process that writes the same directory. On a file system without locks both write."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(out.with_name(f"{out.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise environment_fault(error, out) or EnvironmentFault(
            f"the cache of GGUF files cannot be written at {out.parent} ({error})", hint="set XDG_CACHE_HOME"
        ) from error
    try:
        try:
            # The lock file stays in the cache; closing it releases the lock.
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # no lock support: the final rename still leaves exactly one directory
        yield
    finally:
        os.close(lock)


def _write(header: Header, out: Path, digest: str) -> None:
    """Writes the model into a temporary directory next to `out` and renames it to `out`."""
    dtype = _dtype(header)
    item = 4 if dtype == "float32" else 2
    # Check the free space first, so that a large file does not fail after minutes of work.
    needed = sum(item * _entries(stored) for stored in header.tensors.values())
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise EnvironmentFault(
            f"{header.path}: dequantised to {dtype} it takes {format_bytes(needed)}, {format_bytes(free)} are free at "
            f"{out.parent}",
            hint="free disk space, or set XDG_CACHE_HOME to a directory on a larger disk",
        )
    # The rename at the end makes `out` appear as a whole; a failed write leaves nothing.
    partial = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir()
        _write_into(partial, header, config_of(header) | {"dtype": dtype}, digest)
        if out.exists():  # an incomplete older copy
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        if _is_whole(out):  # another process finished first
            return
        raise environment_fault(error, out) or error from error
    except Exception as error:  # safetensors and tokenizers wrap OS errors in their own types
        raise environment_fault(error, out) or error from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_into(directory: Path, header: Header, fields: Fields, digest: str) -> None:
    from ctxext.model.gguf_tokenizer import write_tokenizer

    config = parse_config(fields)
    _write_weights(directory, header, config)
    write_tokenizer(header.path, directory, config)
    # Generation stops at EOS and, if the file names one, at the end-of-turn token.
    ids = special_ids(header)
    ends = [ids[name] for name in ("eos_token_id", "eot_token_id") if name in ids]
    defaults = {name: ids[name] for name in ("bos_token_id", "pad_token_id") if name in ids}
    defaults |= {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    (directory / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n", "utf-8")
    facts = {
        "name": header.path.stem,
        "gguf": {
            "file": header.path.name,
            "sha256": digest,
            "quantisation": quantisation(header),
            "dequantised_to": fields["dtype"],
            "stated_name": header.metadata.get("general.name"),
        },
    }
    # The model card states that the weights come from a quantised file. The licence is the file's own.
    rows = [("quantisation", quantisation(header)), ("file", header.path.name), ("sha256 of the file", digest)]
    text = (
        f"The weights of a GGUF file, dequantised to {fields['dtype']}. They are as precise as the quantised file, not "
    )
    text += "as the model that it was made from."
    licence = {"license": str(value)} if (value := header.metadata.get("general.license")) else {}
    (directory / "README.md").write_text(model_card(header.path.stem, [text], rows, licence), "utf-8")
    manifests.write(directory, manifests.new("source", spec={}, parents={}, facts=facts, command=[]))
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")


def _entries(stored: Stored) -> int:
    # Bytes to blocks to entries: TYPES has (name, entries of a block, bytes of a block).
    return stored.size // TYPES[stored.number][2] * TYPES[stored.number][1]


def _dtype(header: Header) -> str:
    """Returns the dtype to store: the file's own 16-bit type if every value is exact in it, else float32."""
    import numpy as np
    import torch

    types = {stored.type for stored in header.tensors.values()}
    # Quantised weights, both 16-bit types in one file, and F32 alone need float32.
    if not types <= set(FLOATS) or types >= {"F16", "BF16"} or types == {"F32"}:
        return "float32"
    name = "float16" if "F16" in types else "bfloat16"
    # Norms are often stored as F32: the 16-bit type is used only if converting them there and back changes nothing.
    # `rope_freqs.weight` does not count: it goes into config.json and not into the weights.
    for tensor, stored in header.tensors.items():
        if stored.type == "F32" and tensor != FACTORS:
            values = torch.from_numpy(np.frombuffer(header.read(tensor), np.float32).copy())
            if not torch.equal(values.to(getattr(torch, name)).float(), values):
                return "float32"
    return name


def _write_weights(directory: Path, header: Header, config: ModelConfig) -> None:
    """Writes the tensors in shards of at most SHARD_BYTES. Only one shard is in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    names, dtype = tensor_names(header, config), getattr(torch, str(config.dtype))
    # Plan the shards from the header, before any tensor is read. A tensor larger than SHARD_BYTES gets its own shard.
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, stored in names.items():
        size = _entries(header.tensors[stored]) * dtype.itemsize
        if size > room and shards[-1]:
            shards, room = [*shards, []], SHARD_BYTES
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    with tqdm(total=len(names), desc=f"dequantising {header.path.name}, once", unit=" tensors", disable=None) as shown:
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in shard:
                tensors[name] = _tensor(header, names[name], config).to(dtype)
                shown.update()
            save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
    # transformers needs the index only for several shards.
    if len(shards) > 1:
        total = sum((directory / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _tensor(header: Header, name: str, config: ModelConfig) -> Any:
    """Returns one tensor in float32 with its rows in transformers' order. Raises ModelError for NaN and infinity."""
    import gguf
    import numpy as np
    import torch

    # A row is a whole number of blocks, so the mapped bytes split into rows of equal width.
    stored = header.tensors[name]
    entries, size = TYPES[stored.number][1:]
    width = stored.shape[-1] // entries * size  # bytes of a row
    rows = np.frombuffer(header.read(name), np.uint8).reshape(-1, width)
    # Dequantise in pieces of about PIECE entries, which bounds the temporary memory.
    out = np.empty((len(rows), stored.shape[-1]), np.float32)
    step = max(1, PIECE // stored.shape[-1])
    for begin in range(0, len(rows), step):
        piece = rows[begin : begin + step]
        if stored.type in ("F32", "F16"):
            out[begin : begin + step] = piece.view(np.float32 if stored.type == "F32" else np.float16)
        else:
            out[begin : begin + step] = gguf.dequantize(piece, gguf.GGMLQuantizationType(stored.number))
    if not np.isfinite(out).all():
        raise ModelError(f"{header.path}: {name} holds NaN or infinite values", hint="the file is damaged")
    found = torch.from_numpy(out).reshape(stored.shape)
    # Only q and k of llama files need another row order.
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None or config.family.name not in PERMUTED:
        return found
    # In the file the two rows of a rotated pair are adjacent. transformers stores all first rows of a head, then all
    # second rows.
    paired = found.reshape(config.fields[heads], -1, 2, *stored.shape[1:])
    return paired.transpose(1, 2).reshape(stored.shape).contiguous()
