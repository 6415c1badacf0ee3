"""Seconds and bytes of one way to compute attention, and of what the machine can do at most.

Shapes: T tokens, H heads, D head dim; q, k, v and the output's gradient are [1, H, T, D], laid out [1, T, H, D].
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from peak import held_at_most
from torch import Tensor

from ctxext.errors import CtxextError

H, D = 8, 64
BUDGET = 12.0  # seconds for the repetitions of one way: the quick ones get all that were asked for, the slowest one
BATCH_GPU = 0.05  # seconds of work that a GPU gets in one repetition, so that waiting for it does not count
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """One row of the tables.

    make       what is made before the clock starts (masks: a model makes them once for all of its layers), from q
    family     the rows that compute the same pattern: "S²", "S² fixed", "sliding", "dense", "documents"
    needed     bytes beyond a few tensors of T tokens, from T, bytes of an item and whether there is a backward
    compiles   runs once more before anything is measured
    """

    make: Callable[[Tensor], Attention]
    family: str
    needed: Callable[[int, int, bool], int] = lambda T, item, backward: 0
    compiles: bool = False


class Run(NamedTuple):
    """Median seconds of `repetitions`, and the bytes held at most beyond the inputs."""

    seconds: float
    memory: int
    repetitions: int


Cell = Run | str  # a str says why there is no number


def inputs(T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output, laid out [1, T, H, D] in memory as projections are."""
    return [torch.randn(1, T, H, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(4)]


def step(attention: Attention, tensors: list[Tensor], backward: bool, calls: int = 1) -> float:
    """Seconds of one forward, or of one forward and backward: the mean of `calls` in a row."""
    q, k, v, weight = tensors
    if backward:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    wait(q)
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        for _ in range(calls):
            out = attention(q, k, v)
            if backward:
                torch.autograd.grad(out, (q, k, v), weight)
    wait(q)
    return (time.perf_counter() - began) / calls


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def peak_memory(way: Way, tensors: list[Tensor], backward: bool) -> tuple[int, float]:
    """Bytes held at most beyond what was held before, masks and their making included; and the seconds it took."""
    return held_at_most(lambda: step(way.make(tensors[0]), tensors, backward), tensors[0].is_cuda)


def available_memory(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


class Plan(NamedTuple):
    memory: int
    repetitions: int
    calls: int  # in one repetition


def first_run(way: Way, tensors: list[Tensor], backward: bool, most: int) -> Plan | str:
    """Warm up, take the memory, and decide how often to repeat; or the reason why this way has no numbers here."""
    q = tensors[0]
    needed = way.needed(q.shape[2], q.element_size(), backward)
    if needed > 0.9 * available_memory(q.device.type):
        return f"does not fit ({needed / 2**30:.0f} GiB)"
    try:
        if way.compiles or q.is_cuda:
            step(way.make(q), tensors, backward)
        memory, seconds = peak_memory(way, tensors, backward)
    except torch.OutOfMemoryError:
        return "does not fit (out of memory)"
    except CtxextError as refused:
        return f"not available: {refused}"
    except (RuntimeError, ImportError) as error:
        return "not available: " + (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:120]
    calls = max(1, min(20, int(BATCH_GPU / seconds))) if q.is_cuda else 1
    return Plan(memory, max(1, min(most, round(BUDGET / seconds / calls))), calls)


def measure(ways: dict[str, Way], tensors: list[Tensor], backward: bool, most: int) -> dict[str, Cell]:
    """{name: numbers or why there are none}: a first run each, then the ways in turn, `most` times at most."""
    torch._dynamo.reset()  # each length is compiled for itself; what was compiled for others would only be in the way
    torch._dynamo.config.recompile_limit = 64
    plans = {name: first_run(way, tensors, backward, most) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(most):
        for name, plan in plans.items():
            if isinstance(plan, Plan) and repetition < plan.repetitions:
                seconds[name].append(step(ways[name].make(tensors[0]), tensors, backward, plan.calls))
    return {
        name: plan if isinstance(plan, str) else Run(statistics.median(seconds[name]), plan.memory, plan.repetitions)
        for name, plan in plans.items()
    }


def copy_bandwidth() -> float:
    """Bytes a second that the GPU reads and writes while it copies 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source))


def matmul_flops() -> float:
    """FLOP/s of a bf16 matmul of two matrices 8,192 x 8,192."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b)


def _fastest(work: Callable[[], object], calls: int = 10) -> float:
    """Seconds of one call, the best of six series."""
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / calls)
    return best
