"""metrics.jsonl and validation.jsonl: one line a step, or a validation, whatever happened between two of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import torch

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
    """A file of a run with lines of the first `done` steps: what a killed run wrote beyond is cut off."""

    def __init__(self, path: Path, done: int, *, writes: bool = True):
        self.path, self.writes = path, writes
        self.file: IO[str] | None = None
        self.cut_back(done)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line, which has its `step`, at once; on ranks that do not write, nothing."""
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def cut_back(self, done: int) -> None:
        """Forget the steps after `done`: they are going to be done again."""
        if not self.writes:
            return
        self.close()
        kept = [line for line in read(self.path) if line["step"] <= done]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        self.file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file; one that a kill cut in half is left out."""
    lines = list[dict[str, Any]]()
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: the process's resident set on a CPU, the allocator's peak on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_flops(device: torch.device, dtype: str) -> float:
    """A device's dense bf16 peak in FLOP/s; 0 where it is not known, or the run's `dtype` (of the spec) is another."""
    if device.type != "cuda" or dtype == "float32":
        return 0.0
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device), 0.0)
