"""Finds the files of a path, reports which ones are skipped and why, and opens their bytes. No torch."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from ctxext.errors import InputError
from ctxext.extras import require
from ctxext.units import counted

TEXT_SUFFIXES = (".txt", ".text", ".md")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
INSIDE = (".parquet",)  # formats with internal compression: a .gz around one is not read
NAMED = 5  # files that a log line names; the others are counted
KEPT = 100  # files that a manifest names


@dataclass
class Reading:
    """A report of what has been read of a source so far, and what was skipped.

    found        number of files to read; 0 for a source that has none (the embedded corpus, a data set)
    files        number of files that gave text; without those in `passed_over` and those not reached, if reading ended
                 early
    beside       (name, why) of files and directories that are not data, known before reading; `more` counts those
                 beyond KEPT, `hidden` those whose names begin with a dot
    passed_over  (name, why) of files that turned out to have no data while reading, at most KEPT;
                 `more_passed_over` counts those beyond KEPT
    empty_rows   number of rows with only white space
    tokens       number of tokens made of the documents and used; 0 if nothing counted them
    notes        notes of the encoder about the text (data/encoding.py)
    """

    source: str
    found: int = 0
    files: int = 0
    documents: int = 0
    beside: list[tuple[str, str]] = field(default_factory=list)
    more: int = 0
    hidden: int = 0
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    empty_rows: int = 0
    tokens: int = 0
    notes: list[str] = field(default_factory=list)
    more_passed_over: int = 0

    @classmethod
    def begun(cls, source: str, found: Found) -> Reading:
        """Returns the report for files that are about to be read."""
        beside = list(found.beside)
        return cls(source, len(found.files), beside=beside[:KEPT], more=len(beside[KEPT:]), hidden=found.hidden)

    def pass_over(self, name: str, why: str) -> None:
        """Moves a file from the files that gave text to the skipped ones."""
        # The reader counted the file when it opened it.
        self.files -= 1
        if len(self.passed_over) < KEPT:
            self.passed_over.append((name, why))
        else:
            self.more_passed_over += 1

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as a dict, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Reading:
        """Restores a report from the fields of `as_dict`, after a round trip through JSON."""
        # JSON turns the tuples into lists.
        pairs = {name: [(file, why) for file, why in fields[name]] for name in ("beside", "passed_over")}
        return cls(**fields | pairs)

    def lines(self) -> list[str]:
        """Returns the log lines of a run about its data: what was read, and the encoder's notes."""
        return [self.line(), *self.notes]

    def line(self, *, reused: bool = False) -> str:
        """Returns the main log line.

        Example: `read 2 files, 3 documents, 1,034 tokens; skipped: e.json (no list of objects), 1 hidden`.
        """
        counts = [counted(self.documents, "document")] + ([counted(self.tokens, "token")] if self.tokens else [])
        if self.found:
            # Files that were not reached, because reading ended early.
            rest = self.found - self.files - len(self.passed_over) - self.more_passed_over
            files = counted(self.found, "file")
            counts.insert(0, f"{self.files:,} of {files}" if rest else counted(self.files, "file"))
        verb = "found in the cache:" if reused else "read"
        over = self.passed_over_in_words()
        return f"{verb} {', '.join(counts)}" + (f"; skipped: {over}" if over else "")

    def passed_over_in_words(self) -> str:
        """Returns some skipped names with the reasons, then counts; empty if nothing was skipped."""
        both = self.beside + self.passed_over
        names = [f"{name} ({why})" for name, why in both[:NAMED]]
        rest = len(both[NAMED:]) + self.more + self.more_passed_over
        counts = [(rest, f"{rest:,} more"), (self.hidden, f"{self.hidden:,} hidden")]
        counts.append((self.empty_rows, counted(self.empty_rows, "empty row")))
        return ", ".join(names + [words for count, words in counts if count])


_recorder: ContextVar[list[Reading] | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded() -> Iterator[list[Reading]]:
    """Collects every reading that begins within the block, so that a run can report what its suites or probes read."""
    found: list[Reading] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def record(reading: Reading) -> Reading:
    """Adds the reading to the enclosing `recorded` block, if there is one, and returns it."""
    found = _recorder.get()
    if found is not None:
        found.append(reading)
    return reading


def distinct(readings: Iterable[Reading]) -> list[Reading]:
    """Returns the readings that read something, without duplicates: a suite may read the same text several times."""
    found: list[Reading] = []
    for reading in readings:
        if reading.documents and reading not in found:
            found.append(reading)
    return found


@dataclass(frozen=True)
class Found:
    """The files of a source in reading order, and the skipped entries for `Reading`."""

    files: tuple[Path, ...]
    beside: tuple[tuple[str, str], ...] = ()
    hidden: int = 0


def kind_of(path: Path) -> tuple[str, str] | None:
    """Returns (format, compression) by a file's name; None if it is not supported.

    Examples: (".jsonl", ".gz") and (".txt", "").
    """
    name, compression = path.name.lower(), ""
    for suffix in COMPRESSIONS:
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), suffix
    format = Path(name).suffix
    if format not in TEXT_SUFFIXES + ROW_SUFFIXES or (compression and format in INSIDE):
        return None
    return format, compression


def find(source: Path, texts: bool = True) -> Found:
    """Returns the files of `source`. Without `texts`, only files with rows.

    Raises InputError if there is none, or if `source` is a file of an unsupported kind.
    """
    suffixes = TEXT_SUFFIXES + ROW_SUFFIXES if texts else ROW_SUFFIXES
    allowed = ", ".join(suffixes)
    if source.is_dir():
        return _below(source, suffixes)
    if not source.exists():
        raise InputError(
            f"no such file or directory: {source}",
            hint=f"give {allowed}, a directory of them, embedded, or hub:NAME for a data set",
        )
    # A file that the user names must be readable; in a directory such files are only skipped.
    kind = kind_of(source)
    if kind is None or kind[0] not in suffixes:
        raise InputError(
            f"{source} has the suffix {source.suffix!r}; allowed are {allowed}"
            f" ({' and '.join(COMPRESSIONS)} may follow, but not after {INSIDE[0]})",
            hint="rename or convert the file",
        )
    return Found((source,))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens the bytes of a file, decompressed if needed.

    If the file is damaged, OSError, EOFError or zlib.error may come at opening and during reading.
    """
    kind = kind_of(path)
    compression = kind[1] if kind else ""
    if compression == ".gz":
        with gzip.open(path, "rb") as file:
            yield cast(BinaryIO, file)
    elif compression == ".zst":
        require("pyarrow", f"reading {path}")
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as file:
            yield cast(BinaryIO, io.BufferedReader(file))
    else:
        with path.open("rb") as file:
            yield file


def _below(root: Path, suffixes: tuple[str, ...]) -> Found:
    """Finds the files below a directory. Links are followed; each directory and each file is read once."""
    entries, over, hidden, linked = _walk(root)
    files = []
    for path in entries:
        kind = kind_of(path)
        if kind is None:
            over.append((path, f"suffix {path.suffix}" if path.suffix else "no suffix"))
        elif kind[0] not in suffixes:
            over.append((path, "text, but only rows are read"))
        elif path.is_file():
            files.append(path)
        else:
            over.append((path, "not a regular file" if path.exists() else "a broken link"))
    # Only links can give a file two names.
    if linked:
        files, twice = _once(files, root)
        over += twice
    # Directories in the report end with a slash.
    named = tuple((path.relative_to(root).as_posix() + "/" * path.is_dir(), why) for path, why in sorted(over))
    found = Found(tuple(sorted(files)), named, hidden)
    if not files:
        words = Reading.begun(str(root), found).passed_over_in_words()
        raise InputError(
            f"no file to read in the directory {root}" + (f"; skipped: {words}" if words else ""),
            hint=f"add files with the suffix {', '.join(suffixes)}; {' or '.join(COMPRESSIONS)} may follow",
        )
    return found


def _walk(root: Path) -> tuple[list[Path], list[tuple[Path, str]], int, bool]:
    """Returns (entries that are not directories, (directory, why) of skipped directories, number of hidden, any links).

    Links to directories come after everything that is reachable without them, so that a file keeps its shortest name.
    """
    entries, over, hidden, linked = list[Path](), list[tuple[Path, str]](), 0, False
    real_root = Path(os.path.realpath(root))
    seen, waiting, links = {str(real_root)}, [root], list[Path]()
    while waiting or links:
        if not waiting:
            links.sort()
            waiting.append(links.pop(0))
        directory = waiting.pop()
        # Skip a link whose target has been read already or contains the root, since it would lead to a cycle.
        if directory != root:
            target = os.path.realpath(directory)
            if target in seen or real_root.is_relative_to(target):
                over.append((directory, "a link to a directory that is read already"))
                continue
            seen.add(target)
        try:
            with os.scandir(directory) as listing:
                children = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            over.append((directory, f"cannot be listed: {error.strerror}"))
            continue
        # Queue directories at once, and links to directories for later.
        for child in children:
            path = directory / child.name
            linked = linked or child.is_symlink()
            if child.name.startswith("."):
                hidden += 1
            elif child.is_symlink():
                (links if path.is_dir() else entries).append(path)
            else:
                (waiting if child.is_dir() else entries).append(path)
    return entries, over, hidden, linked


def _once(files: list[Path], root: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Keeps each file once, by its real path: (kept files, the others and why). A name without a link has priority."""
    real = {path: os.path.realpath(path) for path in files}
    real_root, names = os.path.realpath(root), dict[str, Path]()
    for path in sorted(files, key=lambda path: (os.path.join(real_root, path.relative_to(root)) != real[path], path)):
        names.setdefault(real[path], path)
    twice = [
        (path, f"the same file as {names[real[path]].relative_to(root).as_posix()}")
        for path in files
        if names[real[path]] != path
    ]
    return [path for path in files if names[real[path]] == path], twice
