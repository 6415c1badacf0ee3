"""The truth itself, against the formula spelled out pair by pair and against torch's math kernel."""

from __future__ import annotations

import math

import pytest
import torch

from ctxext.errors import InputError
from ctxext.ops.masks import Pattern, first_shifted_head, lower_bounds
from ctxext.ops.naive_attention import naive_attention


def tensors(B, H, K, T, S, D, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, h, t, D, generator=g, dtype=torch.float64).to(dtype) for h, t in ((H, T), (K, S), (K, S))]


@pytest.mark.parametrize(("H", "K"), [(4, 2), (9, 3), (4, 1), (2, 2)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (7, 7), (3, 8)])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(3), Pattern(None, 3), Pattern(2, 4), Pattern(None, 2, None, 2)])
def test_pair_by_pair(H, K, T, S, pattern):
    q, k, v = tensors(2, H, K, T, S, 4)
    lo = lower_bounds(pattern, T, S=S)
    out = naive_attention(q, k, v, lo, sink_tokens=pattern.sink_tokens)
    for b in range(2):
        for h in range(H):
            half = int(pattern.group_size is not None and h >= first_shifted_head(H, K))
            g = h // (H // K)
            for i in range(T):
                position = S - T + i
                keys = [j for j in range(position + 1) if j >= int(lo[0, half, i]) or j < pattern.sink_tokens]
                scores = [math.exp(float(q[b, h, i] @ k[b, g, j]) / 2) for j in keys]  # sqrt(D) = 2
                want = sum(w / sum(scores) * v[b, g, j] for w, j in zip(scores, keys, strict=True))
                torch.testing.assert_close(out[b, h, i], want)


def test_precision_is_fp32_unless_fp64():
    q, k, v = tensors(1, 2, 2, 50, 50, 8)
    lo = lower_bounds(Pattern(), 50)
    exact = naive_attention(q, k, v, lo)
    torch.testing.assert_close(
        exact, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-12, atol=1e-12
    )
    half = naive_attention(*(x.bfloat16() for x in (q, k, v)), lo)
    upcast = naive_attention(*(x.bfloat16().float() for x in (q, k, v)), lo)
    assert half.dtype == torch.bfloat16 and torch.equal(half, upcast.bfloat16())


def test_scale():
    q, k, v = tensors(1, 1, 1, 5, 5, 4)
    lo = lower_bounds(Pattern(), 5)
    torch.testing.assert_close(naive_attention(q, k, v, lo, scale=1.0), naive_attention(2 * q, k, v, lo))


def test_nan_reaches_every_query_that_sees_it():
    q, k, v = tensors(1, 1, 1, 10, 10, 4)
    k[0, 0, 4] = math.nan
    rows = naive_attention(q, k, v, lower_bounds(Pattern(3), 10)).isnan().any(-1)[0, 0]
    assert rows.nonzero()[:, 0].tolist() == [4, 5, 6]


def test_shapes_that_do_not_fit():
    q, k, v = tensors(1, 3, 2, 5, 5, 4)
    with pytest.raises(InputError, match="must divide"):
        naive_attention(q, k, v, lower_bounds(Pattern(), 5))


@pytest.mark.parametrize(
    ("at", "value", "told"), [(3, 4, "lies after the query"), (2, -1, "is negative"), (4, 0, "descends")]
)
def test_a_mask_that_is_not_interval_causal_is_refused(at, value, told):
    q, k, v = tensors(1, 2, 2, 6, 6, 4)
    lo = lower_bounds(Pattern(3), 6).clone()
    lo[0, 0, at] = value
    with pytest.raises(InputError, match=rf"lo\[0, {at}\] = {value}.*{told}.*not interval-causal"):
        naive_attention(q, k, v, lo)
