"""Locks that keep two processes from writing one output or filling one cache at the same time.

They are advisory locks of the file system (flock). They end with the process that holds them, however it ends. A file
system without locks is taken as it is.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ctxext.errors import InputError

_PATIENCE, _PAUSE = 0.2, 0.02  # seconds that `hold` waits for a process that only looks whether a lock is free


def hold(file: IO[str] | int, out: Path, what: str) -> None:
    """Locks `file` until it is closed, so that no other process writes `out` at the same time.

    Raises InputError where another process has the lock. A file system without locks is taken as it is.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # A process that only asks whether the lock is free has it for less than a millisecond.
            if time.monotonic() >= until:
                raise busy(out, what) from None
            time.sleep(_PAUSE)
        except OSError:
            return


@contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Holds the lock of a directory that exists within the block. Raises InputError where another process has it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        hold(descriptor, directory, what)
        yield
    finally:
        os.close(descriptor)


def busy(out: Path, what: str) -> InputError:
    return InputError(f"{out} is being written by another {what}", hint="give another --out")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file or directory; False where there is none, or no lock can be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


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
