"""What attention full layers train with at a step: S²-Attn throughout, growing groups, a drawn shift, dense at the end.

S²-Attn never connects two tokens further apart than a group within one layer, so dependencies longer than a group are
learned badly, or unlearned (our own small experiments; LOG.md). These are the ways out that cost little. No torch.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from ctxext.train.spec import AttentionSpec

Attention = tuple[int | None, int | None]  # (group_size, shift) in tokens; (None, None): dense, (G, None): G // 2


def attention_at(spec: AttentionSpec, group_size: int | None, ctx: int, step: int, steps: int, seed: int) -> Attention:
    """(group_size, shift) of the full layers at `step` (from 0) of `steps`; `group_size` None is dense throughout."""
    if group_size is None or step >= (sparse := steps - round(spec.dense_last * steps)):
        return None, None
    if spec.grow:
        sizes = [group_size]
        while 2 * sizes[-1] < ctx:
            sizes.append(2 * sizes[-1])
        group_size = sizes[step * len(sizes) // sparse]
    if spec.shift == "half":
        return group_size, None
    return group_size, Random(f"{seed}/{step}").randint(1, group_size - 1)


def phases(spec: AttentionSpec, group_size: int | None, ctx: int, steps: int) -> dict[int | None, int]:
    """How many steps train with each group size, None for dense; what a plan counts its FLOPs by."""
    return dict(Counter(attention_at(spec, group_size, ctx, step, steps, 0)[0] for step in range(steps)))
