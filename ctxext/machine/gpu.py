"""GPUs that a process started here can train on, asked without torch: the one answer of plans, launches and refusals.

torch knows for certain, and takes seconds to import; `train/prepare.py` compares its answer with this one before it
trains. An answer here is made of three facts: what torch was built for, which GPUs the system shows, and which of them
the variables hide.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Build = Literal["cuda", "hip"] | None
ROOT = Path("/")
QUERY = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
NVIDIA_HIDES = ("CUDA_VISIBLE_DEVICES",)
AMD_HIDES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")  # HIP reads the last as well


def visible_gpus(environ: Mapping[str, str] = os.environ, root: Path | None = None) -> int:
    """How many GPUs torch will see here. 0 for a torch without CUDA and ROCm, and where the variables hide all."""
    build = torch_build()
    if build is None:
        return 0
    present = _amd(root or ROOT) if build == "hip" else _nvidia(root or ROOT)
    for name in AMD_HIDES if build == "hip" else NVIDIA_HIDES:
        if name in environ:
            present = min(present, len(_listed(environ[name])))
    return present


def first_gpu(environ: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """(name, MiB of memory) of the first visible GPU, "" and 0 where nvidia-smi does not say; None without a GPU."""
    if not visible_gpus(environ):
        return None
    rows = [[part.strip() for part in line.split(",")] for line in _smi(*QUERY)]
    rows = [row for row in rows if len(row) == 4]
    wanted = (_listed(environ.get("CUDA_VISIBLE_DEVICES", "")) or ["0"])[0]
    chosen = next((row for row in rows if row[0] == wanted or row[1].startswith(wanted)), rows[0] if rows else None)
    return ("", 0) if chosen is None else (chosen[2], int(chosen[3]) if chosen[3].isdigit() else 0)


@cache
def torch_build() -> Build:
    """What the installed torch was built for, read from its files; None for a CPU, and where there is no torch."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text("utf-8")
    except OSError:
        return None
    for build in ("cuda", "hip"):
        if re.search(rf"^{build}\b[^=\n]*= *['\"]", text, re.MULTILINE):
            return build
    return None


def _listed(variable: str) -> list[str]:
    """The devices that a variable names; the first one that is no device ends the list, as CUDA reads it."""
    names = list[str]()
    for name in (part.strip() for part in variable.split(",")):
        if not re.fullmatch(r"\d+|GPU-[\w-]+|MIG-[\w/-]+", name):
            break
        names.append(name)
    return names


def _nvidia(root: Path) -> int:
    """By the driver's files, or by nvidia-smi where there are none (Windows' Linux has none)."""
    by_driver = root / "proc/driver/nvidia/gpus"
    try:
        count = sum(1 for _ in by_driver.iterdir())
    except OSError:
        count = 0
    devices = root / "dev"
    count = count or sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    return count or sum(line.startswith("GPU ") for line in _smi("-L"))


def _amd(root: Path) -> int:
    """By the driver's list of nodes: a CPU is one, too, and has no SIMD units."""
    count = 0
    for path in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            text = path.read_text("utf-8")
        except OSError:
            continue
        count += re.search(r"^simd_count [1-9]", text, re.MULTILINE) is not None
    return count


def _smi(*arguments: str) -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    return () if command is None else _lines(command, *arguments)


@cache
def _lines(command: str, *arguments: str) -> tuple[str, ...]:
    try:
        found = subprocess.run([command, *arguments], capture_output=True, text=True, errors="replace")
    except OSError:
        return ()
    return tuple(found.stdout.splitlines())
