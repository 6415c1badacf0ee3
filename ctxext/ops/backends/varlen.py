"""FlashAttention over segments of any length: one call for each half of the heads. For GPUs, in bf16 and fp16.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head dim, N = B * T tokens.

The kernel takes all tokens of a batch in one row, and `cu_seqlens`: where each segment starts, then where the last one
ends. The segments are those of `segments.py`: rows, documents or S² groups. T = 10, G = 4:

    unshifted  |q q q q|q q q q|q q|    cu_seqlens 0 4 8 10        shifted  |q q|q q q q|q q q q|    0 2 6 10

With sink tokens a new row is gathered, in which the sink tokens of its document come before each segment. The outputs
of these sink tokens are dropped.

The kernel applies the window itself, within each segment. It counts the keys before the query. So a window of W keys,
the query itself included, is (W - 1, 0), and causal attention without a window is (-1, 0). No padding and no mask
tensor are used.

The kernel is `torch.nn.attention.varlen` (torch 2.11 or newer, which has windows), or else that of flash-attn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ctxext.errors import EnvironmentFault
from ctxext.ops.backends.segments import check_shapes, head_halves, segment_bounds, segment_sinks
from ctxext.ops.masks import Pattern, lower_bounds


class Arguments(NamedTuple):
    """The kernel's arguments for one half of the heads.

    cu_seqlens  int32 [segments + 1]
    longest     tokens of the longest segment
    left        keys that a query sees before itself; -1: all
    tokens      with sink tokens: the row that the kernel gets, as indices into all N tokens, [M]; else None
    rows        with sink tokens: the position of each token in that row, [N]; else None
    """

    cu_seqlens: Tensor
    longest: int
    left: int
    tokens: Tensor | None = None
    rows: Tensor | None = None


Kernel = Callable[[Tensor, Tensor, Tensor, Arguments, float], Tensor]  # q [N,h,D], k and v [N,g,D] -> [N,h,D]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    document_starts: Tensor | None = None,
    scale: float | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Computes the same as `blocked.attention`, for T = S: q [B,H,T,D], k and v [B,K,T,D] -> [B,H,T,D].

    `kernel` None uses the installed kernel. Raises EnvironmentFault when no kernel is installed.
    """
    check_shapes(q, k, v, document_starts)
    kernel = kernel or installed_kernel()
    if kernel is None:
        raise EnvironmentFault("no varlen kernel is installed", hint="torch 2.11 or newer on a GPU has one")
    (B, H, T, D), K = q.shape, k.shape[1]
    halves = head_halves(pattern, H, K)
    qs = _by_heads(q, [h1 - h0 for (h0, h1), _ in halves])
    # With one key/value head both halves use the same head, so it cannot be split between them.
    gs = [g1 - g0 for _, (g0, g1) in halves]
    ks, vs = (_by_heads(x, gs) if sum(gs) == K else [x.transpose(1, 2).reshape(B * T, K, D)] * 2 for x in (k, v))
    parts = []
    for half, (qi, ki, vi) in enumerate(zip(qs, ks, vs, strict=True)):
        # Both calls cache their result: `_unpacked` by shape, `_packed` by the document_starts tensor.
        if document_starts is None:
            arguments = _unpacked(pattern, half, B, T, q.device)
        else:
            arguments = _packed(pattern, half, B, T, document_starts, q.device)
        # With sink tokens, gather the longer row [M,h,D], and afterwards select the N outputs of the tokens themselves.
        if arguments.tokens is not None:
            qi, ki, vi = (x[arguments.tokens] for x in (qi, ki, vi))
        out = kernel(qi, ki, vi, arguments, D**-0.5 if scale is None else scale)
        parts.append(out if arguments.rows is None else out[arguments.rows])
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out.view(B, T, H, D).transpose(1, 2)


def arguments_of(
    pattern: Pattern, half: int, B: int, T: int, document_starts: Tensor | None, device: torch.device
) -> Arguments:
    """Returns the kernel's arguments for one half of the heads; `document_starts` [B,T] is on the CPU."""
    # Segments come from documents and groups alone; the kernel applies the window within them.
    lo = lower_bounds(replace(pattern, sliding_window=None), T, document_starts=document_starts)
    bounds = segment_bounds(lo, half, B, T)
    left = -1 if pattern.sliding_window is None else pattern.sliding_window - 1
    if not pattern.sink_tokens:
        return Arguments(bounds.to(device, torch.int32), int(torch.diff(bounds).max()), left)
    first, counts = segment_sinks(pattern, bounds[:-1], T, document_starts)
    lengths = torch.diff(bounds)
    # Each segment is widened by its sink tokens on the left.
    wider = torch.cat((bounds[:1], (lengths + counts).cumsum(0)))  # where the widened segments start
    # Each token moves right by the sink tokens of its own segment and of those before it.
    rows = torch.arange(B * T) + torch.repeat_interleave(counts.cumsum(0), lengths)
    # Fill each widened segment with indices counted from its first sink token, which are right for the sink tokens
    # only. The second line then writes the segment's own tokens.
    tokens = torch.repeat_interleave(first - wider[:-1], lengths + counts) + torch.arange(int(wider[-1]))
    tokens[rows] = torch.arange(B * T)
    longest = int(torch.diff(wider).max())
    return Arguments(wider.to(device, torch.int32), longest, left, tokens.to(device), rows.to(device))


@lru_cache(maxsize=32)
def _unpacked(pattern: Pattern, half: int, B: int, T: int, device: torch.device) -> Arguments:
    # The cached tensors may be used in training later, where inference tensors are not allowed.
    with torch.inference_mode(False):
        return arguments_of(pattern, half, B, T, None, device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed(pattern: Pattern, half: int, B: int, T: int, document_starts: Tensor, device: torch.device) -> Arguments:
    """Returns `arguments_of`, computed once for all layers that get the same tensor, recomputation included."""
    # An inference tensor has no version counter, so a change in place would not be noticed: do not cache.
    if document_starts.is_inference():
        return arguments_of(pattern, half, B, T, document_starts.cpu(), device)
    known: dict[Any, Arguments] = _PACKED.setdefault(document_starts, {})
    key = pattern, half, device, document_starts._version
    if key not in known:
        known[key] = arguments_of(pattern, half, B, T, document_starts.cpu(), device)
    return known[key]


_PACKED: Any = WeakTensorKeyDictionary()  # document_starts -> its arguments, as long as that tensor exists


def _by_heads(x: Tensor, heads: list[int]) -> tuple[Tensor, ...]:
    """Splits [B,H,T,D] into one [N,h,D] for each part of the heads; no copy where x is laid out [B,T,H,D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).split(heads, dim=1)


@lru_cache(maxsize=1)
def installed_kernel() -> Kernel | None:
    """Returns torch's kernel where it takes windows, else that of flash-attn, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _flash_attn()
    known = signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():  # torch 2.10 has a causal flag only
        return _flash_attn()

    def run(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, scale: float) -> Tensor:
        cu, longest, left = arguments[:3]
        options: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
        if "enable_gqa" in known:  # torch 2.12; earlier versions need equal numbers of heads
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, **options)  # a tuple only where aux is requested
        return out

    return run


def _flash_attn() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, scale: float) -> Tensor:
        cu, longest, left = arguments[:3]
        options: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (left, 0 if left >= 0 else -1),
        }
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)

    return run
