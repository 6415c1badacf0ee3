"""Outputs that appear whole or not at all: they are written beside their place and renamed into it at the end.

A killed process can leave two things beside an output NAME. Neither of them blocks the next command.

.NAME.partial-HOST-ID   unfinished work. The next command of the same host that writes NAME removes it, unless a living
                        process holds its lock. What another host left has to be removed by hand.
.NAME.old-ID            the output that --force was replacing. Nothing removes it: rename it back, or remove it by hand.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctxext.config.locks import busy, hold, is_locked
from ctxext.errors import CtxextError, EnvironmentFault, InputError
from ctxext.units import format_bytes

MARKS = ("ctxext.json", "spec.yaml", "request.json", "pipeline.json")  # one is in all that ctxext wrote or began
_ELSEWHERE = "give another --out"
_LONGEST_NAME = 120  # bytes of an output's name that a hidden neighbour repeats; a file name has at most 255
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.EBUSY, errno.ESTALE)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # of a rename onto what another process put there
# Libraries hide the error number. safetensors and tokenizers put it into the text of an exception of their own, numpy
# says in two ways how much it did not write.
_FULL_TEXTS = re.compile(
    r"No space left on device|os error 28\b|Disk quota exceeded|\d+ requested and \d+ written|Not enough free space"
)


@contextmanager
def staged_output(out: Path, force: bool = False) -> Iterator[Path]:
    """Yields a new directory, which becomes `out` when the block ends and is removed when the block fails.

    The directory lies beside `out`, so that the rename at the end copies nothing. With `force` an older `out` is
    replaced at that moment and not before. Of two processes that write one `out`, the second is refused: at its start
    where it sees the first, else at its end.

    Raises:
        InputError: `out` exists (without `force`), `force` must not replace it, or another process writes it.
        EnvironmentFault: the disk is full, or the place cannot be written.
    """
    out = Path(out)
    check_free(out, force)
    target = out.absolute()
    before = _identity(target)
    with disk_faults(out):
        _clean_neighbours(target)
        made = [path for path in target.parents if not path.exists()]
        try:
            with _locked_directory(target) as partial:
                try:
                    # The fault is named before the partial output is removed: it says how much is free.
                    with disk_faults(out):
                        yield partial
                        _put_in_place(partial, target, before)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
        except BaseException:
            for path in made:
                _remove_if_empty(path)
            raise


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes a file that is there whole or not at all, over what was there. Its directory has to exist.

    Two processes that write one path both succeed; the last one's file stays. Raises EnvironmentFault where the disk is
    full or the path cannot be written.
    """
    # The name is unique, since containers that share a directory have the same process ids.
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    try:
        # The fault is named before the partial file is removed: it says how much is free.
        with disk_faults(path, hint="make room, then give the command again"):
            partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_free(out: Path, force: bool = False, keep: Iterable[Path | None] = ()) -> None:
    """Refuses an `out` that `staged_output` would refuse; call it before long work.

    `keep` are paths the work reads from: an `out` that is or holds one of them is refused, `force` or not. So is a
    directory that ctxext did not write, unless it is empty, and one that another process is writing.
    """
    out = Path(out)
    if out.name in ("", ".."):
        raise InputError(f"{out} cannot be an output; allowed: a new directory")
    if not os.path.lexists(out):
        above = next(path for path in out.absolute().parents if os.path.lexists(path))
        if not above.is_dir():
            raise InputError(f"{above} is no directory: nothing can be written below it", hint=_ELSEWHERE)
        return
    if not force:
        raise InputError(f"{out} exists", hint="give --force to replace it, or another --out")
    real = out.resolve()
    for kept in (Path.cwd(), Path.home(), *(path for path in keep if path is not None)):
        if kept.resolve().is_relative_to(real):
            raise InputError(f"{out} holds {kept}: even --force does not replace it", hint=_ELSEWHERE)
    before = _identity(out.absolute())
    try:
        if out.is_symlink() or not out.is_dir() or not any(out.iterdir()):
            return
    except FileNotFoundError:
        raise busy(out, "process") from None
    if not any((out / mark).is_file() for mark in MARKS):
        # Another process may be replacing the directory at this moment.
        if _identity(out.absolute()) != before:
            raise busy(out, "process")
        raise InputError(f"{out} is nothing that ctxext wrote: even --force does not replace it", hint=_ELSEWHERE)
    if any(is_locked(path) for path in (out, *(out / mark for mark in MARKS))):
        raise busy(out, "process")


def claim(out: Path) -> None:
    """Makes the directory of an output that grows in its place. Raises InputError where another process made it."""
    with disk_faults(out):
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            raise busy(out, "process") from None


@contextmanager
def replacing(out: Path, force: bool, keep: Iterable[Path | None] = ()) -> Iterator[None]:
    """Makes room for an output that grows in its place, and names the faults of its disk.

    An older output (with `force`) is put aside. It comes back when the block fails and leaves nothing at `out`.
    """
    check_free(out, force, keep)
    target = out.absolute()
    aside = _beside(target, "old")
    with disk_faults(out):
        if os.path.lexists(target):
            target.rename(aside)
        try:
            yield
        finally:
            if os.path.lexists(aside) and not os.path.lexists(target):
                aside.rename(target)
            _remove(aside)


@contextmanager
def disk_faults(out: Path, hint: str = f"make room, or {_ELSEWHERE}") -> Iterator[None]:
    """Raises EnvironmentFault where the block that writes `out` fails for want of room or permission.

    `hint` says what to do about a full disk.
    """
    try:
        yield
    except Exception as error:
        fault = environment_fault(error, out, hint)
        if fault is None:
            raise
        raise fault from error


def environment_fault(
    error: BaseException, out: Path, hint: str = f"make room, or {_ELSEWHERE}"
) -> EnvironmentFault | None:
    """What an error says of the disk or its permissions, as an EnvironmentFault; None for any other error.

    `out` is what was being written. Where the error names a file, that file is the place.
    """
    if isinstance(error, CtxextError):
        return None
    given = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    named = Path(os.fsdecode(given)).absolute() if isinstance(given, str | bytes) else None
    if is_full_disk(error):
        place = _existing(named or Path(out))
        if isinstance(error, OSError) and error.errno == errno.EDQUOT:
            return EnvironmentFault(f"the disk quota of {place} is used up", hint=hint)
        room = f"{format_bytes(shutil.disk_usage(place).free)} free"
        room = "no file can be added: 0 inodes free" if _inodes_used_up(place) else room
        return EnvironmentFault(f"the disk of {place} is full ({room})", hint=hint)
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        if named is not None and not named.is_relative_to(Path(out).absolute().parent):
            # Something else than the output, such as a file that is read.
            return EnvironmentFault(f"{named}: {error.strerror}", hint="look at its permissions, and at its disk")
        where = f" ({named})" if named else ""
        return EnvironmentFault(f"cannot write {out}: {error.strerror}{where}", hint=_ELSEWHERE)
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether an exception of the system or of a library says that a disk, its quota or its inodes are used up."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return _FULL_TEXTS.search(str(error)) is not None


@contextmanager
def _locked_directory(target: Path) -> Iterator[Path]:
    """A new, locked directory beside `target`; the lock says that its writer lives. The parents are made, too."""
    while True:
        partial = _beside(target, f"partial-{_host()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            # Another process removed a parent that it had made, or took the directory for a stale one.
            continue
        try:
            hold(descriptor, target, "process")
            # Before the lock was held, another process may have removed the directory as a stale one.
            if not partial.exists():
                continue
            yield partial
            return
        except BaseException:
            _remove_if_empty(partial)
            raise
        finally:
            os.close(descriptor)


def _clean_neighbours(target: Path) -> None:
    """Removes what killed processes of this host left beside `target`. Raises InputError where one of them lives."""
    prefix = f".{_short(target.name)}.partial-{_host()}-"
    siblings = list(target.parent.iterdir()) if target.parent.is_dir() else []
    for path in siblings:
        if not path.name.startswith(prefix) or not re.fullmatch("[0-9a-f]{32}", path.name.removeprefix(prefix)):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            raise busy(target, "process") from None
        except OSError:
            # Without locks nothing says whether the writer lives.
            continue
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, target: Path, before: tuple[int, ...] | None) -> None:
    """Renames `partial` to `target` in place of what had the identity `before`, None for nothing.

    Raises InputError where another process put something there since.
    """
    aside, now = _beside(target, "old"), _identity(target)
    if now is not None:
        if now != before:
            raise _overtaken(target)
        target.rename(aside)
    try:
        partial.rename(target)
    except BaseException as error:
        if now is not None and not os.path.lexists(target):
            aside.rename(target)
        if isinstance(error, OSError) and error.errno in _TAKEN:
            _remove(aside)
            raise _overtaken(target) from None
        raise
    _remove(aside)


def _overtaken(target: Path) -> InputError:
    return InputError(
        f"{target} was written by another process meanwhile: that output stays, this one was removed", hint=_ELSEWHERE
    )


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells an output at `path` from another one that takes its place; None where there is none.

    An inode is given again to the next directory: the inodes and times of the MARKS are compared, too.
    """
    if not os.path.lexists(path):
        return None
    found = list[int]()
    for place in (path, *(path / mark for mark in MARKS)):
        try:
            status = os.lstat(place)
        except OSError:
            found += [0, 0]
        else:
            found += [status.st_ino, 0 if place == path else status.st_mtime_ns]
    return tuple(found)


def _beside(target: Path, kind: str) -> Path:
    """A hidden name beside `target` that no other process has."""
    return target.with_name(f".{_short(target.name)}.{kind}-{uuid.uuid4().hex}")


def _short(name: str) -> str:
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40] or "host"


def _existing(path: Path) -> Path:
    """`path` or the nearest directory above it that exists and that will stay."""
    places = (path.absolute(), *path.absolute().parents)
    return next(place for place in places if not re.search(r"\.partial-|/\.bundle-", str(place)) and place.is_dir())


def _inodes_used_up(place: Path) -> bool:
    status = os.statvfs(place)
    return status.f_files > 0 and status.f_favail == 0 and status.f_bavail > 0


def _remove(path: Path) -> None:
    """Removes a directory, file or link, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return
