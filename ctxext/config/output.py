"""Outputs that appear whole or not at all: they are written next to their final path and renamed at the end.

A killed process can leave two things next to an output NAME. Neither of them blocks the next command.

.NAME.partial-HOST-ID   unfinished work. The next command on the same host that writes NAME removes it, unless a living
                        process holds its lock. Work of another host must be removed by hand.
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

MARKS = ("ctxext.json", "spec.yaml", "request.json", "pipeline.json")  # each output of ctxext has at least one of them
_OTHER_OUT = "give another --out"
_LONGEST_NAME = 120  # bytes; a hidden neighbour's name contains the output's name, and a file name has at most 255
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.EBUSY, errno.ESTALE)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # a rename onto a path that another process has created
# Libraries hide the error number. safetensors and tokenizers put it into the text of their own exceptions; numpy has
# two messages for a write that was cut short.
_FULL_TEXTS = re.compile(
    r"No space left on device|os error 28\b|Disk quota exceeded|\d+ requested and \d+ written|Not enough free space"
)


@contextmanager
def staged_output(out: Path, force: bool = False) -> Iterator[Path]:
    """Yields a new directory that becomes `out` when the block succeeds and is removed when the block fails.

    The directory is next to `out`, so that the final rename copies nothing. With `force` an older `out` is replaced
    at that moment and not before. If two processes write the same `out`, the second one gets an error: at its start
    if it can see the first one, else at its end.

    Raises:
        InputError: `out` exists (without `force`), `force` must not replace it, or another process writes it.
        EnvironmentFault: the disk is full, or the place cannot be written.
    """
    out = Path(out)
    check_free(out, force)
    target = out.absolute()
    # Note what is at `out` now: at the end only this may be replaced, not an output that appeared meanwhile.
    before = _identity(target)
    with disk_faults(out):
        _clean_neighbours(target)
        # Parents that do not exist yet; on failure those that are still empty are removed again.
        made = [path for path in target.parents if not path.exists()]
        try:
            with _locked_directory(target) as partial:
                try:
                    # The error states the free space, so it is built before the removal frees some.
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
    """Writes a file that appears whole or not at all, over an existing one. Its directory must exist.

    A power loss after the call does not lose the file.
    If two processes write the same path, both succeed and the last file stays. Raises EnvironmentFault if the disk
    is full or the path cannot be written.
    """
    # A random name, since containers that share a directory may have equal process ids.
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    try:
        # The error states the free space, so it is built before the removal frees some.
        with disk_faults(path, hint="free disk space, then give the command again"):
            partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Writes the contents of a file, or the entries of a directory, to the disk: a power loss does not lose them.

    A directory whose file system cannot do this is skipped.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno in (*_FULL, errno.EIO):
            raise


def sync_tree(directory: Path) -> None:
    """Writes a directory and everything below it to the disk, as `sync` does. Links are not followed."""
    for path in (*directory.rglob("*"), directory):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)


def check_free(out: Path, force: bool = False, keep: Iterable[Path | None] = ()) -> None:
    """Raises InputError for an `out` that `staged_output` would reject; call it before long work.

    `keep` are paths that the work reads from: an `out` that is or contains one of them is rejected, with or without
    `force`. The same holds for a directory that ctxext did not write, unless it is empty, and for one that another
    process is writing.
    """
    out = Path(out)
    if out.name in ("", ".."):
        raise InputError(f"{out} cannot be an output; allowed: a new directory")
    if not os.path.lexists(out):
        # The nearest existing parent must be a directory, or the output could not be created.
        above = next(path for path in out.absolute().parents if os.path.lexists(path))
        if not above.is_dir():
            raise InputError(f"{above} is not a directory: nothing can be written below it", hint=_OTHER_OUT)
        return
    if not force:
        raise InputError(f"{out} exists", hint="give --force to replace it, or another --out")
    # Never replace the working directory, the home directory or an input, nor a directory that contains one of them.
    real = out.resolve()
    for kept in (Path.cwd(), Path.home(), *(path for path in keep if path is not None)):
        if kept.resolve().is_relative_to(real):
            raise InputError(f"{out} holds {kept}, which --force does not replace", hint=_OTHER_OUT)
    # A link, a file or an empty directory may be replaced; the directory may vanish during the check.
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
        raise InputError(f"{out} is not an output of ctxext, and --force does not replace it", hint=_OTHER_OUT)
    if any(is_locked(path) for path in (out, *(out / mark for mark in MARKS))):
        raise busy(out, "process")


def claim(out: Path) -> None:
    """Creates the directory of an output that is written in place. Raises InputError if another process created it."""
    with disk_faults(out):
        try:
            out.mkdir(parents=True)
            sync(out.parent)
        except FileExistsError:
            raise busy(out, "process") from None


@contextmanager
def replacing(out: Path, force: bool, keep: Iterable[Path | None] = ()) -> Iterator[None]:
    """Moves an older output out of the way for an output that is written in place, and reports disk errors.

    The older output (with `force`) is renamed. It is moved back if the block leaves nothing at `out`, and is removed
    otherwise.
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
def disk_faults(out: Path, hint: str = f"free disk space, or {_OTHER_OUT}") -> Iterator[None]:
    """Raises EnvironmentFault if the block that writes `out` fails because of disk space or permissions.

    `hint` states what to do about a full disk.
    """
    try:
        yield
    except Exception as error:
        fault = environment_fault(error, out, hint)
        if fault is None:
            raise
        raise fault from error


def environment_fault(
    error: BaseException, out: Path, hint: str = f"free disk space, or {_OTHER_OUT}"
) -> EnvironmentFault | None:
    """Returns an EnvironmentFault for an error of the disk or its permissions, and None for any other error.

    `out` is the path being written. If the error names a file, the message names the place of that file.
    """
    if isinstance(error, CtxextError):
        return None
    # An OSError of a rename has the destination in `filename2`.
    given = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    named = Path(os.fsdecode(given)).absolute() if isinstance(given, str | bytes) else None
    if is_full_disk(error):
        # A full disk, a used-up quota and used-up inodes need different messages.
        place = _existing(named or Path(out))
        if isinstance(error, OSError) and error.errno == errno.EDQUOT:
            return EnvironmentFault(f"the disk quota of {place} is used up", hint=hint)
        room = f"{format_bytes(shutil.disk_usage(place).free)} free"
        room = "no file can be added: 0 inodes free" if _inodes_used_up(place) else room
        return EnvironmentFault(f"the disk of {place} is full ({room})", hint=hint)
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        if named is not None and not named.is_relative_to(Path(out).absolute().parent):
            # The file is not part of the output, such as an input file.
            return EnvironmentFault(f"{named}: {error.strerror}", hint="check its permissions and its disk")
        where = f" ({named})" if named else ""
        return EnvironmentFault(f"cannot write {out}: {error.strerror}{where}", hint=_OTHER_OUT)
    return None


def is_full_disk(error: BaseException) -> bool:
    """Checks whether an exception of the system or of a library means that a disk, quota or inode table is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return _FULL_TEXTS.search(str(error)) is not None


@contextmanager
def _locked_directory(target: Path) -> Iterator[Path]:
    """Yields a new, locked directory next to `target`; the lock shows that its writer is alive. Creates the parents."""
    while True:
        partial = _beside(target, f"partial-{_host()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            # Another process removed a parent that it had created, or removed the directory as a stale one.
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
    """Removes the leftovers of killed processes of this host next to `target`. InputError if a writer is alive."""
    prefix = f".{_short(target.name)}.partial-{_host()}-"
    siblings = list(target.parent.iterdir()) if target.parent.is_dir() else []
    # The name must match exactly: prefix, host and a 32-digit id.
    for path in siblings:
        if not path.name.startswith(prefix) or not re.fullmatch("[0-9a-f]{32}", path.name.removeprefix(prefix)):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            # A free lock means that the writer is dead.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            raise busy(target, "process") from None
        except OSError:
            # Without file locks it is unknown whether the writer is alive: leave the directory.
            continue
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, target: Path, before: tuple[int, ...] | None) -> None:
    """Renames `partial` to `target`, in place of an output with the identity `before` (None for nothing).

    Raises InputError if another process has written `target` since then.
    """
    # On the disk before the rename: after a power loss, an output under its final name has its contents.
    sync_tree(partial)
    aside, now = _beside(target, "old"), _identity(target)
    if now is not None:
        if now != before:
            raise _written_meanwhile(target)
        target.rename(aside)
    try:
        # The older output returns to its place if the rename fails and nothing else is at `target`.
        partial.rename(target)
    except BaseException as error:
        if now is not None and not os.path.lexists(target):
            aside.rename(target)
        if isinstance(error, OSError) and error.errno in _TAKEN:
            _remove(aside)
            raise _written_meanwhile(target) from None
        raise
    sync(target.parent)
    _remove(aside)


def _written_meanwhile(target: Path) -> InputError:
    return InputError(
        f"{target} was written by another process meanwhile: that output is kept, this one was removed", hint=_OTHER_OUT
    )


def _identity(path: Path) -> tuple[int, ...] | None:
    """Returns a key that changes if another output takes the place of the one at `path`; None if there is none.

    A new directory may reuse the inode of a removed one, so the key includes the inodes and times of the MARKS.
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
    """Returns a hidden name next to `target` that no other process uses."""
    return target.with_name(f".{_short(target.name)}.{kind}-{uuid.uuid4().hex}")


def _short(name: str) -> str:
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40] or "host"


def _existing(path: Path) -> Path:
    """Returns `path` or its nearest parent that exists and that is not temporary."""
    places = (path.absolute(), *path.absolute().parents)
    return next(place for place in places if not re.search(r"\.partial-|/\.bundle-", str(place)) and place.is_dir())


def _inodes_used_up(place: Path) -> bool:
    status = os.statvfs(place)
    # Some file systems report no inode counts at all (f_files is 0).
    return status.f_files > 0 and status.f_favail == 0 and status.f_bavail > 0


def _remove(path: Path) -> None:
    """Removes a directory, file or link. Errors while removing a directory are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return
