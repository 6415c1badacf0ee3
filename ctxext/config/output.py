"""Outputs that appear whole or not at all: written beside their place, renamed into it at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ctxext.errors import EnvironmentFault, InputError
from ctxext.units import format_bytes

MARKS = ("ctxext.json", "spec.yaml", "request.json", "pipeline.json")  # one is in all that ctxext wrote or began
_ELSEWHERE = "give another --out"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# The Rust of safetensors and tokenizers wraps the operating system's error in its own.
_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded")


@contextmanager
def staged_output(out: Path, force: bool = False) -> Iterator[Path]:
    """A new directory to write into, which becomes `out` when the block ends and is removed when it fails.

    It stands beside `out` as `.<name>.partial-<pid>`, so that the rename at the end copies nothing. With
    `force` an older `out` is replaced at that moment and not before. A killed process leaves its partial
    directory behind.

    Raises:
        InputError: `out` exists (without `force`), or is a place that `force` must not replace.
        EnvironmentFault: the disk is full, or the place cannot be written.
    """
    out = Path(out)
    check_free(out, force)
    target = out.absolute()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made = [path for path in target.parents if not path.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        _put_in_place(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for path in made:
            _remove_if_empty(path)
        fault = environment_fault(error, out)
        if fault is None:
            raise
        raise fault from error


def write_whole(path: Path, data: str | bytes) -> None:
    """A file that is there whole or not at all, over what was there. Its directory has to exist.

    What is written beside it has a name of its own: containers that share a directory have the same process ids.
    """
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_free(out: Path, force: bool = False, keep: Iterable[Path | None] = ()) -> None:
    """Refuses an `out` that `staged_output` would refuse; call it before long work.

    `keep` are paths the work reads from: an `out` that is or holds one of them is refused, `force` or not; so is a
    directory that ctxext did not write, unless it is empty.
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
    if out.is_symlink() or not out.is_dir() or not any(out.iterdir()):
        return
    if not any((out / mark).is_file() for mark in MARKS):
        raise InputError(f"{out} is nothing that ctxext wrote: even --force does not replace it", hint=_ELSEWHERE)


def _put_in_place(partial: Path, target: Path) -> None:
    if not os.path.lexists(target):
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink()


def environment_fault(error: BaseException, out: Path) -> EnvironmentFault | None:
    """What an error of the disk or its permissions says about the environment; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or any(text in str(error) for text in _FULL_TEXTS):
        place = next(path for path in out.absolute().parents if path.exists())
        free = format_bytes(shutil.disk_usage(place).free)
        return EnvironmentFault(f"the disk of {place} is full ({free} free)", hint=f"make room, or {_ELSEWHERE}")
    if number in _CLOSED and isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return EnvironmentFault(f"cannot write {out}: {error.strerror}{where}", hint=_ELSEWHERE)
    return None


def _remove_if_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return


@contextmanager
def replacing(out: Path, force: bool, keep: Iterable[Path | None] = ()) -> Iterator[None]:
    """Room for an output that grows in its place: an older one (with `force`) is put aside, and comes back when the
    block fails and leaves nothing at `out`."""
    check_free(out, force, keep)
    aside = out.absolute().with_name(f".{out.absolute().name}.old-{os.getpid()}")
    if os.path.lexists(out):
        out.rename(aside)
    try:
        yield
    finally:
        if aside.exists() and not os.path.lexists(out):
            aside.rename(out)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def alone_at(lock: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block no other process has the same lock file; one that comes later waits. The file is removed.

    `waiting()` is called once, before this process waits.

    A file system without locks is taken as it is: nothing is kept from anybody, and the caller looks again before it
    replaces what is there. Raises OSError where the file cannot be made.
    """
    waited = False
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waited else fcntl.LOCK_NB))
        except BlockingIOError:
            waited = True
            waiting()
            os.close(descriptor)
            continue
        except OSError:
            break
        # The process before may have removed the file while this one waited for it: then it locks nothing.
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def hold(file: IO[str] | int, out: Path, what: str) -> None:
    """Keep others from going on with `out` meanwhile; a file system without locks is taken as it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out} is being written by another {what}", hint="give another --out") from None
    except OSError:
        return
