"""The blocked backend on an accelerator against naive, outputs and gradients. `make test-gpu` runs these there."""

import pytest
import torch

from ctxext.ops.attention import naive_attention
from ctxext.ops.backends import blocked
from ctxext.ops.masks import Pattern, document_starts, lower_bounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU paths were not run"),
]
PATTERNS = [Pattern(), Pattern(sliding_window=33), Pattern(group_size=64), Pattern(group_size=51)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_blocked_equals_naive(pattern, packed, dtype, tolerance):
    T = 257
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, T, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    starts = torch.cat([document_starts([0, 1, 100, 200], T), document_starts([0, 150], T)]) if packed else None
    lo = lower_bounds(pattern, T, document_starts=starts, device="cuda")
    weight = torch.randn(2, 4, T, 64, device="cuda")
    results = []
    for out in (blocked.attention(*inputs, pattern, document_starts=starts), naive_attention(*inputs, lo)):
        gradients = torch.autograd.grad((out.float() * weight).sum(), inputs)
        results.append([out, *gradients])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), truth.float(), atol=tolerance, rtol=tolerance)
