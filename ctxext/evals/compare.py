"""Two models on the same items: the mean difference, an interval for it, and whether it may be called one.

Items pair by id. The interval is a percentile bootstrap over pairs (Efron 1979); it is too narrow where few pairs
differ, so a difference is called one only when a sign-flip test agrees: under no difference, each pair's difference is
as likely with the other sign (for right-or-wrong cases this is McNemar's test, exact up to the number of flips drawn).

Not done: correction for many lengths and tasks. At 95%, one row in twenty of two equal models is called different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctxext.evals.engine import Outcome

DRAWS = 10_000
_BLOCK = 2_000_000  # numbers drawn at once
LOWER_IS_BETTER = {"perplexity": "nats per token", "longppl": "nats per key token"}


@dataclass(frozen=True)
class Difference:
    """`value` is the model's figure less the other's, over `n` pairs, in `unit`; `p` is the sign-flip test's."""

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
    called: str  # better, worse, or no difference shown

    def cells(self) -> list[str]:
        """As a row of a table."""
        figures = [f"{figure:+.4f}" for figure in (self.value, self.low, self.high)]
        return [self.model, self.suite, f"{self.length:,}", self.against, *figures, f"{self.p:.4f}", f"{self.n:,}",
                self.called]  # fmt: skip


def differences(
    suite: str, model: str, mine: Sequence[Outcome], against: str, others: Sequence[Outcome], seed: int = 0
) -> list[Difference]:
    """One difference a length, and one a task and length where the suite has tasks.

    Items that one side alone has are left out. A mean is sum of scores over sum of weights: a window counts by its
    tokens.
    """
    other = {outcome.id: outcome for outcome in others}
    pairs = [(outcome, other[outcome.id]) for outcome in mine if outcome.id in other]
    pairs = [pair for pair in pairs if pair[0].weight and pair[1].weight]
    groups: dict[tuple[str, int], list[tuple[Outcome, Outcome]]] = {}
    for pair in pairs:
        for task in dict.fromkeys(("", pair[0].task)):
            groups.setdefault((task, pair[0].length), []).append(pair)
    found = []
    for (task, length), group in groups.items():
        value, low, high, p = paired(group, seed)
        better = value < 0 if suite in LOWER_IS_BETTER else value > 0
        shown = p < 0.05 and (low > 0 or high < 0)
        called = ("better" if better else "worse") if shown else "no difference shown"
        unit = LOWER_IS_BETTER.get(suite, "score from 0 to 1")
        found.append(Difference(suite, task, length, model, against, len(group), value, low, high, p, unit, called))
    return found


def paired(pairs: Sequence[tuple[Outcome, Outcome]], seed: int = 0) -> tuple[float, float, float, float]:
    """(difference of means, its 95% bootstrap interval, sign-flip p-value) of at least one pair."""
    scores = np.array([[a.score, b.score, a.weight, b.weight] for a, b in pairs])  # [n, 4]
    rng = np.random.default_rng(seed)
    observed = _difference(scores.sum(0))
    n, drawn = len(scores), []
    for begin in range(0, DRAWS, step := max(1, _BLOCK // n)):
        picked = rng.integers(0, n, (min(step, DRAWS - begin), n))
        drawn.append(_difference(scores[picked].sum(1)))
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    # Each pair's part in the difference, about the common ratio: flipped, it keeps its size and changes its sign.
    apart = scores[:, 0] / scores[:, 2].sum() - scores[:, 1] / scores[:, 3].sum()
    extreme = 0
    for begin in range(0, DRAWS, step):
        signs = rng.choice((-1.0, 1.0), (min(step, DRAWS - begin), n))
        extreme += int((np.abs(signs @ apart) >= abs(observed) * (1 - 1e-9)).sum())
    return float(observed), float(low), float(high), (extreme + 1) / (DRAWS + 1)


def _difference(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 2] - sums[..., 1] / sums[..., 3]
