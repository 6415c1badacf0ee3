"""metrics.jsonl: one line a step, whatever happened between two of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import torch

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One line. Loss in nats a token, norm before clipping, memory in bytes, seconds of this step."""

    step: int
    loss: float
    learning_rate_factor: float
    gradient_norm: float
    gradient_scale: float
    tokens: int
    tokens_per_second: float
    memory: int
    seconds: float


class MetricsLog:
    """The file, with one line for each of the first `done` steps: what a killed run wrote beyond is cut off."""

    def __init__(self, run: Path, done: int, *, writes: bool = True):
        self.path, self.writes = run / FILE_NAME, writes
        self.file: IO[str] | None = None
        self.cut_back(done)

    def append(self, metrics: StepMetrics) -> None:
        """Write a line, at once; on ranks that do not write, nothing."""
        if self.file is not None:
            self.file.write(json.dumps(asdict(metrics)) + "\n")
            self.file.flush()

    def cut_back(self, done: int) -> None:
        """Forget the steps after `done`: they are going to be done again."""
        if not self.writes:
            return
        self.close()
        kept = [line for line in read(self.path.parent) if line["step"] <= done]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        self.file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; one that a kill cut in half is left out."""
    path, lines = run / FILE_NAME, list[dict[str, Any]]()
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def memory(device: torch.device) -> int:
    """Bytes in use: the process's resident set on a CPU, the allocator's peak on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
