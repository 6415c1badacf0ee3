"""The cgroups of this process, version 1 and 2, as seen in the file system of this mount namespace."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path("/")


@dataclass(frozen=True)
class Level:
    """One cgroup: its directory, and the cgroup version of its files."""

    directory: Path
    version: Literal[1, 2]


def levels(controller: str, root: Path = ROOT) -> list[Level]:
    """Returns the cgroups of `controller` that contain this process, from its own up to the highest visible one.

    The list is empty where there are none, or where proc cannot be read. It has both versions where both are mounted.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = list[Level]()
    for line in groups:
        # A line is ID:controllers:path; version 2 has no controllers.
        number_, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        version: Literal[1, 2] = 2 if number_ == "0" and not names else 1
        if version == 1 and controller not in names.split(","):
            continue
        # The first matching mount is enough: all mounts of a controller show one hierarchy.
        for within, place in _mounts(mounts, version, controller):
            found += _upwards(root / place.lstrip("/"), path, within, version)
            break
    return found


def _mounts(lines: list[str], version: int, controller: str) -> list[tuple[str, str]]:
    """Returns (root of the mount in its hierarchy, mount point) of every cgroup mount of a version and controller."""
    found = []
    # A mountinfo line is fields, " - ", then type, source and options; fields 3 and 4 are the root and the mount point.
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" if version == 2 else kind[0] == "cgroup" and controller in kind[2].split(","):
            found.append((_unescaped(fields[3]), _unescaped(fields[4])))
    return found


def _upwards(place: Path, path: str, within: str, version: Literal[1, 2]) -> list[Level]:
    """Returns the cgroup at `path` and those above it; `within` is the part of the hierarchy mounted at `place`."""
    relative = os.path.relpath(path, within)
    # Without a cgroup namespace, the path of a container can lie outside its mount. Then the mount itself is the
    # container's own cgroup.
    directory = place if relative.startswith("..") else place / relative
    directory = directory if directory.is_dir() else place
    every = [directory, *directory.parents]
    return [Level(one, version) for one in every[: every.index(place) + 1]]


def _unescaped(text: str) -> str:
    """Replaces octal escapes: mountinfo writes a space as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def number(path: Path) -> int | None:
    """Returns the number in a file; None for `max`, -1, and a file that cannot be read."""
    try:
        value = int(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if value >= 0 else None


def table(path: Path) -> dict[str, int]:
    """Returns the numbers of a file with lines `name value`; empty where it cannot be read."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def cores(root: Path = ROOT) -> int:
    """Returns the number of cores that this process may use, at least 1.

    It is the smaller of the number of cores in the process's affinity and the lowest CPU quota of its cgroups, rounded
    up.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share for level in levels("cpu", root) if (share := _quota(level)) is not None]
    return max(1, min([bound, *(math.ceil(share) for share in shares)]))


def _quota(level: Level) -> float | None:
    """Returns the CPU quota of one cgroup in cores; None for no limit."""
    if level.version == 2:
        # cpu.max is "QUOTA PERIOD" in microseconds, or "max PERIOD".
        try:
            words = (level.directory / "cpu.max").read_text("utf-8").split()
        except OSError:
            return None
        return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() and int(words[1]) else None
    quota, period = number(level.directory / "cpu.cfs_quota_us"), number(level.directory / "cpu.cfs_period_us")
    return quota / period if quota and period else None
