"""Checks the environment: versions, GPU, kernels, compilers, DeepSpeed's builds, disk and memory, the hub.

torch is imported inside functions. Not checked: whether a kernel computes the right numbers (`ctxext verify` measures
that on a model), whether FlexAttention compiles (it takes long), the other hosts of a run. The presence of a hub token
is reported, never the token itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ctxext.doctor.finding import Finding
from ctxext.machine.memory import memory
from ctxext.units import format_bytes, format_duration

PATIENCE = 2.0  # timeout of the hub in seconds
LOCK_AGE = 600  # seconds; no extension of DeepSpeed takes this long to build
LITTLE_DISK, LITTLE_MEMORY = 10 * 1024**3, 2 * 1024**3  # bytes; less free space than this is a warning


def environment() -> list[Finding]:
    """Returns all findings about this machine. Takes about three seconds, most of it the import of torch."""
    return [*_versions(), *_gpu(), *_kernels(), *_builds(), *_room(), *_hub()]


def _versions() -> list[Finding]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python = importlib.metadata.metadata("ctxext")["Requires-Python"] or ">=3.11"
    here = platform.python_version()
    fits = SpecifierSet(python).contains(here)
    found = [
        Finding("python", "ok" if fits else "failure", f"{here} ({python})", "" if fits else f"use Python {python}")
    ]
    good = []
    for text in importlib.metadata.requires("ctxext") or []:
        wanted = Requirement(text)
        optional = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        # Of the extras only `all` is read: the packages of the others are in it, or have no limits of their version.
        if optional and not wanted.marker.evaluate({"extra": "all"}):
            continue
        remedy = f"pip install '{wanted.name}{wanted.specifier}'"
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                found.append(Finding(wanted.name, "failure", "not installed", remedy))
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            status = "warning" if optional else "failure"
            found.append(Finding(wanted.name, status, f"{version}, outside {wanted.specifier}", remedy))
        good.append(f"{wanted.name} {version}" if wanted.specifier else wanted.name)
    return [*found, Finding("packages", "ok", f"installed: {', '.join(good)}")]


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        # A torch built for GPUs that finds none, although the driver's tools are installed, is a fault.
        built = torch.version.cuda or torch.version.hip
        if built and (shutil.which("nvidia-smi") or shutil.which("rocm-smi")):
            text = f"torch {torch.__version__} sees no GPU, but this machine has the tools of a driver"
            return [Finding("gpu", "failure", text, "check nvidia-smi, and that torch's CUDA fits the driver")]
        return [Finding("gpu", "ok", f"none for torch {torch.__version__}: everything runs on the CPU")]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}, {format_bytes(free)} of {format_bytes(total)} free"
        busy = free < total / 2
        remedy = "another process holds most of it (nvidia-smi lists them)" if busy else ""
        found.append(Finding(f"gpu {index}", "warning" if busy else "ok", text, remedy))
    return found


def _kernels() -> list[Finding]:
    """Runs the backends blocked and varlen of ops/backends once on a small call. FlexAttention is not compiled."""
    import torch

    from ctxext.errors import CtxextError
    from ctxext.ops.backends.choice import attention
    from ctxext.ops.masks import Pattern

    gpu = torch.cuda.is_available()
    where, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    q = torch.zeros(1, 2, 256, 64, device=where, dtype=dtype)
    found = []
    for backend in ("blocked", "varlen"):
        try:
            attention(q, q, q, Pattern(128), backend=backend)
            found.append(Finding(f"kernel {backend}", "ok", f"ran on the {where}"))
        except CtxextError as error:
            # The backend refused the call. On a CPU that is expected: most kernels need a GPU.
            text, remedy = error.message.rpartition(": ")[2], "pip install flash-attn, or a newer torch" if gpu else ""
            found.append(Finding(f"kernel {backend}", "warning" if gpu else "ok", f"not used: {text}", remedy))
        except Exception as error:  # a kernel that was built for another torch may raise anything
            text = f"installed but broken: {type(error).__name__}: {str(error)[:200]}"
            found.append(Finding(f"kernel {backend}", "failure", text, "install it again for this torch and CUDA"))
    # FlexAttention needs triton; only its presence is checked.
    triton = find_spec("triton") is not None
    text = (
        ("triton is installed; the kernel is not compiled here" if triton else "no triton")
        if gpu
        else "not used: it needs a GPU"
    )
    lacks = gpu and not triton
    found.append(Finding("kernel flex", "warning" if lacks else "ok", text, "pip install triton" if lacks else ""))
    # flash-attn is a compiled package: it can be installed and still fail at its import.
    if find_spec("flash_attn") is None:
        return [*found, Finding("flash-attn", "ok", "not installed; torch's own varlen kernel is used instead")]
    try:
        import flash_attn
    except Exception as error:
        text = f"installed, but its import fails: {type(error).__name__}: {error}"
        return [
            *found,
            Finding("flash-attn", "failure", text, "pip install --force-reinstall flash-attn, or remove it"),
        ]
    return [*found, Finding("flash-attn", "ok", str(flash_attn.__version__))]


def _builds() -> list[Finding]:
    """Checks the compilers that DeepSpeed's offloading and torch.compile use, and locks left by killed builds."""
    import torch

    compiler = next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name
                     and (path := shutil.which(name))), None)  # fmt: skip
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"))
    gpu = torch.cuda.is_available()
    lacks = gpu and not nvcc
    cuda = "install the CUDA toolkit to let DeepSpeed build for the GPU" if lacks else ""
    gxx = "" if compiler else "install g++: --zero 2_offload, --zero 3_offload and flex need it"
    found = [
        Finding("C++ compiler", "ok" if compiler else "warning", compiler or "none", gxx),
        Finding("nvcc", "warning" if lacks else "ok", nvcc or "none", cuda),
    ]
    # A killed build leaves its lock file, and every later build of this extension waits for it.
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = [path for path in root.glob("**/lock") if path.is_file()]
    for lock in locks:
        age = time.time() - lock.stat().st_mtime
        old = age > LOCK_AGE
        text = f"{lock} is {format_duration(age)} old" + ("" if old else ": a build may be running")
        remedy = (
            f"rm {lock}: every build of {lock.parent.name} waits for this lock forever"
            if old
            else "wait, then look again"
        )
        found.append(Finding("DeepSpeed builds", "failure" if old else "warning", text, remedy))
    return found if locks else [*found, Finding("DeepSpeed builds", "ok", f"no lock under {root}")]


def _room() -> list[Finding]:
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    found = []
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for name, place in (("disk here", Path.cwd()), ("disk of the hub's cache", hub), ("disk of ctxext's cache", own)):
        # A cache that does not exist yet will be on the disk of its nearest existing parent.
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        little = free < LITTLE_DISK
        remedy = "free some space, or give --out (HF_HOME for the cache) on another disk" if little else ""
        found.append(Finding(name, "warning" if little else "ok", f"{format_bytes(free)} free ({there})", remedy))
        if not os.access(there, os.W_OK):
            found.append(
                Finding(name, "failure", f"{there} cannot be written", "give --out or HF_HOME on another disk")
            )
    here = memory()
    little = here.available < LITTLE_MEMORY
    text = f"{format_bytes(here.available)} of {format_bytes(here.total)} available"
    remedy = "close programs that use memory: every model is first loaded here" if little else ""
    return [*found, Finding("memory", "warning" if little else "ok", text, remedy)]


def _hub(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    from huggingface_hub import get_token

    token = "a token is present" if get_token() else "no token (`hf auth login`; public models need none)"
    if environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return [Finding("hub", "ok", f"not checked: HF_HUB_OFFLINE is set; {token}")]
    endpoint = environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer: list[str] = []
    # In a thread, since the timeout of urlopen does not limit the name lookup.
    thread = Thread(target=_ask, args=(endpoint, answer), daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    problem = answer[0] if answer else f"no answer in {PATIENCE + 1:g} s"
    if problem == "":
        return [Finding("hub", "ok", f"{endpoint} answers; {token}")]
    remedy = "give local directories instead of hub ids; set HF_HUB_OFFLINE=1 if this is intended"
    return [Finding("hub", "warning", f"{endpoint} cannot be reached ({problem}); {token}", remedy)]


def _ask(endpoint: str, answer: list[str]) -> None:
    # Appends "" where the hub answers, else the reason. An HTTP error is an answer, too.
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=PATIENCE).close()
        answer.append("")
    except HTTPError:
        answer.append("")
    except (OSError, ValueError) as error:
        answer.append(str(getattr(error, "reason", error)))
