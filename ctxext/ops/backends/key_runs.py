"""Joins segments into runs: neighbouring segments of equal length are one strided view, thus one kernel call.

Shapes: B batch, T tokens, N = B * T tokens in one long row (segments.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ctxext.ops.backends.segments import segment_bounds, segment_sinks
from ctxext.ops.backends.views import Blocks
from ctxext.ops.masks import Pattern, lower_bounds


class KeyRun(NamedTuple):
    """Neighbouring segments of equal length, each with the same number of sink tokens before it."""

    blocks: Blocks
    sinks: int


@lru_cache(maxsize=64)
def unpacked_runs(groups: Pattern, half: int, B: int, T: int) -> tuple[KeyRun, ...]:
    """Returns the runs of rows of one document each; every layer and batch has the same ones, so they are cached."""
    return tuple(runs_of(groups, half, B, T, None))


def runs_of(groups: Pattern, half: int, B: int, T: int, document_starts: Tensor | None) -> list[KeyRun]:
    """Returns the segments of one half of the heads, with equal neighbours joined into one run.

    `groups` is a pattern without a window; `document_starts` [B,T] is on the CPU.
    """
    bounds = segment_bounds(lower_bounds(groups, T, document_starts=document_starts), half, B, T)
    lengths, starts = torch.diff(bounds), bounds[:-1]
    sinks = segment_sinks(groups, starts, T, document_starts)[1] if groups.sink_tokens else torch.zeros_like(starts)
    # Segments are equal when both their lengths and their numbers of sink tokens are: a run is one call.
    kinds, counts = torch.unique_consecutive(torch.stack((lengths, sinks), dim=1), dim=0, return_counts=True)
    runs, start = [], 0
    for (length, before), count in zip(kinds.tolist(), counts.tolist(), strict=True):
        runs.append(KeyRun(Blocks(start, count, length), before))
        start += count * length
    return runs


def join_short(runs: list[KeyRun], limit: int) -> tuple[list[KeyRun], set[KeyRun]]:
    """Joins neighbouring runs while they have at most `limit` tokens together; returns all runs, and the joined ones.

    Runs with sink tokens before their segments are not joined: the mask of joined runs has no columns for sink tokens.
    """
    kept: list[KeyRun] = []
    joined: set[KeyRun] = set()
    for run in runs:
        if kept and not kept[-1].sinks and not run.sinks and kept[-1].blocks.tokens + run.blocks.tokens <= limit:
            # The joined run replaces both; it is one block, whose mask keeps its segments apart.
            before = kept.pop()
            joined.discard(before)
            run = KeyRun(Blocks(before.blocks.start, 1, before.blocks.tokens + run.blocks.tokens), 0)
            joined.add(run)
        kept.append(run)
    return kept, joined
