"""The model under a probe, loaded on first use; and the attention of chosen rows of a forward.

B batch, T tokens, R chosen rows, S keys, H heads, K key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ctxext.model.layout import LayerKind
from ctxext.model.load import LoadedModel, hidden_states, load_model
from ctxext.model.source import ModelSource
from ctxext.ops.masks import Pattern
from ctxext.ops.naive_attention import attention_rows

ROWS_BYTES = 256 << 20  # approximate limit of attention weights in memory at a time


@dataclass
class Subject:
    """A model to probe. `loaded` loads it into memory, once."""

    source: ModelSource
    dtype: str = "float32"
    device: str | None = None

    @cached_property
    def loaded(self) -> LoadedModel:
        """Returns the model in memory; the first call loads it."""
        return load_model(self.source, dtype=self.dtype, device=self.device)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Returns the kind of each layer."""
        return self.source.kinds

    @property
    def letters(self) -> str:
        """The layout, one letter per layer (model/layout.py)."""
        return "".join(kind.letter for kind in self.kinds)

    @property
    def heads(self) -> int:
        """Returns the number of query heads of a layer."""
        return self.source.shape.num_heads

    @property
    def learned_sinks(self) -> bool:
        """Whether the heads have learned sinks, which take a part of their attention."""
        return self.source.shape.head_sinks


@torch.no_grad()
def watch_rows(model: Any, ids: Tensor, at: Tensor, take: Callable[[int, Tensor, slice], None]) -> Tensor:
    """Runs one forward over ids [B,T] and passes each layer's attention at rows at [B,R] to `take`.

    `take(layer, weights, rows)` gets fp32 weights [B,H,r,T] of the rows `at[:, rows]`, about as many at a time as fit
    in ROWS_BYTES. Returns the final hidden states [B,T,E].
    """

    def watch(module: nn.Module, query: Tensor, key: Tensor, pattern: Pattern, scaling: float | None) -> None:
        B, H, _, D = query.shape
        step = max(1, ROWS_BYTES // (4 * B * H * key.shape[2]))
        for begin in range(0, at.shape[1], step):
            rows = slice(begin, begin + step)
            where = at[:, rows].to(query.device)  # [B,r]
            chosen = query.gather(2, where[:, None, :, None].expand(B, H, where.shape[1], D))  # [B,H,r,D]
            sinks = getattr(module, "sinks", None)  # learned sinks: the rows then sum to less than 1
            weights = attention_rows(
                chosen, key, where, sliding_window=pattern.sliding_window, scale=scaling, sink_logits=sinks
            )
            take(int(module.layer_idx), weights, rows)

    return hidden_states(model, ids, watch=watch)
