"""The varlen backend's arguments, run through a kernel in plain torch: no CPU has the real one (tests/gpu has it)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxext.errors import EnvironmentFault, InputError
from ctxext.ops.backends import varlen
from ctxext.ops.masks import Pattern, document_starts, lower_bounds
from ctxext.ops.naive_attention import naive_attention

PATTERNS = [
    Pattern(),
    Pattern(1),
    Pattern(2),
    Pattern(90),
    Pattern(None, 2),
    Pattern(None, 37),
    Pattern(30, 64),
    Pattern(None, 37, 5),
    Pattern(None, 37, None, 1),
    Pattern(None, 9, 8, 4),
    Pattern(None, 2, None, 50),
]


def simulated(q, k, v, arguments, scale):
    """What FlashAttention computes from cu_seqlens and window_size = (left, 0): q [N,h,D] -> [N,h,D]."""
    cu, longest, left = arguments[:3]
    assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == q.shape[0] and (torch.diff(cu) > 0).all()
    assert longest == torch.diff(cu).max()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    for start, end in zip(cu.tolist(), cu[1:].tolist(), strict=False):
        i = torch.arange(end - start)
        distance = i[:, None] - i
        seen = (distance >= 0) & (distance <= (left if left >= 0 else end - start))
        qi, ki, vi = (x[start:end].transpose(0, 1) for x in (q, k, v))
        weights = (qi @ ki.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append((weights @ vi).transpose(0, 1))
    return torch.cat(parts)


def assert_twins(pattern, B, H, K, T, starts=None, scale=None):
    q, k, v = (torch.randn(B, T, h, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for h in (H, K, K))
    ours = varlen.attention(q, k, v, pattern, document_starts=starts, scale=scale, kernel=simulated)
    lo = lower_bounds(pattern, T, document_starts=starts)
    truth = naive_attention(q, k, v, lo, scale=scale, sink_tokens=pattern.sink_tokens, document_starts=starts)
    weight = torch.randn_like(truth)
    for got, want in zip(
        (ours, *torch.autograd.grad(ours, (q, k, v), weight)),
        (truth, *torch.autograd.grad(truth, (q, k, v), weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("H_K", [(4, 2), (9, 3), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 63, 129])
def test_its_arguments_say_what_naive_computes(T, H_K):
    for pattern in PATTERNS:
        assert_twins(pattern, 2, *H_K, T, scale=0.3)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), W=st.none() | st.integers(1, 80),
       G=st.none() | st.integers(2, 80), N=st.integers(0, 5))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_documents_of_any_length(lengths, W, G, N):
    T = sum(lengths)
    bounds = [sum(lengths[:i]) for i in range(len(lengths))]
    starts = torch.cat([document_starts(bounds, T), document_starts([0], T)])
    assert_twins(Pattern(W, G), 2, 4, 2, T, starts)
    if G is not None:
        assert_twins(Pattern(None, G, None, N), 2, 4, 2, T, starts)


def test_cu_seqlens_of_the_picture():
    def cuts(half):
        return varlen.arguments_of(Pattern(None, 4), half, 1, 10, None, torch.device("cpu")).cu_seqlens.tolist()

    assert cuts(0) == [0, 4, 8, 10] and cuts(1) == [0, 2, 6, 10]


def test_heads_that_cannot_halve_and_a_missing_kernel_are_refused(monkeypatch):
    x = torch.zeros(1, 1, 5, 8)
    with pytest.raises(InputError, match="half of the heads"):
        varlen.attention(x, x, x, Pattern(None, 4), kernel=simulated)
    monkeypatch.setattr(varlen, "installed_kernel", lambda: None)
    with pytest.raises(EnvironmentFault, match="no varlen kernel"):
        varlen.attention(x, x, x, Pattern())


def test_torch_has_the_kernel_with_windows():
    """On the pinned torch; only its CPU build has nothing to run it on."""
    assert varlen.installed_kernel() is not None


def test_documents_are_read_once_for_all_layers_and_anew_where_they_change(monkeypatch):
    made, real = [], varlen.arguments_of
    monkeypatch.setattr(varlen, "arguments_of", lambda *given: made.append(given[1]) or real(*given))
    starts = document_starts([0, 5, 20], 20)

    def run():
        q = torch.randn(1, 4, 20, 8, dtype=torch.float64)
        truth = naive_attention(q, q, q, lower_bounds(Pattern(3), 20, document_starts=starts))
        ours = varlen.attention(q, q, q, Pattern(3), document_starts=starts, kernel=simulated)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)

    run()
    run()
    assert len(made) == 1
    starts.zero_()  # one document now: what was known of the tensor is no longer true
    run()
    assert len(made) == 2


def test_what_inference_made_serves_training(monkeypatch):
    with torch.inference_mode():
        inside = varlen._unpacked(Pattern(11), 0, 1, 77, torch.device("cpu"))
    assert not inside.cu_seqlens.is_inference()
