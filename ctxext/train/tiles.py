"""Computes one decoder layer in tiles of tokens, in the forward and again in the backward pass; keeps only its input.

Shapes: B batch, T tokens, E model width, F MLP width, W window, G group, t tokens of an MLP tile.

A layer has two halves, h = x + attention(norm(x)) and y = h + mlp(norm(h)). The MLP half works on each token alone, so
any t tokens are a tile. The attention half of tokens [start, end) also needs x of the earlier tokens that they see,
[begin, start) with begin <= start. These tokens are the halo; their outputs are not used. The attention half is
computed in tiles of at least t tokens:

    sliding layers    max(t, W) tokens, halo W - 1
    S² layers         t rounded up to a multiple of G, halo G // 2; at most G - 1 where documents restart the groups
    full layers       the whole row, no halo: only their MLP is tiled

    x, dx [B,T,E]     |    .    .    .    |    .    .    .    |    .    .
                                   begin  start              end
    attention half                  |~~~~~~|===================|             ~ halo: keys and values, outputs unused
    MLP half                               |====|====|====|====|             t tokens each
    dx is added to                  |++++++++++++++++++++++++++|

where begin is the smallest of the mask's lower bounds at `start` (ops/masks.py), so it is exact for every pattern. The
document starts of a tile are relative to its first token, and negative for documents that began before the tile.

The forward pass keeps only x. The backward pass takes the attention tiles in turn. It computes the attention half again
from x[begin:end]; then it computes and differentiates the MLP tiles one by one; then it differentiates the attention
half. So the MLP of a token is computed twice in all, and the attention half of a token in a halo up to four times.
Besides x, dy and dx the work memory is that of one tile: O(t F), and O(tile E) for the attention half, or O(T E) for
full layers. Gradients of parameters are summed over the tiles, in fp32 where their dtype is narrower. Autograd gets
the sums once, as from any other operation, so hooks run once.

Not done: ZeRO-3, which gathers a module's parameters in hooks, and second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ctxext.errors import ModelError
from ctxext.ops.masks import Pattern, lower_bounds

CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]  # for the forward pass, for the backward


class Tile(NamedTuple):
    """The tokens [start, end) of a row, computed from the tokens [begin, end)."""

    begin: int
    start: int
    end: int


def fits(layer: nn.Module) -> bool:
    """Returns whether a layer consists of the two halves above and nothing else, judged by its children's names."""
    return {name for name, _ in layer.named_children()} == CHILDREN and not list(layer.parameters(recurse=False))


def run(
    layer: nn.Module, pattern: Pattern, tokens: int, keep: Callable[[], Contexts] | None, call: Any, x: Tensor
) -> Tensor:
    """Computes a checkpointed layer, in place of transformers' function: x [B,T,E] -> y [B,T,E], the value of call(x).

    `call` is a partial of the layer's forward; its keywords are the layer's arguments other than x. `keep` makes the
    contexts of torch's selective checkpoint, one pair for each attention tile; None: nothing is kept. `pattern` says
    whether the layer has a window; the groups are those of the call, since they may change from step to step. Raises
    ModelError for keywords that cannot be cut into tiles.
    """
    keywords = call.keywords
    if keywords.get("attention_mask") is not None:
        raise ModelError("padding cannot be cut into tiles", hint="leave memory.tiles out, or use unpadded rows")
    if keywords.get("sink_tokens"):
        raise ModelError("tiles do not hold the first tokens of a document", hint="set attention.sinks=0")
    # model/attention.py groups the layers without a window, by the arguments of this call.
    if pattern.sliding_window is None:
        pattern = Pattern(None, keywords.get("group_size"), keywords.get("shift"))
    tiles = tiles_of(pattern, x.shape[1], tokens, keywords.get("document_starts"))
    work = _Work(layer, keywords, tokens, tiles, keep)
    # The trainable parameters are arguments of the operation, so that autograd accepts their gradients.
    y: Tensor = _Tiled.apply(x, work, *work.in_attention, *work.in_mlp)
    return y


def tiles_of(pattern: Pattern, T: int, tokens: int, document_starts: Tensor | None) -> list[Tile]:
    """Returns the attention half's tiles of a row; document_starts [B,T]. The module's table gives the tile size."""
    if pattern.sliding_window is not None:
        size = max(tokens, pattern.sliding_window)
    elif pattern.group_size is not None:
        size = -(-tokens // pattern.group_size) * pattern.group_size
    else:
        size = T
    tiles = []
    for start in range(0, T, size):
        # One query at `start` over the keys up to it: its lower bound, over all rows and heads, begins the halo.
        at = None if document_starts is None else document_starts[:, start : start + 1]
        begin = int(lower_bounds(pattern, 1, S=start + 1, document_starts=at).min())
        tiles.append(Tile(begin, start, min(start + size, T)))
    return tiles


def cut(keywords: dict[str, Any], tile: Tile, B: int, T: int) -> dict[str, Any]:
    """Returns a layer's keyword arguments for the tokens [begin, end) of a tile.

    Tensors whose second axis is T are cut; document starts become relative to `begin`. Raises ModelError for a tensor
    of another shape.
    """
    if (tile.begin, tile.end) == (0, T):
        return keywords

    def part(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(part(name, one) for one in value)
        if not isinstance(value, Tensor):
            return value
        if value.ndim < 2 or value.shape[1] != T:
            raise ModelError(f"{name} of shape {list(value.shape)} cannot be cut into tiles of {T} tokens")
        return value[:, tile.begin : tile.end]

    own = {name: part(name, value) for name, value in keywords.items()}
    # The cut tensors start at `begin`, so document starts move by as much. S² groups are counted from them.
    starts = own.get("document_starts")
    if starts is None:  # one document, which began `begin` tokens ago
        starts = torch.zeros(B, tile.end - tile.begin, dtype=torch.int64) if tile.begin else None
    return own if starts is None else own | {"document_starts": starts - tile.begin}


class _Work:
    """One call of one layer: its forward pass, and its backward pass with the recomputation."""

    def __init__(
        self,
        layer: Any,
        keywords: dict[str, Any],
        tokens: int,
        tiles: Sequence[Tile],
        keep: Callable[[], Contexts] | None,
    ):
        self.layer, self.keywords, self.tokens, self.tiles, self.keeps = layer, keywords, tokens, tiles, bool(keep)
        self.contexts = [keep() if keep else (nullcontext(), nullcontext()) for _ in tiles]
        self.in_attention = _trainable(layer.input_layernorm, layer.self_attn)
        self.in_mlp = _trainable(layer.post_attention_layernorm, layer.mlp)

    def attention_half(self, tile: Tile, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,T,E] -> (a leaf with the values of x[begin:end], its h); with gradients on, both require one."""
        own = cut(self.keywords, tile, x.shape[0], x.shape[1])
        leaf = x[:, tile.begin : tile.end].detach().requires_grad_(torch.is_grad_enabled())
        h = leaf + self.layer.self_attn(hidden_states=self.layer.input_layernorm(leaf), **own)[0]
        return leaf, h

    def mlp_half(self, h: Tensor) -> Tensor:
        return h + self.layer.mlp(self.layer.post_attention_layernorm(h))

    def mlp_tiles(self, tile: Tile) -> Iterator[tuple[slice, slice]]:
        """Yields the MLP tiles of an attention tile without its halo: (slice of the row, slice of the tile)."""
        for start in range(tile.start, tile.end, self.tokens):
            end = min(start + self.tokens, tile.end)
            yield slice(start, end), slice(start - tile.begin, end - tile.begin)

    def forward(self, x: Tensor) -> Tensor:
        y = None
        for tile, (computing, _) in zip(self.tiles, self.contexts, strict=True):
            # With `keep`, gradients are on, because kernels leave the logsumexp out where nothing requires a gradient.
            # The graph made here is dropped. The identity hooks keep what it saves from `HostInputs`.
            with computing, torch.set_grad_enabled(self.keeps), saved_tensors_hooks(_same, _same):
                h = self.attention_half(tile, x)[1].detach()  # [B,end-begin,E]
            for row, own in self.mlp_tiles(tile):
                part = self.mlp_half(h[:, own])
                y = part.new_empty(x.shape) if y is None else y
                y[:, row] = part
        return y

    def backward(self, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Returns dx [B,T,E] and the gradient of each trainable parameter of the two halves."""
        in_attention, in_mlp = self.in_attention, self.in_mlp
        dx, sums = torch.zeros_like(x), _Sums([*in_attention, *in_mlp])
        for tile, (_, again) in zip(self.tiles, self.contexts, strict=True):
            with again, torch.enable_grad():
                leaf, h = self.attention_half(tile, x)
            dh = torch.zeros_like(h)  # [B,end-begin,E]; stays zero in the halo
            # Each MLP tile has its own graph, from a leaf. It is differentiated at once, so only one exists at a time.
            for row, own in self.mlp_tiles(tile):
                part = h[:, own].detach().requires_grad_()
                with torch.enable_grad():
                    y = self.mlp_half(part)
                dh[:, own], *found = torch.autograd.grad(y, (part, *in_mlp), dy[:, row], allow_unused=True)
                sums.add(found, len(in_attention))
            # Tokens in a halo belong to several tiles: their gradients add up in dx.
            gradient, *found = torch.autograd.grad(h, (leaf, *in_attention), dh, allow_unused=True)
            dx[:, tile.begin : tile.end] += gradient
            sums.add(found, 0)
        return dx, sums.gradients()


class _Sums:
    """Gradients of parameters, summed over tiles, in fp32 where their dtype is narrower; None where there is none."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters, self.sums = parameters, list[Tensor | None]([None] * len(parameters))

    def add(self, gradients: Sequence[Tensor | None], first: int) -> None:
        for i, gradient in enumerate(gradients, first):
            if gradient is None:
                continue
            before, wide = self.sums[i], torch.promote_types(gradient.dtype, torch.float32)
            self.sums[i] = gradient.to(wide, copy=True) if before is None else before.add_(gradient)

    def gradients(self) -> list[Tensor | None]:
        return [None if s is None else s.to(p.dtype) for s, p in zip(self.sums, self.parameters, strict=True)]


class _Tiled(torch.autograd.Function):
    """The layer as one autograd operation of its input and of its trainable parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: _Work, *parameters: Tensor) -> Tensor:
        ctx.work, ctx.autocast = work, _autocast(x.device.type)
        ctx.save_for_backward(x)
        with ctx.autocast():
            return work.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors  # read only once: with `offload`, each read fetches it from the host
        with ctx.autocast():
            dx, gradients = ctx.work.backward(x, dy)
        return dx, None, *gradients


def _trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of the modules."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _autocast(device: str) -> Callable[[], AbstractContextManager]:
    """Returns a function that makes contexts with the current autocast state and no cache.

    Without a cache, what is cast for a tile is freed with the tile.
    """
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _same(x: Tensor) -> Tensor:
    return x
