"""Compares two models on the same items: the mean difference, its interval, and whether it counts as a difference.

Items pair by id. The interval is a percentile bootstrap over pairs (Efron 1979). It is too narrow where few pairs
differ, so a difference is called one only when a sign-flip test agrees: if there is no difference, each pair's
difference is as likely with the other sign (for right-or-wrong cases this is McNemar's test, exact up to the number of
flips drawn).

Not done: correction for many lengths and tasks. At 95%, one row in twenty of two equal models is called different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctxext.evals.item_runner import Outcome

DRAWS = 10_000
_BLOCK = 2_000_000  # random numbers drawn at once, which bounds memory
LEVEL = 0.05  # significance level of the sign-flip test
SCALE = {"ruler": 100.0, "longbench": 100.0}  # their rows are in percent
LOWER_IS_BETTER = {"perplexity": "nats per token", "longppl": "nats per key token"}


@dataclass(frozen=True)
class Difference:
    """`value` is the model's figure minus the other's, over `n` pairs, in `unit`; `p` is that of the sign-flip test."""

    suite: str
    task: str
    length: int
    model: str
    against: str
    n: int
    value: float
    low: float
    high: float
    p: float
    unit: str
    called: str  # better, worse, no difference shown, or too few pairs to show one

    COLUMNS = ("model", "suite", "length", "less that of", "difference", "from", "to", "unit", "p", "n", "called")

    def cells(self) -> list[str]:
        """Returns the cells of a table row, in the order of COLUMNS.

        The unit is one of them, because perplexities are compared in nats.
        """
        figures = [f"{figure:+.4f}" for figure in (self.value, self.low, self.high)]
        return [self.model, self.suite, f"{self.length:,}", self.against, *figures, self.unit, f"{self.p:.4f}",
                f"{self.n:,}", self.called]  # fmt: skip


def differences(
    suite: str, model: str, mine: Sequence[Outcome], against: str, others: Sequence[Outcome], seed: int = 0
) -> list[Difference]:
    """Returns one difference per length, and one per task and length where the suite has tasks.

    Items that only one side has are left out. A mean is the sum of scores over the sum of weights, so a window counts
    by its tokens. For a suite with tasks the figure of a length is the mean over tasks, as in the suite's own rows, and
    pairs are drawn within tasks.
    """
    other = {outcome.id: outcome for outcome in others}
    pairs = [(outcome, other[outcome.id]) for outcome in mine if outcome.id in other]
    # Group by length, then by task. A pair without weight on one side has no mean and is left out.
    cells: dict[int, dict[str, list[tuple[Outcome, Outcome]]]] = {}
    for pair in pairs:
        if pair[0].weight and pair[1].weight:
            cells.setdefault(pair[0].length, {}).setdefault(pair[0].task, []).append(pair)
    found = []
    for length, tasks in cells.items():
        # "" is the whole suite, with one stratum per task; each named task is then compared alone.
        groups = {"": list(tasks.values())} | {task: [group] for task, group in tasks.items() if task}
        for task, strata in groups.items():
            *figures, p = paired(strata, seed)
            value, low, high = (SCALE.get(suite, 1.0) * figure for figure in figures)
            better = value < 0 if suite in LOWER_IS_BETTER else value > 0
            # Both the sign-flip test and the interval must exclude 0.
            shown = p < LEVEL and (low > 0 or high < 0)
            n = sum(map(len, strata))
            called = ("better" if better else "worse") if shown else _unshown(n)
            unit = LOWER_IS_BETTER.get(suite, "percent" if suite in SCALE else "score from 0 to 1")
            found.append(Difference(suite, task, length, model, against, n, value, low, high, p, unit, called))
    return found


def smallest_p(n: int) -> float:
    """Returns the least p that the sign-flip test of n pairs can give.

    It occurs where all differences have one sign: 2 of the 2^n flips give a sum as large.
    """
    return 2.0 ** (1 - n)


def _unshown(n: int) -> str:
    """Returns what to call a difference of n pairs that the test does not show."""
    if smallest_p(n) < LEVEL:
        return "no difference shown"
    enough = next(count for count in range(n, 64) if smallest_p(count) < LEVEL)
    return f"too few pairs: with {n} the smallest p is {smallest_p(n):.4g}; a difference needs {enough} or more"


def paired(strata: Sequence[Sequence[tuple[Outcome, Outcome]]], seed: int = 0) -> tuple[float, float, float, float]:
    """Returns (difference of means, low and high of its 95% bootstrap interval, sign-flip p-value), a mean over strata.

    Each stratum has at least one pair.
    """
    rng = np.random.default_rng(seed)
    observed, drawn, apart = 0.0, np.zeros(DRAWS), []
    for pairs in strata:
        scores = np.array([[a.score, b.score, a.weight, b.weight] for a, b in pairs])  # [n, 4]
        observed += float(_difference(scores.sum(0))) / len(strata)
        # The part of each pair in the difference: a flip keeps its size and changes its sign.
        apart.append((scores[:, 0] / scores[:, 2].sum() - scores[:, 1] / scores[:, 3].sum()) / len(strata))
        n = len(scores)
        # Bootstrap: draw n pairs with replacement, DRAWS times, in blocks that fit in memory.
        for begin in range(0, DRAWS, step := max(1, _BLOCK // n)):
            picked = rng.integers(0, n, (min(step, DRAWS - begin), n))
            drawn[begin : begin + step] += _difference(scores[picked].sum(1)) / len(strata)
    low, high = np.quantile(drawn, (0.025, 0.975))
    # Sign flips: count the flips whose sum is at least as large as the observed one. The factor allows for rounding.
    parts, extreme = np.concatenate(apart), 0
    for begin in range(0, DRAWS, step := max(1, _BLOCK // len(parts))):
        signs = rng.choice((-1.0, 1.0), (min(step, DRAWS - begin), len(parts)))
        extreme += int((np.abs(signs @ parts) >= abs(observed) * (1 - 1e-9)).sum())
    # The observed signs count as one more draw, so p is never 0.
    return observed, float(low), float(high), (extreme + 1) / (DRAWS + 1)


def _difference(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 2] - sums[..., 1] / sums[..., 3]
