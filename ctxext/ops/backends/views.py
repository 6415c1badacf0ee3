"""Strided views of a row of tokens, whose gradients are summed in one buffer.

Shapes: N tokens, H heads, D head dim, n blocks of one view, L tokens in a block.

Plain slices would cost nothing in the forward pass either. But the backward pass of each slice makes a full-size tensor
of zeros, and a concatenation copies the outputs once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctxext.ops.backends.segments import Heads


class Blocks(NamedTuple):
    """`n` blocks of `length` tokens from token `start` on, each with the `back` tokens before it.

    With back > 0 the blocks overlap; then n is 1, or back is a multiple of length.
    """

    start: int
    n: int
    length: int
    back: int = 0

    @property
    def tokens(self) -> int:
        """Returns the number of tokens of the blocks themselves, without `back`."""
        return self.n * self.length

    def of(self, x: Tensor) -> Tensor:
        """Returns the view of x [N,H,D]: [n, H, back + length, D]."""
        token, head, dim = x.stride()
        size = (self.n, x.shape[1], self.back + self.length, x.shape[2])
        offset = x.storage_offset() + (self.start - self.back) * token
        return x.as_strided(size, (self.length * token, head, token, dim), offset)


View = tuple[Heads, Blocks]


def cut(x: Tensor, views: list[View]) -> tuple[Tensor, ...]:
    """Returns one [n, heads, back + L, D] of x [N,H,D] for each view, without a copy; views may overlap."""
    return _Cut.apply(x, views)


def join(parts: list[Tensor], views: list[View], shape: Sequence[int]) -> Tensor:
    """Inverts `cut` for views that cover [N,H,D] exactly once: writes parts [n, heads, L, D] into one tensor."""
    return _Join.apply(shape, views, *parts)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, views: list[View]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.views = x.shape, views
        return tuple(blocks.of(x[:, h0:h1]) for (h0, h1), blocks in views)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dx = grads[0].new_zeros(ctx.shape)
        for ((h0, h1), (start, n, length, back)), grad in zip(ctx.views, grads, strict=True):
            # Blocks of a view may overlap, and an in-place add on overlapping memory is undefined. So each block is
            # split into pieces of `width` tokens: the k-th pieces of all blocks do not overlap.
            width = length if n > 1 else back + length
            for offset in range(0, back + length, width):
                target = Blocks(start - back + offset, n, width)
                target.of(dx[:, h0:h1]).add_(grad[:, :, offset : offset + width])
        return dx, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], views: list[View], *parts: Tensor) -> Tensor:
        ctx.views = views
        out = parts[0].new_empty(shape)
        for ((h0, h1), blocks), part in zip(views, parts, strict=True):
            blocks.of(out[:, h0:h1]).copy_(part)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(blocks.of(grad[:, h0:h1]) for (h0, h1), blocks in ctx.views)
