"""The embedded corpus: the installed standard library of the running Python, and synthetic text.

The package contains none of this text. It depends on the running Python, so `fingerprint` belongs in the manifest of
everything that is trained on it. Perplexity is measured only on the held-out split.
"""

from __future__ import annotations

import hashlib
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ctxext.data import synthetic
from ctxext.data.readers import Document
from ctxext.errors import DataError

Split = Literal["train", "held-out"]

HELD_OUT_PERCENT = 10
MAX_FILE_BYTES = 256 * 1024
# Tests are absent from some distributions; encodings and pydoc_data are tables; the rest is other people's code.
SKIPPED_DIRECTORIES = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "_vendor",
    }
)
# Real documents are cut at line ends into pieces of this many spans, so that most positions have a full span before
# them.
SPANS_PER_PIECE = 4


def stdlib_root() -> Path:
    """Returns the directory of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


@lru_cache(maxsize=1)
def stdlib_files() -> tuple[Path, ...]:
    """Returns every source file of the corpus, both splits, sorted by its path relative to `stdlib_root`.

    Tests, tables of encodings, vendored packages and files above 256 KiB are left out. Raises DataError if Python is
    installed without sources.
    """
    root = stdlib_root()
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # The build writes `_sysconfigdata_*`, which differs between machines.
        if SKIPPED_DIRECTORIES.intersection(parts[:-1]) or parts[-1].startswith("_sysconfigdata"):
            continue
        if 0 < path.stat().st_size <= MAX_FILE_BYTES:
            found.append(path)
    if not found:
        raise DataError(
            f"the standard library at {root} has no Python sources",
            hint="use a Python that is installed with its sources, or give --data",
        )
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def split_of(relative_path: str) -> Split:
    """Returns the split of a file.

    Only a hash of its relative POSIX path decides it, so it is stable across versions.
    """
    digest = hashlib.sha256(relative_path.encode()).digest()
    return "held-out" if int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT else "train"


@lru_cache(maxsize=2)
def _documents(split: Split) -> tuple[Document, ...]:
    root = stdlib_root()
    documents = []
    for path in stdlib_files():
        name = path.relative_to(root).as_posix()
        if split_of(name) != split:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a source in another encoding: a handful at most; `fingerprint` still counts it
        documents.append(Document(text=text.replace("\r\n", "\n"), name=name))
    return tuple(documents)


def stdlib_documents(split: Split) -> list[Document]:
    """Returns the split's files, whole, in path order. Files that are not UTF-8 are left out."""
    if split not in ("train", "held-out"):
        raise DataError(f"split {split!r} is unknown: allowed are 'train' and 'held-out'")
    return list(_documents(split))


def _pieces(documents: list[Document], max_chars: int) -> list[Document]:
    """Cuts documents at line ends into pieces of at most `max_chars` (more if a single line is longer)."""
    pieces = []
    for document in documents:
        lines, size, first = [], 0, 1
        for number, line in enumerate(document.text.splitlines(keepends=True), start=1):
            if lines and size + len(line) > max_chars:
                pieces.append(Document(text="".join(lines), name=f"{document.name}:{first}"))
                lines, size, first = [], 0, number
            lines.append(line)
            size += len(line)
        if lines:
            pieces.append(Document(text="".join(lines), name=f"{document.name}:{first}"))
    return pieces


def corpus_documents(
    split: Split,
    *,
    seed: int = 0,
    synthetic_fraction: float = 0.0,
    span_chars: int = 1280,
    max_chars: int | None = None,
    kinds: Sequence[str] = synthetic.DEFAULT_KINDS,
) -> Iterator[Document]:
    """Yields the corpus as a stream of shuffled documents; the same arguments on the same Python give the same stream.

    synthetic_fraction  share of the characters that is synthetic (0 up to, not including, 1; see synthetic.py); its
                        filler comes from the same split
    span_chars          length of a training sequence in characters: synthetic documents have up to that many, their
                        dependencies spread over the whole range, and real files are cut into pieces of four spans
    max_chars           ends the stream after that many characters; the real text is repeated (in another order, with
                        fresh synthetic text) if it is too short. None is one pass over the real text
    """
    if not 0.0 <= synthetic_fraction < 1.0:
        raise DataError(f"synthetic_fraction {synthetic_fraction} is outside 0 <= fraction < 1")
    if span_chars < synthetic.MIN_SPAN_CHARS:
        raise DataError(f"span_chars {span_chars} is too short: at least {synthetic.MIN_SPAN_CHARS}")
    whole = stdlib_documents(split)
    pieces = _pieces(whole, SPANS_PER_PIECE * span_chars)
    filler = synthetic.Filler(whole)
    # One generator draws both the order and the synthetic text, so a seed fixes the stream.
    rng = random.Random(f"{split}/{seed}")
    real = made = count = 0
    while True:
        rng.shuffle(pieces)
        for piece in pieces:
            # Insert synthetic documents until their share of the characters is right with the next piece included.
            while made < synthetic_fraction * (real + made + len(piece.text)):
                document = synthetic.draw(rng, filler, span_chars, name=f"synthetic:{count}", kinds=kinds)
                count += 1
                made += len(document.text)
                yield document
                if max_chars is not None and real + made >= max_chars:
                    return
            real += len(piece.text)
            yield piece
            if max_chars is not None and real + made >= max_chars:
                return
        if max_chars is None:
            return


def fingerprint() -> dict:
    """Returns what was read, for a manifest: Python's version, number of files, bytes, and one sha256.

    The sha256 is over the lines `<sha256 of the file> <relative path>`, sorted by path; `files` has all of these lines.
    """
    root = stdlib_root()
    lines, size = [], 0
    for path in stdlib_files():
        data = path.read_bytes()
        size += len(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()} {path.relative_to(root).as_posix()}")
    return {
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "file_count": len(lines),
        "bytes": size,
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "files": lines,
    }
