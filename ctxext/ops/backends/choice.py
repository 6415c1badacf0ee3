"""Which backend serves a call. `auto` follows this table; a backend requested by name serves the call or raises.

    device   dtype        call                                  auto
    CPU      any          any                                   blocked
    GPU      fp32, fp64   any                                   blocked
    GPU      bf16, fp16   over cached keys (T < S)              blocked
    GPU      bf16, fp16   learned sinks                         blocked
    GPU      bf16, fp16   full or S², one document a row        blocked: few large causal calls, SDPA's best kernels
    GPU      bf16, fp16   sliding, or documents                 varlen where its kernel serves, else blocked

naive (the reference, O(T²) memory) and flex (not yet compared with varlen on a GPU) are used by name only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ctxext.errors import EnvironmentFault, InputError
from ctxext.ops.backends import blocked, flex, varlen
from ctxext.ops.masks import Pattern, lower_bounds
from ctxext.ops.naive_attention import naive_attention

Backend = Literal["auto", "naive", "blocked", "varlen", "flex"]


@dataclass(frozen=True)
class AttentionCall:
    """The properties of a call that decide its backend.

    device, dtype, head_dim   of q
    pattern                   what each query sees
    packed                    whether rows hold several documents
    cached                    whether T < S
    sink_logits               whether heads have learned sinks
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    pattern: Pattern = Pattern()
    packed: bool = False
    cached: bool = False
    sink_logits: bool = False


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    document_starts: Tensor | None = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes softmax(q kᵀ · scale) v over the keys that the pattern allows, with the chosen backend.

    The arguments are those of `blocked.attention`; `backend` is a name or `auto`. Raises as `choose` does.
    """
    packed, cached = document_starts is not None, q.shape[2] < k.shape[2]
    call = AttentionCall(q.device, q.dtype, q.shape[3], pattern, packed, cached, sink_logits is not None)
    chosen = choose(call, backend)
    if chosen == "naive":
        T, S = q.shape[2], k.shape[2]
        lo = lower_bounds(pattern, T, S=S, document_starts=document_starts, device=q.device)
        return naive_attention(
            q,
            k,
            v,
            lo,
            scale=scale,
            sink_tokens=pattern.sink_tokens,
            document_starts=document_starts,
            sink_logits=sink_logits,
        )
    if chosen == "blocked":
        return blocked.attention(
            q, k, v, pattern, document_starts=document_starts, scale=scale, sink_logits=sink_logits
        )
    # These two have no learned sinks; `choose` never picks them for a call with sink_logits.
    serve = {"varlen": varlen.attention, "flex": flex.attention}[chosen]
    return serve(q, k, v, pattern, document_starts=document_starts, scale=scale)


def choose(call: AttentionCall, backend: str = "auto") -> str:
    """Returns the name of the backend that serves a call.

    Raises InputError for an unknown backend, EnvironmentFault for a requested backend that cannot serve the call.
    """
    if backend not in get_args(Backend):
        raise InputError(f"attention backend {backend!r}: allowed are {', '.join(get_args(Backend))}")
    if backend != "auto":
        if why := _unsupported(backend, call):
            raise EnvironmentFault(
                f"attention.backend: {backend} cannot be used: {why}", hint="use auto, which chooses a backend that can"
            )
        return backend
    wants_varlen = call.packed or call.pattern.sliding_window is not None
    return "varlen" if wants_varlen and not _unsupported("varlen", call) else "blocked"


def _unsupported(backend: str, call: AttentionCall) -> str | None:
    """Returns why a backend cannot serve a call, None when it can."""
    if backend in ("naive", "blocked"):
        return None
    if call.device.type != "cuda":
        return f"it needs a GPU, but the tensors are on the {call.device.type}"
    if call.cached:
        return "it does not support cached keys"
    if call.sink_logits:
        return "it does not support learned sinks"
    if backend == "flex":
        return None
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    if call.head_dim % 8 or call.head_dim > 256:
        return f"it supports head dims up to 256 that are multiples of 8, not {call.head_dim}"
    if torch.cuda.get_device_capability(call.device) < (8, 0):
        return f"it needs compute capability 8.0, but {torch.cuda.get_device_name(call.device)} is older"
    if varlen.installed_kernel() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with windows, and flash-attn is missing"
    return None
