"""How large LoRA's alpha is: PEFT computes W x + (alpha / rank) B A x with A [rank, fan_in] and B = 0 at the start.

Source: "The Hidden Power of Scaling Factor in LoRA Optimization", arXiv 2606.12883. Its abstract: the best alpha is
sublinear in the rank, "a square-root law with an unexpectedly large coefficient"; raise alpha, not the learning rate.

    sqrt        256 · sqrt(rank)          The paper's coefficient, second-hand: four independent readers report it; we
                                          have not seen it in the paper itself. Equal to rsLoRA with lora_alpha = 256.
    curvature   sqrt(3 · fan_in · rank)   Ours, not the paper's; derived below.
    fixed       the given value

Curvature: let H be the Hessian of the loss in one row w of W (one output, fan_in entries). LoRA moves that row by
w + s Aᵀ b with b [rank] a row of B. So at B = 0 the Hessian in b is s² A H Aᵀ. PEFT draws the entries of A uniformly
from ±1/sqrt(fan_in), with variance 1 / (3 fan_in). In expectation

    tr(s² A H Aᵀ) = s² · rank / (3 fan_in) · tr H

and the loss is as curved in B as in W when s = sqrt(3 fan_in / rank), that is alpha = s · rank = sqrt(3 · fan_in ·
rank). Divided by sqrt(rank) this is 78 at fan_in 2048, 111 at 4096 and 207 at 14336. The rule has the form of the
paper's rule, with a coefficient below its 256. At fan_in 64 it is 18 times below, so tiny models need this rule or a
multiplier.

Not done: SGD, which the paper's argument does not cover; initialisations other than PEFT's default.
"""

from __future__ import annotations

from math import sqrt

from ctxext.errors import InputError

RULES = ("sqrt", "curvature", "fixed")


def alpha(rule: str, rank: int, fan_in: int, value: float | None = None, multiplier: float = 1.0) -> float:
    """Returns LoRA's alpha for one weight of `fan_in` inputs, times `multiplier`; only the rule `fixed` uses `value`.

    Raises InputError for an unknown rule, a rank or fan-in under 1, a value that is missing or not used by the rule,
    and a value or multiplier that is not positive.
    """
    if rule not in RULES:
        raise InputError(f"alpha rule {rule!r}: allowed are {', '.join(RULES)}")
    if rank < 1 or fan_in < 1:
        raise InputError(f"rank {rank}, fan-in {fan_in}: both must be 1 or more")
    if (rule == "fixed") != (value is not None):
        raise InputError(f"alpha rule {rule} with value {value}: fixed needs a value, and the other rules take none")
    if not multiplier > 0 or (value is not None and not value > 0):
        raise InputError(f"alpha value {value}, multiplier {multiplier}: both must be positive")
    if rule == "sqrt":
        return multiplier * 256 * sqrt(rank)
    if rule == "curvature":
        return multiplier * sqrt(3 * fan_in * rank)
    assert value is not None
    return multiplier * value


def effective_scale(alpha: float, rank: int) -> float:
    """Returns the factor of B A x: alpha / rank, PEFT's scale without rsLoRA."""
    return alpha / rank
