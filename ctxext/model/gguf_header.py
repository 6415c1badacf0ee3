"""Reads the header of a GGUF file: its metadata and the table of its tensors. No torch, no numpy; reads no tensor.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Reading a
header takes milliseconds, where `gguf.GGUFReader` takes seconds (it makes an array of each token). Every length is
checked against the size of the file before it is used. The sizes of ggml's types are those of the `gguf` package.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ctxext.errors import InputError, ModelError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_ENTRIES = 1_000_000  # limit for the number of tensors and of metadata keys, far above any model
MOST_DIMENSIONS, ALIGNMENT = 4, 32
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
AGAIN = "copy or download the file again"
TYPES: dict[int, tuple[str, int, int]] = {  # ggml's type number: name, entries per block, bytes per block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """One tensor: its ggml type, its shape in torch's order, and its bytes from `begin` in the file."""

    type: str
    number: int
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True)
class Header:
    """The metadata by key and the tensors by GGUF name.

    An array of strings that was not requested is stored as its length.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def read(self, tensor: str) -> memoryview:
        """Returns the bytes of one tensor as a memory-mapped view."""
        stored = self.tensors[tensor]
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(mapped)[stored.begin : stored.begin + stored.size]


def read_header(path: Path, strings: Collection[str] = ()) -> Header:
    """Returns the header of a file. `strings` are the keys whose arrays of strings are requested.

    Raises InputError if there is no such file or it is not a GGUF file, and ModelError if it is damaged, truncated,
    or of a kind that is not supported.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint="give a GGUF file, a directory, a preset or a hub id")
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        if begin[:4] != MAGIC:
            raise InputError(
                f"{path}: neither a model directory nor a GGUF file",
                hint="give the directory that holds config.json and the weights, or a .gguf file",
            )
        if len(begin) < 8 or size < 24:
            raise ModelError(f"{path}: truncated: {size:,} bytes are too few for a GGUF file", hint=AGAIN)
        (version,) = struct.unpack("<I", begin[4:])
        # A big-endian file shows its small version number in the upper bytes.
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0 and version != 0
            what = "its bytes are big-endian" if swapped else f"version {version}"
            raise ModelError(f"{path}: unsupported GGUF file: {what}; versions 2 and 3 are supported")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return _Cursor(path, mapped, size).header(strings)
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise ModelError(f"{path}: its header is damaged or truncated ({error})", hint=AGAIN) from None


class _Cursor:
    """A position in a mapped file that advances as values are read."""

    def __init__(self, path: Path, mapped: mmap.mmap, size: int):
        self.path, self.mapped, self.size, self.at = path, mapped, size, 8

    def header(self, strings: Collection[str]) -> Header:
        # The counts come first, then all metadata, then the table of tensors. This is the order of the format.
        tensors, keys = self.number("<Q"), self.number("<Q")
        if tensors > MAX_ENTRIES or keys > MAX_ENTRIES:
            raise self.damaged(f"it names {tensors:,} tensors and {keys:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in metadata:
                raise self.damaged(f"{key} is in it twice")
            metadata[key] = self.value(self.number("<I"), key in strings)
        entries = [self.tensor() for _ in range(tensors)]
        # The tensor data begins after the table, rounded up to the alignment; offsets in the table count from there.
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise self.damaged(f"general.alignment is {alignment!r}")
        begin = -(-self.at // alignment) * alignment
        found: dict[str, Stored] = {}
        for name, number, shape, offset in entries:
            if name in found:
                raise self.damaged(f"tensor {name} is in it twice")
            found[name] = self.stored(name, number, shape, begin + offset)
        return Header(self.path, metadata, found)

    def stored(self, name: str, number: int, shape: tuple[int, ...], begin: int) -> Stored:
        if number not in TYPES:
            raise ModelError(
                f"{self.path}: {name} is stored as ggml type {number}, which is not supported; supported are "
                f"{', '.join(name for name, _, _ in TYPES.values())}",
                hint="give a file with another quantisation",
            )
        # A row holds whole blocks, so the last dimension must be a multiple of a block's entries.
        kind, entries, size = TYPES[number]
        if not shape or 0 in shape or shape[-1] % entries:
            raise self.damaged(f"{name} has the shape {list(shape)} in {kind}, whose blocks need {entries} entries")
        stored = Stored(kind, number, shape, begin, prod(shape) // entries * size)
        if stored.begin + stored.size > self.size:
            raise ModelError(
                f"{self.path}: truncated: {name} ends at byte {stored.begin + stored.size:,} of {self.size:,}",
                hint=AGAIN,
            )
        return stored

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: its header is damaged: {what}", hint=AGAIN)

    def skip(self, count: int) -> int:
        """Advances by `count` bytes and returns where they begin. Raises ModelError beyond the end of the file."""
        begin, self.at = self.at, self.at + count
        if self.at > self.size:
            raise ModelError(f"{self.path}: truncated within its header", hint=AGAIN)
        return begin

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.mapped, self.skip(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        begin = self.skip(length)
        return self.mapped[begin : begin + length].decode("utf-8")

    def value(self, kind: int, wanted: bool) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"a value is of type {kind}")
        # An array of numbers is unpacked at once. `count` is checked first, so that a damaged header cannot request
        # much memory.
        of, count = self.number("<I"), self.number("<Q")
        if of in SCALARS:
            form = f"<{count}{SCALARS[of][1]}"
            if count > self.size:
                raise self.damaged(f"an array has {count:,} entries")
            return list(struct.unpack_from(form, self.mapped, self.skip(struct.calcsize(form))))
        if of != STRING or count > self.size // 8:
            raise self.damaged(f"an array has {count:,} entries of type {of}")
        # Strings that were not requested (a vocabulary, merges) are skipped; this makes reading fast.
        if wanted:
            return [self.text() for _ in range(count)]
        for _ in range(count):
            self.skip(self.number("<Q"))
        return count

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Returns name, type, shape and offset of a table entry.

        ggml lists the fastest dimension first; the shape has torch's order.
        """
        name, dimensions = self.text(), self.number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise self.damaged(f"{name} has {dimensions:,} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return name, self.number("<I"), shape, self.number("<Q")
