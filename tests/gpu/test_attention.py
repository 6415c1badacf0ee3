"""Every backend on an accelerator against naive, outputs and gradients. `make test-gpu` runs these there."""

import pytest
import torch

from ctxext.errors import EnvironmentFault
from ctxext.ops.backends import choice
from ctxext.ops.masks import Pattern, document_starts, lower_bounds
from ctxext.ops.naive_attention import naive_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU paths were not run"),
]
PATTERNS = [
    Pattern(),
    Pattern(sliding_window=33),
    Pattern(group_size=64),
    Pattern(group_size=51),
    Pattern(33, 64),
    Pattern(group_size=51, sink_tokens=1),
    Pattern(group_size=64, sink_tokens=4),
]
BF16 = pytest.param(torch.bfloat16, 3e-2, id="bf16")
DTYPES = [pytest.param(torch.float32, 2e-4, id="fp32"), BF16, pytest.param(torch.float16, 8e-3, id="fp16")]


def two_rows(T):
    return torch.cat([document_starts([0, 1, 100, 200], T), document_starts([0, 150], T)])


@pytest.mark.parametrize("H_K", [(4, 2), (6, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("backend", ["blocked", "varlen", "flex", "auto"])
def test_a_backend_equals_naive(backend, dtype, tolerance, pattern, packed, H_K):
    T, (H, K) = 257, H_K
    torch.manual_seed(0)
    made = [torch.randn(2, T, heads, 64, device="cuda", dtype=dtype) for heads in (H, K, K)]
    inputs = [x.transpose(1, 2).requires_grad_() for x in made]
    starts = two_rows(T) if packed else None
    lo = lower_bounds(pattern, T, document_starts=starts, device="cuda")
    weight = torch.randn(2, H, T, 64, device="cuda")
    try:
        ours = choice.attention(*inputs, pattern, document_starts=starts, backend=backend)
    except EnvironmentFault as fault:
        pytest.skip(str(fault))
    results = []
    truth = naive_attention(*inputs, lo, sink_tokens=pattern.sink_tokens, document_starts=starts)
    for out in (ours, truth):
        gradients = torch.autograd.grad((out.float() * weight).sum(), inputs)
        results.append([out, *gradients])
    for got, truth in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), truth.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["blocked", "varlen", "flex"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nothing_moves_before_what_changed(backend, pattern):
    T, at = 300, [1, 31, 32, 33, 63, 64, 128, 200, 299]
    q, k, v = (torch.randn(1, 4, T, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    try:
        before = choice.attention(q, k, v, pattern, backend=backend)
    except EnvironmentFault as fault:
        pytest.skip(str(fault))
    for j in at:
        k2, v2 = k.clone(), v.clone()
        k2[:, :, j] += 1
        v2[:, :, j] -= 2
        moved = (choice.attention(q, k2, v2, pattern, backend=backend) != before).any(-1).any(1)[0]
        assert moved[j] and not moved[:j].any(), f"{j} changed, {moved.nonzero()[:, 0].tolist()} moved"


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_cached_keys(pattern):
    q, k, v = (torch.randn(2, heads, T, 64, device="cuda") for heads, T in ((4, 3), (2, 90), (2, 90)))
    truth = naive_attention(q, k, v, lower_bounds(pattern, 3, S=90, device="cuda"))
    torch.testing.assert_close(choice.attention(q, k, v, pattern), truth, atol=2e-4, rtol=2e-4)
