"""What a container may use: from directory trees as kernels show them, and from a real cgroup where one can be made."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from ctxext.machine.cgroups import cores, levels
from ctxext.machine.memory import is_out_of_memory, memory

GIB, MIB = 1024**3, 1024**2
V1_UNLIMITED = 9223372036854771712  # what version 1 says for no limit


def tree(root: Path, cgroup: str, mounts: list[tuple[str, str, str]], files: dict[str, str]) -> Path:
    """A file system with /proc/self/cgroup, mounts (root in the hierarchy, mount point, kind) and files of cgroups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    lines = [
        f"{30 + i} 23 0:{28 + i} {within} {place} rw,relatime - {kind}"
        for i, (within, place, kind) in enumerate(mounts)
    ]
    (root / "proc/self/mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/vda rw", *lines]) + "\n")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_the_host_where_there_is_no_cgroup(tmp_path):
    host = psutil.virtual_memory()
    assert memory(tmp_path).total == host.total
    assert abs(memory(tmp_path).available - host.available) < host.total / 4


def test_version_2_in_a_container_of_its_own_namespace(tmp_path):
    """docker run --memory 1g: the container sees itself as the root of the hierarchy."""
    place = "sys/fs/cgroup"
    statistics = (
        f"anon {100 * MIB}\nfile {500 * MIB}\nactive_file {200 * MIB}\ninactive_file {250 * MIB}\nshmem {50 * MIB}"
    )
    root = tree(tmp_path, "0::/\n", [("/", "/sys/fs/cgroup", "cgroup2 cgroup rw")], {
        f"{place}/memory.max": GIB, f"{place}/memory.high": "max", f"{place}/memory.current": 600 * MIB,
        f"{place}/memory.stat": statistics,
    })  # fmt: skip
    found = memory(root)
    # 600 MiB in use, of which 450 MiB are file cache; tmpfs (shmem) is not given back.
    assert found.total == GIB and found.available == GIB - 150 * MIB


@pytest.mark.parametrize("lowest", ["job", "step", "leaf"])
def test_version_2_takes_the_lowest_limit_of_the_hierarchy(tmp_path, lowest):
    """A scheduler's job, its step, a process group in it: any of them may be the one that limits."""
    places = {"job": "sys/fs/cgroup/job", "step": "sys/fs/cgroup/job/step", "leaf": "sys/fs/cgroup/job/step/leaf"}
    files = {f"{place}/memory.max": GIB if name == lowest else "max" for name, place in places.items()}
    files |= {f"{place}/memory.current": 100 * MIB for place in places.values()}
    root = tree(tmp_path, "0::/job/step/leaf\n", [("/", "/sys/fs/cgroup", "cgroup2 cgroup rw")], files)
    assert memory(root).total == GIB and memory(root).available == GIB - 100 * MIB


def test_what_other_processes_of_the_same_job_use_is_not_available(tmp_path):
    """The leaf has room, the job that it shares with others has none left."""
    job, leaf = "sys/fs/cgroup/job", "sys/fs/cgroup/job/leaf"
    root = tree(tmp_path, "0::/job/leaf\n", [("/", "/sys/fs/cgroup", "cgroup2 cgroup rw")], {
        f"{job}/memory.max": GIB, f"{job}/memory.current": GIB + MIB, f"{leaf}/memory.max": GIB // 2,
        f"{leaf}/memory.current": MIB,
    })  # fmt: skip
    assert memory(root).total == GIB // 2 and memory(root).available == 0


def test_memory_high_is_a_limit(tmp_path):
    place = "sys/fs/cgroup/a"
    root = tree(tmp_path, "0::/a\n", [("/", "/sys/fs/cgroup", "cgroup2 cgroup rw")], {
        f"{place}/memory.max": 2 * GIB, f"{place}/memory.high": GIB, f"{place}/memory.current": 0,
    })  # fmt: skip
    assert memory(root).total == GIB


def test_version_1_with_the_hosts_paths(tmp_path):
    """docker without a cgroup namespace: /proc/self/cgroup has the host's path, the mount begins at it."""
    place, own = "sys/fs/cgroup/memory", "/docker/0123abcd"
    files = {f"{place}/memory.limit_in_bytes": GIB, f"{place}/memory.usage_in_bytes": 700 * MIB,
             f"{place}/memory.stat": f"total_active_file {300 * MIB}\ntotal_inactive_file {300 * MIB}"}  # fmt: skip
    mounts = [(own, "/sys/fs/cgroup/memory", "cgroup cgroup rw,memory")]
    root = tree(tmp_path, f"9:name=systemd:{own}\n4:memory:{own}\n1:cpu,cpuacct:{own}\n0::/\n", mounts, files)
    assert memory(root).total == GIB and memory(root).available == GIB - 100 * MIB


def test_version_1_without_a_limit_and_a_path_outside_the_mount(tmp_path):
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED}
    mounts = [("/kubepods/pod1/own", "/sys/fs/cgroup/memory", "cgroup cgroup rw,memory")]
    root = tree(tmp_path, "4:memory:/kubepods/pod2/other\n", mounts, files)
    assert [level.directory for level in levels("memory", root)] == [root / "sys/fs/cgroup/memory"]
    assert memory(root).total == psutil.virtual_memory().total


def test_both_versions_at_once_and_files_that_cannot_be_read(tmp_path):
    mounts = [("/", "/sys/fs/cgroup/unified", "cgroup2 cgroup2 rw"),
              ("/", "/sys/fs/cgroup/my\\040memory", "cgroup cgroup rw,memory")]  # fmt: skip
    files = {"sys/fs/cgroup/my memory/a/memory.limit_in_bytes": GIB, "sys/fs/cgroup/unified/a/cgroup.procs": "1",
             "sys/fs/cgroup/my memory/memory.limit_in_bytes": "nonsense"}  # fmt: skip
    root = tree(tmp_path, "4:memory:/a\n0::/a\nnot a line\n", mounts, files)
    assert memory(root).total == GIB


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4)])
def test_cores_by_the_time_that_a_container_has(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    mounts = [("/", "/sys/fs/cgroup", "cgroup2 cgroup rw")]
    assert cores(tree(tmp_path, "0::/a\n", mounts, {"sys/fs/cgroup/a/cpu.max": quota})) == expected


def test_cores_of_version_1(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    place = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{place}/a/cpu.cfs_quota_us": 300_000, f"{place}/a/cpu.cfs_period_us": 100_000,
             f"{place}/cpu.cfs_quota_us": -1, f"{place}/cpu.cfs_period_us": 100_000}  # fmt: skip
    mounts = [("/", "/sys/fs/cgroup/cpu,cpuacct", "cgroup cgroup rw,cpu,cpuacct")]
    assert cores(tree(tmp_path, "3:cpu,cpuacct:/a\n", mounts, files)) == 3


CHILD = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from ctxext.machine.memory import memory
found = memory()
held = bytearray(os.urandom(1)) * (64 * 1024**2)
later = memory()
cache = Path(sys.argv[2], "file")
cache.write_bytes(bytes(32 * 1024**2))
print(found.total, found.available, later.available, memory().available)
"""


def test_a_real_limit_is_seen(tmp_path):
    """Version 1 or 2, whichever this machine lets a test make a group of."""
    parents = [
        level
        for level in levels("memory")
        if os.access(level.directory, os.W_OK)
        and (level.version == 1 or "memory" in (level.directory / "cgroup.subtree_control").read_text().split())
    ]
    if not parents:
        pytest.skip("no cgroup for memory can be made here")
    group = parents[-1].directory / f"ctxext-test-{uuid.uuid4().hex[:8]}"
    limit = group / ("memory.max" if parents[-1].version == 2 else "memory.limit_in_bytes")
    try:
        group.mkdir()
        limit.write_text(f"{512 * MIB}")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup for memory can be made here: {error}")
    try:
        words = [sys.executable, "-c", CHILD, str(group), str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    finally:
        group.rmdir()
    total, available, later, cached = (int(word) for word in done.stdout.split())
    assert total == 512 * MIB and 300 * MIB < available < 512 * MIB
    # What the process holds is gone; what it wrote to a file is cache, and can be taken back.
    assert 60 * MIB < available - later < 80 * MIB and abs(later - cached) < 16 * MIB


def test_what_says_that_memory_ran_out():
    for error in (
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried"),
        RuntimeError("[enforce fail] can't allocate memory"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
