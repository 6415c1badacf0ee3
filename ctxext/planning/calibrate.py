"""Measures this machine's rates in about twenty seconds and caches them for the user. Only measuring imports torch.

On a CPU with one thread the process's CPU time is used, so that other work on the machine does not change the result.
Otherwise the wall clock is used, and a GPU is synchronised. A rate comes from the median of a few repetitions, after
one warm-up that does not count. Results are as large as in a run, so that the cost of new memory is included.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config.output import write_whole
from ctxext.errors import EnvironmentFault
from ctxext.machine.cards import card_here
from ctxext.machine.gpu import default_device
from ctxext.machine.memory import memory
from ctxext.planning.cards import Rates, card_rates
from ctxext.planning.time import computed_pairs, norm_bytes
from ctxext.units import counted

if TYPE_CHECKING:
    import torch

FORMAT = 2
WIDTHS = {"cpu": (64, 256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192)}  # of matrices
ROWS = {"cpu": 8192, "cuda": 16_384}  # tokens of the multiplied input
LENGTH = {"cpu": 2048, "cuda": 32_768}  # tokens of the timed attention; S² in four groups
WINDOW, HEADS, HEAD_DIM = 128, 8, 64
STREAMED = {"cpu": (4096, 512, 1408), "cuda": (16_384, 4096, 11_008)}  # tokens, E, F of elementwise operations
COPIED = 256 * 1024**2  # entries copied to the host
REPETITIONS, SECONDS = 5, 1.5  # of one timed operation, at most


@dataclass(frozen=True)
class Calibration:
    """A measurement. `rates` are the fields of cards.Rates without `source` and `measured`."""

    machine: str
    device: str
    dtype: str
    threads: int
    torch: str
    date: str
    rates: dict[str, Any]

    def as_rates(self) -> Rates:
        """Returns the measured rates for a plan's estimates."""
        fields = self.rates | {
            **{
                name: tuple((int(width), float(rate)) for width, rate in self.rates[name])
                for name in ("linear", "adapters")
            },
            "attention": {kind: (float(f), float(b)) for kind, (f, b) in self.rates["attention"].items()},
        }
        threads = f", {counted(self.threads, 'thread')}" if self.device == "cpu" else ""
        source = f"this machine ({self.device}{threads}), measured {self.date[:10]} in {self.dtype}, torch {self.torch}"
        return Rates(**fields, source=source, measured=True)


def path() -> Path:
    """Returns the file of the calibrations, in the user's cache, next to the hashes of weights."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxext" / "calibration.json"


def stored(dtype: str, *, gpu: bool) -> Calibration | None:
    """Returns this machine's calibration for a dtype; None if there is none or if it cannot be read."""
    try:
        data = json.loads(path().read_text("utf-8"))
        found = data["machines"][_key(gpu, dtype)] if data["format"] == FORMAT else None
        calibration = None if found is None else Calibration(**found)
        if calibration is not None:
            # Convert once here: a file with wrong fields then counts as no calibration.
            calibration.as_rates()
        return calibration
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def rates_here(plan_dtype: str, *, packed: bool) -> tuple[Rates | None, int, bool]:
    """Returns (rates, bytes of memory, whether there is a GPU) of this machine.

    The rates are those of the calibration, otherwise those of the card that the machine has; None if both are unknown.
    """
    here = card_here()
    dtype = plan_dtype if plan_dtype != "auto" else "float32" if here is None else "bfloat16"
    known = stored(dtype, gpu=here is not None)
    size = here[1] if here else memory().total
    if known is not None:
        return known.as_rates(), size, here is not None
    named = here[0] if here and dtype != "float32" else None  # the rates of cards are for bf16
    return None if named is None else card_rates(named, packed=packed), size, here is not None


def calibrate(say: Callable[[str], None] = lambda line: None) -> list[Calibration]:
    """Measures fp32 and bf16 here and stores both. Raises EnvironmentFault if the result cannot be stored."""
    import torch

    device = torch.device(default_device())
    found = list[Calibration]()
    for dtype in (torch.float32, torch.bfloat16):
        say(f"measuring {str(dtype)[6:]} on {device.type}")
        # fp32 is measured first, because adapters compute in fp32 under both dtypes.
        rates = _measured(device, dtype)
        found.append(
            Calibration(
                machine=platform.node(),
                device=device.type,
                dtype=str(dtype)[6:],
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                date=datetime.now(UTC).isoformat(timespec="seconds"),
                rates=rates | {"adapters": found[0].rates["linear"] if found else rates["linear"]},  # in fp32
            )
        )
    _store(found)
    return found


def _key(gpu: bool, dtype: str) -> str:
    return f"{platform.node()}/{'cuda' if gpu else 'cpu'}/{dtype}"


def _store(found: list[Calibration]) -> None:
    """Stores the calibrations atomically and keeps those of other machines."""
    try:
        known = json.loads(path().read_text("utf-8"))
        machines = dict(known["machines"]) if known["format"] == FORMAT else {}
    except (OSError, ValueError, LookupError, TypeError):
        machines = {}
    machines |= {_key(one.device == "cuda", one.dtype): asdict(one) for one in found}
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        write_whole(path(), json.dumps({"format": FORMAT, "machines": machines}, indent=1))
    except (OSError, EnvironmentFault) as error:
        raise EnvironmentFault(
            f"the calibration cannot be stored at {path()} ({error})",
            hint="free disk space there, or set XDG_CACHE_HOME to another directory",
        ) from None


def _measured(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    import torch

    kind, options = device.type, {"device": device, "dtype": dtype}
    linear = []
    for width in WIDTHS[kind]:
        # FLOP/s of a square matrix for each width; narrow matrices are slower.
        x, w = torch.randn(ROWS[kind], width, **options), torch.randn(width, width, **options)  # type: ignore[call-overload]
        linear.append((width, 2 * ROWS[kind] * width**2 / _median(partial(torch.matmul, x, w), device)))
    stream = _stream(device, dtype)
    host = stream
    if kind == "cuda":
        # Bytes/s from the GPU to pinned host memory; on a CPU the memory bandwidth stands in.
        a = torch.empty(COPIED, **options)  # type: ignore[call-overload]
        pinned = torch.empty(COPIED, dtype=dtype, pin_memory=True)
        host = a.element_size() * a.numel() / _median(lambda: pinned.copy_(a, non_blocking=True), device)
    return {
        "linear": linear,
        "attention": {name: _attention(name, device, dtype) for name in ("full", "s2", "sliding")},
        "stream": stream,
        "host": host,
        "link": host,
    }


def _stream(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of a norm, a SwiGLU and a residual, forward and backward, counted as in planning/time.py.

    The time includes what their functions compute and the cost of new memory.
    """
    import torch
    from torch.nn.functional import silu

    rows, E, F = STREAMED[device.type]
    x, g, u = (torch.randn(rows, n, device=device, dtype=dtype, requires_grad=True) for n in (E, F, F))
    w = torch.ones(E, device=device, dtype=dtype, requires_grad=True)

    def work() -> None:
        # The functions of a layer as transformers computes them: RMSNorm in fp32, residual, SwiGLU.
        wide = x.to(torch.float32)
        h = x + w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
        p = silu(g) * u
        torch.autograd.backward((h, p), (h.detach(), p.detach()))
        for one in (x, g, u, w):
            one.grad = None

    item = x.element_size()
    # Bytes of a forward; a backward moves twice as much, hence the factor of 3.
    counted = rows * ((norm_bytes(item) + 3 * item) * E + 5 * item * F)
    return 3 * counted / _median(work, device)


def _attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s forward and backward of a kind of layer, with the backend of a run, document mask included."""
    import torch

    from ctxext.ops.backends.choice import attention
    from ctxext.ops.cost import ModelShape
    from ctxext.ops.masks import Pattern

    T = LENGTH[device.type]
    G, W = (T // 4 if name == "s2" else None), (WINDOW if name == "sliding" else None)
    pattern = Pattern(W) if W else Pattern(None, G)
    shape = ModelShape(hidden_size=512, num_layers=1, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM,
                       intermediate_size=1, vocab_size=1, tied=False)  # fmt: skip
    # FLOPs of one matrix product over the computed pairs: forward has two, backward five.
    unit = 2 * HEAD_DIM * computed_pairs(shape, T, (W, G), gpu=device.type == "cuda")
    q, k, v = (
        torch.randn(1, T, HEADS, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    starts = torch.zeros(1, T, dtype=torch.int64)
    out: list[Any] = [None]

    def forward() -> None:
        out[0] = attention(q, k, v, pattern, document_starts=starts)

    gradient = torch.randn_like(q)
    once = _median(forward, device)
    back = _median(lambda: torch.autograd.grad(out[0], (q, k, v), gradient), device, before=forward)
    return 2 * unit / once, 5 * unit / back


def _median(work: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of the median repetition. `before` runs before each of them and is not timed."""
    import torch

    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def timed() -> float:
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return max(clock() - began, 1e-9)

    timed()
    # The first call above warms up and does not count.
    found = [timed()]
    while len(found) < REPETITIONS and sum(found) < SECONDS:
        found.append(timed())
    return statistics.median(found)
