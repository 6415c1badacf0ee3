"""Memory that this process may use: the host's, or less where a container or a job scheduler sets a limit (cgroups).

Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.high, memory.current, memory.stat) and
cgroup-v1/memory.rst (memory.limit_in_bytes, memory.usage_in_bytes, memory.stat). Swap is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from ctxext.machine.cgroups import Level, levels, number, table

ROOT = Path("/")
FILE_CACHE = ("active_file", "inactive_file")  # memory that the kernel can reclaim; without tmpfs
# Texts of exceptions: of the CPU allocator; of a driver and NCCL; of cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Memory:
    """Memory in bytes: `total` is the host's memory or the lowest limit, `available` is what can still be allocated."""

    total: int
    available: int


def memory(root: Path = ROOT) -> Memory:
    """Returns the memory that this process may use.

    It is the minimum over the host and every cgroup that contains this process. File cache in a cgroup counts as free.
    `root` is the root of the file system that contains proc and the cgroups.
    """
    host = psutil.virtual_memory()
    total, available = int(host.total), int(host.available)
    for level in levels("memory", root):
        if (limit := _limit(level)) is not None:
            total = min(total, limit)
            available = min(available, max(0, limit - _used(level)))
    return Memory(total, available)


def _limit(level: Level) -> int | None:
    """Returns the limit of one cgroup in bytes, None without a limit."""
    names = ("memory.max", "memory.high") if level.version == 2 else ("memory.limit_in_bytes",)
    found = [limit for name in names if (limit := number(level.directory / name)) is not None]
    return min(found, default=None)


def _used(level: Level) -> int:
    """Returns the bytes in use that are not reclaimable file cache."""
    name, prefix = ("memory.current", "") if level.version == 2 else ("memory.usage_in_bytes", "total_")
    statistics = table(level.directory / "memory.stat")
    cache = sum(statistics.get(f"{prefix}{kind}", 0) for kind in FILE_CACHE)
    return max(0, (number(level.directory / name) or 0) - cache)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception reports out of memory: torch's on a GPU, its allocator's or Python's on a CPU."""
    named = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    return named or isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
