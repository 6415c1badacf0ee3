"""A difference is called one when it is, and not when it is not."""

from __future__ import annotations

import numpy as np
import pytest

from ctxext.evals.compare import differences, paired, smallest_p
from ctxext.evals.item_runner import Outcome


def outcomes(scores: list[float], weight: float = 1.0, task: str = "", length: int = 8) -> list[Outcome]:
    return [Outcome(f"{task}/{length}/{i}", task, length, score, weight) for i, score in enumerate(scores)]


def pairs(a: list[float], b: list[float], weight: float = 1.0) -> list[tuple[Outcome, Outcome]]:
    return list(zip(outcomes(a, weight), outcomes(b, weight), strict=True))


def test_equal_models_show_none() -> None:
    value, low, high, p = paired([pairs([1, 0, 1, 1], [1, 0, 1, 1])])
    assert (value, low, high, p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("worse", "n"), [(3, 40), (5, 20), (6, 20), (9, 12)])
def test_right_or_wrong_cases_agree_with_the_exact_sign_test(worse: int, n: int) -> None:
    """`worse` of n pairs differ, all one way: McNemar's p is 2 x 2^-worse."""
    *_, p = paired([pairs([0] * worse + [1] * (n - worse), [1] * n)])
    assert p == pytest.approx(2 * 0.5**worse, abs=0.01)


def test_few_pairs_that_differ_are_no_difference_though_the_interval_excludes_zero() -> None:
    few = differences("passkey", "a", outcomes([0] * 5 + [1] * 15), "b", outcomes([1] * 20))[0]
    assert few.high < 0 and few.called == "no difference shown" and few.p > 0.05
    more = differences("passkey", "a", outcomes([0] * 8 + [1] * 12), "b", outcomes([1] * 20))[0]
    assert more.called == "worse" and more.value == pytest.approx(-0.4)
    one = differences("passkey", "a", outcomes([1.0]), "b", outcomes([0.0]))[0]
    assert one.called == "too few pairs: with 1 the smallest p is 1; a difference needs 6 or more"


@pytest.mark.parametrize("n", [5, 6])
def test_five_cases_lost_of_five_say_that_more_are_needed(n: int) -> None:
    """The least p of n pairs is 2 / 2^n: 0.0625 of five, 0.03125 of six."""
    lost = differences("passkey", "a", outcomes([0.0] * n), "b", outcomes([1.0] * n))[0]
    needs = "too few pairs: with 5 the smallest p is 0.0625; a difference needs 6 or more"
    assert lost.called == {5: needs, 6: "worse"}[n]
    assert smallest_p(n) == 2 / 2**n == pytest.approx(lost.p, abs=0.01)


def test_noise_is_called_a_difference_about_one_time_in_twenty() -> None:
    rng = np.random.default_rng(0)
    called = 0
    for seed in range(120):
        a, b = rng.normal(size=(2, 30))
        _, low, high, p = paired([pairs(list(a), list(b))], seed)
        called += p < 0.05 and (low > 0 or high < 0)
    assert called <= 14, called  # 6 expected; 14 or more in 1 of 500


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(100):
        b = rng.normal(size=40)
        a = b + 0.3 + rng.normal(size=40)
        _, low, high, _ = paired([pairs(list(a), list(b))], seed)
        inside += low <= 0.3 <= high
    assert inside >= 88, inside


def test_windows_count_by_their_tokens_and_lower_is_better() -> None:
    mine = [Outcome("0", "", 8, 2.0 * 10, 10), Outcome("1", "", 8, 1.0 * 90, 90)]
    others = [Outcome("0", "", 8, 2.5 * 10, 10), Outcome("1", "", 8, 1.5 * 90, 90)]
    (found,) = differences("perplexity", "a", mine, "b", others)
    assert found.value == pytest.approx(-0.5) and found.unit == "nats per token"
    row = dict(zip(found.COLUMNS, found.cells(), strict=True))
    assert row["difference"] == "-0.5000" and row["unit"] == "nats per token" and row["p"] == f"{found.p:.4f}"
    many = [Outcome(str(i), "", 8, 1.0, 1) for i in range(12)], [Outcome(str(i), "", 8, 1.5, 1) for i in range(12)]
    assert differences("perplexity", "a", many[0], "b", many[1])[0].called == "better"
    assert differences("perplexity", "a", many[1], "b", many[0])[0].called == "worse"


def test_pairs_are_by_id_and_in_groups_of_length_and_task() -> None:
    mine = outcomes([1, 1], task="x") + outcomes([0], task="y") + outcomes([1], task="x", length=16)
    others = outcomes([1, 0, 1], task="x") + outcomes([0], task="y")
    found = {(d.task, d.length): (d.n, d.value) for d in differences("niah", "a", mine, "b", others)}
    assert found == {("", 8): (3, pytest.approx(0.25)), ("x", 8): (2, 0.5), ("y", 8): (1, 0.0)}


def test_of_tasks_it_is_the_difference_of_the_figures_that_are_shown() -> None:
    """A large task is won by a little and a small one lost by much: the mean over tasks, in percent, is lower."""
    mine = outcomes([1] * 130 + [0] * 70, task="large") + outcomes([0] * 20, task="small")
    others = outcomes([1] * 110 + [0] * 90, task="large") + outcomes([1] * 10 + [0] * 10, task="small")
    found = {d.task: d for d in differences("longbench", "a", mine, "b", others)}
    assert found[""].value == pytest.approx((65 + 0) / 2 - (55 + 50) / 2) and found[""].unit == "percent"
    assert found[""].called == "worse" and found["large"].called == "better" and found["small"].called == "worse"
    assert found[""].low < found[""].value < found[""].high < 0
    assert found[""].n == 220
