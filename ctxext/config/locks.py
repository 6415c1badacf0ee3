"""Locks that prevent two processes from writing one output or filling one cache at the same time.

They are advisory file system locks (flock). The system releases a lock when the process that holds it ends, however
it ends. On a file system without locks the code continues without locking.
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

_PATIENCE, _PAUSE = 0.2, 0.02  # seconds; how long `hold` waits for a process that only checks the lock, and its pause


def hold(file: IO[str] | int, out: Path, what: str) -> None:
    """Locks `file` until it is closed, so that no other process writes `out` at the same time.

    Raises InputError if another process has the lock. Returns without a lock on a file system without locks.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # A process in `is_locked` holds the lock for less than a millisecond: retry for a short time.
            if time.monotonic() >= until:
                raise busy(out, what) from None
            time.sleep(_PAUSE)
        except OSError:
            return


@contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Holds the lock of an existing directory within the block. Raises InputError if another process has it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        hold(descriptor, directory, what)
        yield
    finally:
        os.close(descriptor)


def busy(out: Path, what: str) -> InputError:
    # The error for an output whose lock another process has.
    return InputError(f"{out} is being written by another {what}", hint="give another --out")


def is_locked(path: Path) -> bool:
    """Checks whether a process holds the lock of a file or directory.

    Returns False if the path cannot be opened or the file system has no locks.
    """
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
    """Lets only one process at a time run the block for one lock file; later processes wait.

    The lock file is removed at the end. `waiting()` is called once, before this process waits.

    On a file system without locks the block runs without protection, so the caller must check again before it replaces
    existing files. Raises OSError if the lock file cannot be created.
    """
    waited = False
    while True:
        # Try without blocking first, so that `waiting` is called before the blocking attempt.
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
        # The previous holder may have removed the file while this process waited. A lock on a removed file protects
        # nothing, so check that the path still leads to the same file, and start again if it does not.
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
