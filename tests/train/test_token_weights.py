"""Weights of tokens in the loss: against references that compute them token by token, and in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from ctxext.config.loader import build
from ctxext.errors import InputError
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.train.distill import distillation_loss
from ctxext.train.engine import LocalEngine
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec, OptimizerSpec, TokenWeights
from ctxext.train.loop import Events
from ctxext.train.loss import IGNORED, linear_cross_entropy
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run
from ctxext.train.token_weights import longce_weights, prefix_weights, step_weights

T = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(300)))
    return path


def alone(total=lambda *values: list(values)):
    """An engine of one process, for functions that only sum over ranks."""
    return SimpleNamespace(total=total)


def test_weighted_cross_entropy_equals_the_sum_over_tokens():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g, dtype=torch.float64).requires_grad_() for n in (11, 13))
    labels, w = torch.randint(0, 13, (11,), generator=g), torch.rand(11, generator=g, dtype=torch.float64) * 5
    labels[[0, 7]] = IGNORED
    theirs = (cross_entropy(hidden @ weight.t(), labels, reduction="none", ignore_index=IGNORED) * w).sum()
    expected = torch.autograd.grad(theirs, (hidden, weight))
    for chunk in (1, 4, 100):
        ours, count = linear_cross_entropy(hidden, weight, labels, chunk, token_weights=w)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
        assert count == 9
        for got, want in zip(torch.autograd.grad(ours, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="token_weights"):
        linear_cross_entropy(hidden, weight, labels, token_weights=w[:3])


def test_a_weight_of_two_is_the_token_counted_twice():
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 8, generator=g) for n in (6, 13))
    labels = torch.randint(0, 13, (6,), generator=g)
    twice = torch.tensor([0, 1, 2, 2, 3, 4, 5, 5])
    w = torch.tensor([1.0, 1, 2, 1, 1, 2])
    ours, _ = linear_cross_entropy(hidden, weight, labels, token_weights=w)
    theirs, _ = linear_cross_entropy(hidden[twice], weight, labels[twice])
    torch.testing.assert_close(ours, theirs)


def brute_prefix(spec: TokenWeights, ctx: int, starts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The weights of starts and labels [n,T], by the formula, token by token."""
    least, buckets = spec.least or ctx // 4, {}
    for row, at in (labels != IGNORED).nonzero().tolist():
        seen = at - int(starts[row, at]) + 1
        if seen >= least:
            buckets.setdefault((seen // least).bit_length(), []).append((row, at))
    weights, scored = torch.ones(labels.shape), int((labels != IGNORED).sum())
    for tokens in buckets.values():
        for row, at in tokens:
            weights[row, at] = min(spec.limit, 1 + spec.extra * scored / len(buckets) / len(tokens))
    return weights


def packed(g: torch.Generator, rows: int, ctx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Document starts and labels [rows,ctx] of drawn documents; some labels are not scored."""
    starts = torch.zeros(rows, ctx, dtype=torch.int64)
    for row in starts:
        for cut in torch.randint(1, ctx, (int(torch.randint(0, 4, (1,), generator=g)),), generator=g).sort().values:
            row[cut:] = cut
    labels = torch.randint(0, 50, (rows, ctx), generator=g)
    labels[torch.rand(rows, ctx, generator=g) < 0.2] = IGNORED
    return starts, labels


@pytest.mark.parametrize("seed", range(20))
def test_prefix_weights_equal_the_formula(seed):
    g = torch.Generator().manual_seed(seed)
    ctx = (16, 33, 64)[seed % 3]
    spec = TokenWeights(kind="prefix", extra=0.3, least=(None, 5, ctx - 1)[seed % 3], limit=(5.0, 1e6)[seed % 2])
    starts, labels = packed(g, 4, ctx)
    ours = torch.cat(prefix_weights(spec, ctx, [(starts[:3], labels[:3]), (starts[3:], labels[3:])], alone()))
    scored = labels != IGNORED
    torch.testing.assert_close(ours[scored], brute_prefix(spec, ctx, starts, labels)[scored])


def test_prefix_weights_give_away_the_extra_weight_and_are_counted_over_all_ranks():
    g = torch.Generator().manual_seed(3)
    spec = TokenWeights(kind="prefix", extra=0.5, limit=1e6)
    starts, labels = packed(g, 6, T)
    scored = labels != IGNORED
    (whole,) = prefix_weights(spec, T, [(starts, labels)], alone())
    assert whole[scored].sum() == pytest.approx(1.5 * int(scored.sum()), rel=1e-5)
    # Each of two ranks has three rows, and gets the sums of both.
    halves = [(starts[:3], labels[:3]), (starts[3:], labels[3:])]
    seen: list[list[int]] = []
    for half in halves:
        prefix_weights(spec, T, [half], alone(lambda *n: seen.append(list(n)) or list(n)))
    both = [sum(column) for column in zip(*seen, strict=True)]
    parts = [prefix_weights(spec, T, [half], alone(lambda *n: both))[0] for half in halves]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.fixture(scope="module")
def engine(model_dir) -> LocalEngine:
    model = load_model(str(model_dir("llama")), device="cpu").model
    next(model.parameters()).requires_grad_(True)
    return LocalEngine(model, OptimizerSpec())


@pytest.mark.parametrize("short", [2, 7, T - 1])
def test_longce_weights_equal_the_losses_of_truncated_texts(engine, short):
    g = torch.Generator().manual_seed(short)
    starts, labels = packed(g, 2, T)
    ids = torch.randint(10, 200, (2, T), generator=g)
    spec = TokenWeights(kind="longce", short=short, limit=2.0)
    ours = longce_weights(spec, ids, labels, starts, engine)
    with torch.no_grad():
        for row, at in (labels != IGNORED).nonzero().tolist():
            start, label = int(starts[row, at]), labels[row, at : at + 1]
            # The piece of the two layouts in which the token sees more.
            before, half = at - start, short // 2
            second = before if before < half else (before + short - half) % short
            inside = max(before % short, second)
            assert inside >= min(before, short - half - 1)  # at least about half of the short context
            whole, piece = (
                cross_entropy(engine.model(ids[row : row + 1, first : at + 1]).logits[0, -1:], label)
                for first in (start, at - inside)
            )
            expected = 1.0 if before < short else min(2.0, float((piece - whole).exp()))
            assert float(ours[row, at]) == pytest.approx(expected, rel=2e-4), (row, at)


def test_every_token_counts_the_same_by_default(engine):
    spec = build(FinetuneSpec, {"ctx": T}, source="test")
    micro = (torch.zeros(1, T, dtype=torch.int64),) * 3
    assert step_weights(spec, engine, [micro, micro], {}) == [None, None]
    # A row that fits in the short context has nothing to compare.
    spec = build(FinetuneSpec, {"ctx": 2, "token_weights": {"kind": "longce"}}, source="test")
    assert step_weights(spec, engine, [micro], {}) == [None]


def test_distillation_weighs_both_terms():
    g = torch.Generator().manual_seed(2)
    hidden, theirs, weight = (torch.randn(n, 8, generator=g) for n in (6, 6, 13))
    labels, w = torch.randint(0, 13, (6,), generator=g), torch.rand(6, generator=g) * 3
    hidden.requires_grad_()
    ones = torch.ones(6)
    p, q = (theirs @ weight.t()).log_softmax(-1), (hidden @ weight.t()).log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1) - q.gather(-1, labels[:, None])[:, 0]
    ours = distillation_loss(hidden, weight, theirs, weight, labels, ones * w, ones * w)
    torch.testing.assert_close(ours, (w * each).sum())


def trained(model: Path, text: Path, out: Path, **fields) -> list[float]:
    """The losses of a run's steps."""
    given = {
        "ctx": T,
        "steps": 2,
        "global_batch_size": 2,
        "data": {"source": str(text)},
        "validation": {"every_steps": None},
    }
    plan = plan_run(resolve(str(model)), build(FinetuneSpec, given | fields, source="test"))
    assert any(name == "token weights" for name, _ in plan.rows()) == ("token_weights" in fields)
    start_run(plan, out)
    run_finetune(plan, out, events=Events())
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(model_dir, text, tmp_path_factory) -> list[float]:
    return trained(model_dir("llama"), text, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("kind", ["prefix", "longce"])
def test_a_run_trains_with_them_and_does_not_depend_on_micro_batches(kind, plain, model_dir, text, tmp_path):
    model, weights = model_dir("llama"), {"token_weights": {"kind": kind}}
    one = trained(model, text, tmp_path / "one", **weights)
    two = trained(model, text, tmp_path / "two", micro_batch_size=2, **weights)
    assert one == pytest.approx(two, rel=1e-5)
    assert one[0] != pytest.approx(plain[0], rel=1e-6)  # a mean over other weights
    assert one[0] == pytest.approx(plain[0], rel=0.2)  # still nats a token


def test_a_conversion_heals_with_them(model_dir, text, tmp_path):
    from ctxext import api

    converted = api.convert(model_dir("llama"), "SN", sliding_window=16, out=tmp_path / "converted", gate=False).out
    given = {"distill": {}, "token_weights": {"kind": "longce", "short": 8}}
    assert len(trained(Path(converted), text, tmp_path / "healed", **given)) == 2


def test_longce_costs_three_more_forward_passes(model_dir, text):
    def flops(**fields) -> int:
        spec = build(FinetuneSpec, {"ctx": T, "data": {"source": str(text)}} | fields, source="test")
        return plan_run(resolve(str(model_dir("llama"))), spec).step_flops

    assert flops(token_weights={"kind": "prefix"}) == flops()
    assert 1.3 < flops(token_weights={"kind": "longce"}) / flops() < 2.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kind": "longce", "short": T}, "token_weights.short: 64 tokens with ctx 64"),
        ({"kind": "prefix", "least": 100}, "token_weights.least: 100 tokens with ctx 64"),
        ({"kind": "prefix", "short": 8}, "short: is an option of kind: longce"),
        ({"extra": 0.1}, "extra: is an option of kind: prefix"),
        ({"kind": "longce", "short": 1}, "short"),
        ({"kind": "prefix", "limit": 1.0}, "limit"),
        ({"kind": "exact"}, "kind"),
    ],
)  # fmt: skip
def test_weights_that_would_do_nothing_are_refused(weights, message, model_dir):
    with pytest.raises(InputError, match=message):
        plan_run(
            resolve(str(model_dir("llama"))), build(FinetuneSpec, {"ctx": T, "token_weights": weights}, source="test")
        )
