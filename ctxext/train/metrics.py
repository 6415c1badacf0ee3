"""metrics.jsonl and validation.jsonl: one line per step or validation, also across kills, rollbacks and resumes."""

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
from ctxext.machine.cards import CARDS, card_named
from ctxext.units import counted

STEPS, VALIDATIONS = "metrics.jsonl", "validation.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Loss in nats a token, norm before clipping, memory in bytes, seconds of this step.

    tokens             trained on so far, in all contexts
    flops_per_second   by the plan's count, recomputation included; divided by a matmul's rate it is the utilisation
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
        """Returns the numbers that are known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class JsonLines:
    """A file of a run with lines of the first `done` steps; later lines, which a killed run wrote, are removed.

    A full disk does not end the run: lines wait in memory, `say` gets one warning, and each later line tries again.
    """

    def __init__(self, path: Path, done: int, *, writes: bool = True, say: Callable[[str], None] = lambda line: None):
        self.path, self.writes, self.say = path, writes, say
        self._file: int | None = None
        self._waiting, self._warned = b"", False
        self.cut_back(done)

    def append(self, line: dict[str, Any]) -> None:
        """Writes a line at once. The line must have a `step`. Does nothing on ranks that do not write."""
        if self._file is not None:
            self._waiting += json.dumps(line).encode() + b"\n"
            self._try()

    def cut_back(self, done: int) -> None:
        """Removes the lines of the steps after `done`, which the run will repeat."""
        if not self.writes:
            return
        self.close()
        data = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(raw + b"\n" for raw, line in _lines(data) if line["step"] <= done)
        if data.startswith(kept):
            # Truncating needs no disk space. A kill leaves the file either as it was or truncated.
            if len(kept) < len(data):
                os.truncate(self.path, len(kept))
        else:
            write_whole(self.path, kept)
        with disk_faults(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def close(self) -> None:
        """Closes the file. Lines that a full disk did not accept are lost, which is logged."""
        if self._file is None:
            return
        self._try()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            self.say(f"warning: {self.path} lacks the last {counted(lines, 'line')}: the disk is full")
        os.close(self._file)
        self._file, self._waiting = None, b""

    def flush(self) -> None:
        """Writes the waiting lines. Raises EnvironmentFault where the disk is full.

        The file always holds a prefix of all lines, even where a full disk accepts only a part of them.
        """
        if self._file is None:
            return
        with disk_faults(self.path):
            # os.write may write less than it gets: keep the rest.
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]

    def _try(self) -> None:
        """Writes the waiting lines, or warns once that they wait."""
        try:
            self.flush()
            self._warned = False
        except EnvironmentFault as fault:
            if not self._warned:
                self.say(f"warning: {self.path.name} cannot be written at present: {fault.message}")
            self._warned = True


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSON lines file, none if it is missing; lines that a kill cut short are skipped."""
    return [line for _, line in _lines(path.read_bytes())] if path.exists() else []


def _lines(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file: (the bytes, the parsed line)."""
    found = list[tuple[bytes, dict[str, Any]]]()
    for raw in data.splitlines():
        try:
            found.append((raw, json.loads(raw)))
        except ValueError:
            continue
    return found


def memory_in_use(device: torch.device) -> int:
    """Returns the bytes in use: the process's resident set on a CPU, the allocator's peak on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_flops(device: torch.device, dtype: str) -> float:
    """Returns a device's dense bf16 peak in FLOP/s; 0 where it is unknown or the spec's `dtype` is float32."""
    if device.type != "cuda" or dtype == "float32":
        return 0.0
    card = card_named(torch.cuda.get_device_name(device))
    return 0.0 if card is None else CARDS[card].peak
