"""Finds the GPUs that a process started here can train on, without torch; plans, launches and checks all use it.

torch gives the exact answer, but takes seconds to import. `train/prepare.py` compares torch's answer with this one
before training. The answer follows from three facts: what torch is built for, which GPUs the system shows, and which of
them environment variables hide.
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
    """Returns how many GPUs torch will see: 0 for a torch without CUDA and ROCm, and where variables hide all GPUs."""
    build = torch_build()
    if build is None:
        return 0
    present = _amd(root or ROOT) if build == "hip" else _nvidia(root or ROOT)
    for name in AMD_HIDES if build == "hip" else NVIDIA_HIDES:
        if name in environ:
            present = min(present, len(_listed(environ[name])))
    return present


def first_gpu(environ: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Returns (name, MiB of memory) of the first visible GPU; None without a GPU.

    The name is "" and the memory 0 where nvidia-smi does not report them.
    """
    if not visible_gpus(environ):
        return None
    rows = [[part.strip() for part in line.split(",")] for line in _smi(*QUERY)]
    rows = [row for row in rows if len(row) == 4]
    # CUDA_VISIBLE_DEVICES names a GPU by index or by the start of its UUID.
    wanted = (_listed(environ.get("CUDA_VISIBLE_DEVICES", "")) or ["0"])[0]
    chosen = next((row for row in rows if row[0] == wanted or row[1].startswith(wanted)), rows[0] if rows else None)
    return ("", 0) if chosen is None else (chosen[2], int(chosen[3]) if chosen[3].isdigit() else 0)


def default_device() -> Literal["cuda", "cpu"]:
    """Returns the device that a model is used on where none is given: the first GPU of torch, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def torch_build() -> Build:
    """Returns what the installed torch is built for, read from its version.py; None for a CPU, and without torch."""
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
    """Returns the devices that a variable names; as in CUDA, the first invalid name ends the list."""
    names = list[str]()
    for name in (part.strip() for part in variable.split(",")):
        if not re.fullmatch(r"\d+|GPU-[\w-]+|MIG-[\w/-]+", name):
            break
        names.append(name)
    return names


def _nvidia(root: Path) -> int:
    """Counts NVIDIA GPUs: from the driver's and the device files, or with nvidia-smi where there are none (WSL)."""
    by_driver = root / "proc/driver/nvidia/gpus"
    try:
        count = sum(1 for _ in by_driver.iterdir())
    except OSError:
        count = 0
    devices = root / "dev"
    count = count or sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    return count or sum(line.startswith("GPU ") for line in _smi("-L"))


def _amd(root: Path) -> int:
    """Counts AMD GPUs in the driver's list of nodes; a CPU is also a node, but has no SIMD units."""
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
