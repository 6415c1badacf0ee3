"""The training attention of full layers at each step: S²-Attn, growing groups, a random shift, dense at the end.

Within one layer, S²-Attn never connects two tokens that are further apart than one group. Dependencies longer than a
group are therefore learned badly, or unlearned (our own small experiments; LOG.md). These options reduce the problem at
low cost. No torch.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from ctxext.train.finetune_spec import AttentionSpec

Attention = tuple[int | None, int | None]  # (group_size, shift) in tokens; (None, None): dense, (G, None): G // 2


def attention_at(spec: AttentionSpec, group_size: int | None, ctx: int, step: int, steps: int, seed: int) -> Attention:
    """Returns (group_size, shift) of the full layers at `step` (from 0) of `steps`.

    `group_size` None means that all steps are dense.
    """
    if group_size is None or step >= (sparse := first_dense(spec, steps)):
        return None, None
    if spec.grow:
        # Double the group in equal parts of the S²-Attn steps, while it is below ctx.
        sizes = [group_size]
        while 2 * sizes[-1] < ctx:
            sizes.append(2 * sizes[-1])
        group_size = sizes[step * len(sizes) // sparse]
    if spec.shift == "half":
        return group_size, None
    # The draw depends on seed and step alone, so that a resumed run repeats it.
    return group_size, Random(f"{seed}/{step}").randint(1, group_size - 1)


def first_dense(spec: AttentionSpec, steps: int) -> int:
    """Returns the first step (from 0) of those that end an S²-Attn run dense; `steps` where there is none."""
    return steps - round(spec.dense_last * steps)


def phases(spec: AttentionSpec, group_size: int | None, ctx: int, steps: int) -> dict[int | None, int]:
    """Returns how many steps train with each group size, None for dense. A plan computes its mean FLOPs from it."""
    return dict(Counter(attention_at(spec, group_size, ctx, step, steps, 0)[0] for step in range(steps)))
