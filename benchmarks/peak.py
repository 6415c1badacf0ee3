"""How many bytes a piece of work holds at most, beyond what was held before it."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

import psutil
import torch

M_MMAP_THRESHOLD = -3  # malloc.h


def held_at_most(work: Callable[[], float], gpu: bool) -> tuple[int, float]:
    """(bytes, what `work` returns): the allocator's peak on a GPU, on a CPU the largest rise of the resident set.

    That is sampled every 2 ms, with every block of 64 KiB or more mapped afresh, so that nothing is reused unseen
    (glibc); the work is slower for it.
    """
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before, result
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    libc.malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    seen = [before]

    def watch() -> None:
        while not done.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 1024**2)
    return max(seen) - before, result
