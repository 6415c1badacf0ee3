"""metrics.jsonl and validation.jsonl: one line a step, or a validation, whatever happened between two of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ctxext.config.output import disk_faults, write_whole
from ctxext.errors import EnvironmentFault
from ctxext.units import counted

STEPS, VALIDATIONS = "metrics.jsonl", "validation.jsonl"
PEAK_FLOPS = {  # dense bf16, FLOP/s: NVIDIA's data sheets (of the 4090, the Ada whitepaper) by torch's device name
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H200": 989e12,  # SXM
    "NVIDIA GeForce RTX 4090": 165e12,
}


@dataclass(frozen=True)
class StepMetrics:
    """One line. Loss in nats a token, norm before clipping, memory in bytes, seconds of this step.

    tokens             trained on so far, in all contexts
    flops_per_second   by the plan's count, recomputation included; beside a matmul's rate it is the utilisation
    mfu                model FLOPs utilisation: the share of all devices' peak, recomputation not counted; None, and
                       left out of the file, where the peak is not known
    """

    step: int
    loss: float
    learning_rate_factor: float
    gradient_norm: float
    gradient_scale: float
    tokens: int
    tokens_per_second: float
    flops_per_second: float
    memory: int
    seconds: float
    mfu: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The numbers that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class JsonLines:
    """A file of a run with lines of the first `done` steps: what a killed run wrote beyond is cut off.

    A full disk does not end the run: lines wait in memory, `say` gets one warning, and every later line tries again.
    """

    def __init__(self, path: Path, done: int, *, writes: bool = True, say: Callable[[str], None] = lambda line: None):
        self.path, self.writes, self.say = path, writes, say
        self._file: int | None = None
        self._waiting, self._warned = b"", False
        self.cut_back(done)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line, which has its `step`, at once; on ranks that do not write, nothing."""
        if self._file is not None:
            self._waiting += json.dumps(line).encode() + b"\n"
            self._try()

    def cut_back(self, done: int) -> None:
        """Forget the steps after `done`: they are going to be done again."""
        if not self.writes:
            return
        self.close()
        data = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(raw + b"\n" for raw, line in _lines(data) if line["step"] <= done)
        if data.startswith(kept):
            # A prefix is kept by cutting the file, which needs no room. A kill leaves it as it was, or cut.
            if len(kept) < len(data):
                os.truncate(self.path, len(kept))
        else:
            write_whole(self.path, kept)
        with disk_faults(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def close(self) -> None:
        """Close the file. What a full disk keeps from being written is said to be lost."""
        if self._file is None:
            return
        self._try()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            self.say(f"warning: {self.path} lacks the last {counted(lines, 'line')}: the disk is full")
        os.close(self._file)
        self._file, self._waiting = None, b""

    def flush(self) -> None:
        """Write what waits. Raises EnvironmentFault where the disk is full.

        The file stays a beginning of all lines, whatever part of them a full disk takes.
        """
        if self._file is None:
            return
        with disk_faults(self.path):
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]

    def _try(self) -> None:
        """Write what waits, or warn once that it waits."""
        try:
            self.flush()
            self._warned = False
        except EnvironmentFault as fault:
            if not self._warned:
                self.say(f"warning: {self.path.name} is not written for now: {fault.message}")
            self._warned = True


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file; one that a kill cut in half is left out."""
    return [line for _, line in _lines(path.read_bytes())] if path.exists() else []


def _lines(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file as they are written and as they are read."""
    found = list[tuple[bytes, dict[str, Any]]]()
    for raw in data.splitlines():
        try:
            found.append((raw, json.loads(raw)))
        except ValueError:
            continue
    return found


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: the process's resident set on a CPU, the allocator's peak on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_flops(device: torch.device, dtype: str) -> float:
    """A device's dense bf16 peak in FLOP/s; 0 where it is not known, or the run's `dtype` (of the spec) is another."""
    if device.type != "cuda" or dtype == "float32":
        return 0.0
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device), 0.0)
