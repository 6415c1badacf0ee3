"""FlexAttention's BlockMask in closed form against torch's own search, and its forward against naive.

FlexAttention has no backward on a CPU: gradients are in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ctxext.ops.backends import flex
from ctxext.ops.masks import Pattern, document_starts, lower_bounds
from ctxext.ops.naive_attention import naive_attention

PATTERNS = [Pattern(), Pattern(1), Pattern(100), Pattern(128), Pattern(None, 64), Pattern(None, 333), Pattern(50, 200)]
SINKS = [Pattern(None, 64, None, 1), Pattern(None, 200, 199, 4), Pattern(None, 333, None, 100)]


def two_rows(T):
    return torch.cat([document_starts([b for b in (0, 1, 20, 150) if b < T], T), document_starts([0], T)])


def blocks(counts, indices):
    """[B,1,n] and [B,1,n,n] -> for every row of blocks the set of its columns."""
    rows = zip(counts.flatten().tolist(), indices.flatten(0, 2).tolist(), strict=True)
    return [set(columns[:count]) for count, columns in rows]


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300, 1000, 1024])
@pytest.mark.parametrize("pattern", PATTERNS + SINKS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_the_closed_form_finds_the_blocks_that_a_search_finds(T, pattern, packed):
    starts = two_rows(T) if packed else None
    for lo in lower_bounds(pattern, T, document_starts=starts).unbind(1):
        ours = flex.block_mask(lo, pattern.sink_tokens, starts)
        searched = create_block_mask(ours.mask_mod, lo.shape[0], None, T, T, device="cpu")
        for kind in ("kv", "full_kv", "q", "full_q"):
            names = f"{kind}_num_blocks", f"{kind}_indices"
            found, wanted = ([getattr(mask, name) for name in names] for mask in (ours, searched))
            assert blocks(*found) == blocks(*wanted), (kind, pattern)
        assert ours.seq_lengths == searched.seq_lengths and ours.BLOCK_SIZE == searched.BLOCK_SIZE


@pytest.mark.parametrize("pattern", PATTERNS + SINKS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_its_forward_is_naive(pattern, packed):
    T, starts = 300, two_rows(300) if packed else None
    q, k, v = (torch.randn(2, heads, T, 16) for heads in (4, 2, 2))
    ours = flex.attention(q, k, v, pattern, document_starts=starts, scale=0.3, kernel=flex_attention)
    lo = lower_bounds(pattern, T, document_starts=starts)
    truth = naive_attention(q, k, v, lo, scale=0.3, sink_tokens=pattern.sink_tokens, document_starts=starts)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Pattern(100), Pattern(None, 64), Pattern(None, 64, None, 2)], ids=str)
def test_its_compiled_forward_is_naive(pattern):
    """The compiled kernel is what skips blocks: a block forgotten by the closed form shows here."""
    q, k, v = (torch.randn(1, heads, 700, 16) for heads in (4, 2, 2))
    truth = naive_attention(q, k, v, lower_bounds(pattern, 700), sink_tokens=pattern.sink_tokens)
    torch.testing.assert_close(flex.attention(q, k, v, pattern), truth, rtol=1e-4, atol=1e-5)
