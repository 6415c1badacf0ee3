"""Learned sinks: every path against the formula, outputs and gradients; causality by perturbation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctxext.errors import EnvironmentFault
from ctxext.ops.backends import choice
from ctxext.ops.backends.choice import AttentionCall, choose
from ctxext.ops.backends.sink_logits import attention_with_sinks, with_one_more_key
from ctxext.ops.masks import Pattern, document_starts, lower_bounds
from ctxext.ops.naive_attention import naive_attention

PATTERNS = [
    Pattern(),
    Pattern(sliding_window=3),
    Pattern(sliding_window=70),
    Pattern(group_size=6),
    Pattern(group_size=6, sink_tokens=2),
]
SHAPES = [(1, 4, 2, 40), (2, 6, 2, 161)]


def tensors(B: int, H: int, K: int, T: int, dtype: torch.dtype = torch.float64, S: int | None = None):
    generator = torch.Generator().manual_seed(0)
    sizes = (B, T, H, 8), (B, S or T, K, 8), (B, S or T, K, 8)
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for size in sizes)
    logits = torch.randn(H, generator=generator, dtype=torch.float64).to(dtype)
    return [x.detach().requires_grad_() for x in (q, k, v, logits)]


def compare(ours: Tensor, truth: Tensor, inputs: list[Tensor], atol: float = 1e-12) -> None:
    """Outputs and the gradients of a random sum of them."""
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(truth.dtype)
    got, wanted = (torch.autograd.grad(out, inputs, weight) for out in (ours, truth))
    for mine, true in zip((ours, *got), (truth, *wanted), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10 if atol < 1e-10 else 1e-2, atol=atol)


def by_formula(q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scale: float = 0.3) -> Tensor:
    """The definition in transformers: attention without a sink times sigmoid(logsumexp - logit)."""
    T, H = q.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    hidden = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
    scores = q @ k.transpose(-1, -2) * scale + hidden
    return scores.softmax(-1) @ v * torch.sigmoid(scores.logsumexp(-1) - logits[:, None])[..., None]


def test_the_slow_twin_is_the_definition():
    q, k, v, logits = inputs = tensors(2, 4, 2, 9)
    lo = lower_bounds(Pattern(), 9)
    compare(naive_attention(q, k, v, lo, scale=0.3, sink_logits=logits), by_formula(*inputs), inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocked_is_the_slow_twin(shape, pattern, packed):
    inputs = tensors(*shape)
    q, k, v, logits = inputs
    B, T = shape[0], shape[3]
    starts = torch.cat([document_starts([0, 4 + row, 5 + row, 17], T) for row in range(B)]) if packed else None
    ours, truth = (
        choice.attention(q, k, v, pattern, document_starts=starts, sink_logits=logits, backend=name)
        for name in ("blocked", "naive")
    )
    compare(ours, truth, inputs)


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
def test_over_cached_keys(pattern):
    for T in (1, 5):
        q, k, v, logits = inputs = tensors(2, 4, 2, T, S=30)
        ours, truth = (choice.attention(q, k, v, pattern, sink_logits=logits, backend=n) for n in ("blocked", "naive"))
        compare(ours, truth, inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_one_more_key_gives_the_same_as_the_kernel_of_the_cpu(heads, masked):
    """What other devices are given, here in fp64."""
    q, k, v, logits = inputs = tensors(2, *heads, 7, S=12 if masked else 7)
    mask = None
    if masked:
        distance = torch.arange(7)[:, None] + 5 - torch.arange(12)
        mask = torch.zeros(7, 12, dtype=torch.float64).masked_fill((distance < 0) | (distance > 3), float("-inf"))
    given = {"mask": mask, "causal": not masked, "scale": 0.3}
    compare(with_one_more_key(q, k, v, logits, **given), attention_with_sinks(q, k, v, logits, **given), inputs)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_lower_precisions(dtype, atol):
    q, k, v, logits = inputs = tensors(2, 6, 2, 40, dtype)
    ours, truth = (
        choice.attention(q, k, v, Pattern(5), sink_logits=logits, backend=name) for name in ("blocked", "naive")
    )
    compare(ours, truth, inputs, atol)


def test_a_very_low_logit_is_no_sink_to_the_bit():
    q, k, v, _ = tensors(1, 4, 2, 40, torch.float32)
    for pattern in (Pattern(), Pattern(7)):
        without = choice.attention(q, k, v, pattern)
        assert torch.equal(choice.attention(q, k, v, pattern, sink_logits=torch.full((4,), -1e4)), without)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_query_sees_the_future(pattern):
    q, k, v, logits = tensors(1, 4, 2, 40)
    with torch.no_grad():
        before = choice.attention(q, k, v, pattern, sink_logits=logits)
        k[:, :, 21:] += 1
        v[:, :, 21:] -= 3
        after = choice.attention(q, k, v, pattern, sink_logits=logits)
    assert torch.equal(before[:, :, :21], after[:, :, :21]) and not torch.equal(before[:, :, 21:], after[:, :, 21:])


def test_backends_without_learned_sinks_refuse_them():
    call = AttentionCall(torch.device("cuda"), torch.bfloat16, 64, sink_logits=True)
    for backend in ("varlen", "flex"):
        with pytest.raises(EnvironmentFault, match="does not support learned sinks"):
            choose(call, backend)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_one_more_key_has_finite_gradients_where_a_sink_takes_nothing_in_fp16(masked):
    q, k, v, _ = tensors(1, 4, 2, 7, torch.float16)
    mask = torch.zeros(7, 7, dtype=torch.float16).masked_fill(~torch.ones(7, 7).tril().bool(), float("-inf"))
    logits = torch.full((4,), -1e4, dtype=torch.float16)
    out = with_one_more_key(q, k, v, logits, mask=mask if masked else None, causal=not masked, scale=0.125)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().sum(), (q, k, v)))
    torch.testing.assert_close(out, choice.attention(q, k, v, Pattern(), scale=0.125), rtol=1e-2, atol=1e-2)
