"""One decoder layer in tiles of tokens, forward and again in the backward pass; its input alone is kept between.

Shapes: B batch, T tokens, E model width, F MLP width, W window, G group, t tokens of an MLP tile.

A layer is two halves, h = x + attention(norm(x)) and y = h + mlp(norm(h)). The MLP half looks at one token at a time,
so any t tokens are a tile. The attention half of tokens [start, end) needs x of the tokens that they see, from
begin <= start on: the halo, whose outputs are not used. It is computed in tiles of at least t tokens:

    sliding layers    max(t, W) tokens, halo W - 1
    S² layers         t rounded up to a multiple of G, halo G // 2; at most G - 1 where documents restart the groups
    full layers       the whole row, no halo: their MLP alone is tiled

    x, dx [B,T,E]     |    .    .    .    |    .    .    .    |    .    .
                                   begin  start              end
    attention half                  |~~~~~~|===================|             ~ halo: keys and values, outputs unused
    MLP half                               |====|====|====|====|             t tokens each
    dx is added to                  |++++++++++++++++++++++++++|

where begin is the smallest of the mask's lower bounds at `start` (ops/masks.py), exact whatever made the bound. A tile
knows where it lies by document starts relative to its own first token, negative for documents that began before it.

Forward nothing but x is kept. Backward each attention tile is computed again from x[begin:end], then its MLP tiles
one by one, each differentiated at once, then the attention half. So a token passes the MLP twice in all; those in a
halo pass the attention half up to four times. Besides x, dy and dx the work memory is that of one tile: O(t F) and
the attention half's O(tile E), or O(T E) for full layers. Gradients of parameters are summed over the tiles, in fp32
where they are narrower, and handed to autograd once, as those of any other operation: hooks see them once.

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
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]  # to compute in, and to compute again in


class Tile(NamedTuple):
    """Tokens [start, end), computed from [begin, end)."""

    begin: int
    start: int
    end: int


def fits(layer: nn.Module) -> bool:
    """Whether a layer is made of the two halves above and nothing else, as far as its children tell."""
    return {name for name, _ in layer.named_children()} == CHILDREN and not list(layer.parameters(recurse=False))


def run(
    layer: nn.Module, pattern: Pattern, tokens: int, keep: Callable[[], Contexts] | None, call: Any, x: Tensor
) -> Tensor:
    """What transformers calls for a checkpointed layer: x [B,T,E] -> y [B,T,E], as call(x) gives it.

    `call` is a partial of the layer's forward whose keywords are what the layer is given beside x. `keep` makes the
    contexts of torch's selective checkpoint, a pair for each attention tile; None: nothing is kept. `pattern` says
    whether the layer has a window; groups are those of the call, which may change from step to step. Raises ModelError
    for keywords that cannot be cut into tiles.
    """
    keywords = call.keywords
    if keywords.get("attention_mask") is not None:
        raise ModelError("padding cannot be cut into tiles", hint="leave memory.tiles out, or pack whole sequences")
    if keywords.get("sink_tokens"):
        raise ModelError("tiles do not hold the first tokens of a document", hint="set attention.sinks=0")
    if pattern.sliding_window is None:  # model/attention.py groups layers without a window, by what this call is given
        pattern = Pattern(None, keywords.get("group_size"), keywords.get("shift"))
    tiles = tiles_of(pattern, x.shape[1], tokens, keywords.get("document_starts"))
    work = _Work(layer, keywords, tokens, tiles, keep)
    y: Tensor = _Tiled.apply(x, work, *work.in_attention, *work.in_mlp)
    return y


def tiles_of(pattern: Pattern, T: int, tokens: int, document_starts: Tensor | None) -> list[Tile]:
    """The attention half's tiles of a row; document_starts [B,T]. The tile size is adapted as the table above says."""
    if pattern.sliding_window is not None:
        size = max(tokens, pattern.sliding_window)
    elif pattern.group_size is not None:
        size = -(-tokens // pattern.group_size) * pattern.group_size
    else:
        size = T
    tiles = []
    for start in range(0, T, size):
        at = None if document_starts is None else document_starts[:, start : start + 1]
        begin = int(lower_bounds(pattern, 1, S=start + 1, document_starts=at).min())
        tiles.append(Tile(begin, start, min(start + size, T)))
    return tiles


def cut(keywords: dict[str, Any], tile: Tile, B: int, T: int) -> dict[str, Any]:
    """A layer's keyword arguments for the tokens [begin, end): tensors [.., T, ..] are cut, starts become relative."""
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
    starts = own.get("document_starts")
    if starts is None:  # one document, which began `begin` tokens ago
        starts = torch.zeros(B, tile.end - tile.begin, dtype=torch.int64) if tile.begin else None
    return own if starts is None else own | {"document_starts": starts - tile.begin}


class _Work:
    """One call of one layer: how to compute it, and how to compute and differentiate it again."""

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
        """x [B,T,E] -> a leaf that is x[begin:end], and its h; both require a gradient where gradients are on."""
        own = cut(self.keywords, tile, x.shape[0], x.shape[1])
        leaf = x[:, tile.begin : tile.end].detach().requires_grad_(torch.is_grad_enabled())
        h = leaf + self.layer.self_attn(hidden_states=self.layer.input_layernorm(leaf), **own)[0]
        return leaf, h

    def mlp_half(self, h: Tensor) -> Tensor:
        return h + self.layer.mlp(self.layer.post_attention_layernorm(h))

    def mlp_tiles(self, tile: Tile) -> Iterator[tuple[slice, slice]]:
        """The MLP tiles of an attention tile, as slices of the row and of the attention tile."""
        for start in range(tile.start, tile.end, self.tokens):
            end = min(start + self.tokens, tile.end)
            yield slice(start, end), slice(start - tile.begin, end - tile.begin)

    def forward(self, x: Tensor) -> Tensor:
        y = None
        for tile, (computing, _) in zip(self.tiles, self.contexts, strict=True):
            # kernels leave the logsumexp out where nothing requires a gradient; the graph made here is dropped
            with computing, torch.set_grad_enabled(self.keeps), saved_tensors_hooks(_same, _same):
                h = self.attention_half(tile, x)[1].detach()
            for row, own in self.mlp_tiles(tile):
                part = self.mlp_half(h[:, own])
                y = part.new_empty(x.shape) if y is None else y
                y[:, row] = part
        return y

    def backward(self, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """dx [B,T,E], and the gradient of each parameter of the two halves."""
        in_attention, in_mlp = self.in_attention, self.in_mlp
        dx, sums = torch.zeros_like(x), _Sums([*in_attention, *in_mlp])
        for tile, (_, again) in zip(self.tiles, self.contexts, strict=True):
            with again, torch.enable_grad():
                leaf, h = self.attention_half(tile, x)
            dh = torch.zeros_like(h)  # stays zero in the halo
            for row, own in self.mlp_tiles(tile):
                part = h[:, own].detach().requires_grad_()
                with torch.enable_grad():
                    y = self.mlp_half(part)
                dh[:, own], *found = torch.autograd.grad(y, (part, *in_mlp), dy[:, row], allow_unused=True)
                sums.add(found, len(in_attention))
            gradient, *found = torch.autograd.grad(h, (leaf, *in_attention), dh, allow_unused=True)
            dx[:, tile.begin : tile.end] += gradient
            sums.add(found, 0)
        return dx, sums.gradients()


class _Sums:
    """The gradients of parameters, summed over tiles; None where none came, in fp32 where they are narrower."""

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
    """The layer as one operation of its input and of the parameters that train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: _Work, *parameters: Tensor) -> Tensor:
        ctx.work, ctx.autocast = work, _autocast(x.device.type)
        ctx.save_for_backward(x)
        with ctx.autocast():
            return work.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors  # once: with `offload` each look fetches it
        with ctx.autocast():
            dx, gradients = ctx.work.backward(x, dy)
        return dx, None, *gradients


def _trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _autocast(device: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts with the autocast state of now, but no cache: what is cast for a tile lives as long as it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _same(x: Tensor) -> Tensor:
    return x
