"""The alpha rules: their numbers, the derivation of ours on real matrices, and what is refused."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from ctxext.errors import InputError
from ctxext.ops.low_rank import alpha, effective_scale


@pytest.mark.parametrize(("rank", "want"), [(8, 724), (16, 1024), (32, 1448), (64, 2048), (256, 4096)])
def test_square_root_rule(rank, want):
    assert round(alpha("sqrt", rank, 4096)) == want
    assert alpha("sqrt", rank, 64) == alpha("sqrt", rank, 4096), "the fan-in must not matter"
    assert effective_scale(alpha("sqrt", rank, 1), rank) == pytest.approx(256 / sqrt(rank)), "rsLoRA at 256"


@pytest.mark.parametrize(("fan_in", "coefficient"), [(896, 51.8), (2048, 78.4), (4096, 110.9), (14336, 207.4)])
def test_curvature_rule(fan_in, coefficient):
    for rank in (8, 64):
        assert alpha("curvature", rank, fan_in) / sqrt(rank) == pytest.approx(coefficient, abs=0.05)


def test_curvature_is_aligned_at_initialisation():
    """tr(s² A H Aᵀ) / tr H is 1 under the rule, with A as PEFT draws it and a Hessian of no particular shape."""
    n, rank = 512, 16
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, n, generator=g) * torch.logspace(0, -2, n)
    H = x @ x.T
    s = effective_scale(alpha("curvature", rank, n), rank)
    ratios = []
    for _ in range(200):
        A = (2 * torch.rand(rank, n, generator=g) - 1) / sqrt(n)
        ratios.append(float(s * s * (A @ H @ A.T).trace() / H.trace()))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.03)


def test_multiplier_and_fixed():
    assert alpha("fixed", 8, 64, value=16) == 16
    assert alpha("fixed", 8, 64, value=16, multiplier=0.25) == 4
    assert alpha("sqrt", 16, 64, multiplier=1 / 16) == 64


@pytest.mark.parametrize(
    "arguments",
    [
        {"rule": "log"},
        {"rank": 0},
        {"rule": "curvature", "fan_in": 0},
        {"rule": "fixed"},
        {"value": 16.0},
        {"multiplier": 0.0},
        {"multiplier": float("nan")},
        {"rule": "fixed", "value": -1.0},
    ],
    ids=str,
)
def test_refusals(arguments):
    with pytest.raises(InputError):
        alpha(**({"rule": "sqrt", "rank": 8, "fan_in": 64} | arguments))
