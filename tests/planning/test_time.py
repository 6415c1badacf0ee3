"""Seconds and FLOPs by part against the tables worked out by hand, and the parts against each other."""

from dataclasses import replace

import pytest

from ctxext.config.loader import build
from ctxext.machine.cards import CARDS, find_card
from ctxext.model.source import resolve
from ctxext.ops.cost import Partition
from ctxext.planning.cards import card_rates
from ctxext.planning.search import converted
from ctxext.planning.time import computed_pairs, estimate
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_plan import plan_run

T = 100_000
RATES = card_rates("h200", packed=False)
SHARED = Partition(ranks=8, stage=3)


def plan_for(hybrid=None, model="llama2-7b", **fields):
    source = resolve(model, weights=False)
    source = source if hybrid is None else converted(source, hybrid)
    given = {"ctx": T, "global_batch_size": 1, **fields}
    return plan_run(source, build(FinetuneSpec, given, source="test"), gpu=True)


def seconds(took, *rates):
    return sum(part.seconds for part in took.parts if part.rate in rates and part.name != "adapters")


@pytest.mark.parametrize(
    ("hybrid", "train", "petaflop", "own", "flash2"),
    [
        (None, "dense", 15.8, 26.2, 40.3),
        (None, "s2", 6.7, 10.5, 13.8),
        ("swa", "dense", 6.9, 10.8, 14.4),
        ("swa", "s2", 4.7, 6.9, 7.7),
    ],
)
def test_a_7b_at_100k_on_an_h200(hybrid, train, petaflop, own, flash2, tmp_path):
    """The floors on paper: (linear + head) / 700 + attention / 620 and 540, or 370 and 320. They compute the MLP's last
    matrix again, which torch's checkpoint does not."""
    if hybrid:
        hybrid = str(tmp_path / "swa.yaml")
        (tmp_path / "swa.yaml").write_text("layer_pattern: SSSF\nsliding_window: 128\n")
    plan = plan_for(hybrid, attention={"train": train})
    assert plan.step_flops / 1e15 == pytest.approx(petaflop, rel=0.03)
    not_again = 2 * T * 32 * 4096 * 11_008 / 700e12
    for packed, table in ((False, own), (True, flash2)):
        took = estimate(plan, card_rates("h200", packed=packed))
        assert seconds(took, "linear", "attention") == pytest.approx(table - not_again, rel=0.03)
        assert took.tokens_per_second == pytest.approx(T / took.seconds)


def test_adapters_compute_in_fp32():
    """Of rank 16 on q, k, v and o, 4096 wide: forward, again, and both gradients, at a card's fp32 rate."""
    plan = plan_for(lora={"rank": 16, "alpha": 1024.0})
    (part,) = (part for part in estimate(plan, RATES).parts if part.name == "adapters")
    assert part.flops == 4 * 2 * T * 32 * 16 * 4 * (4096 + 4096)
    assert part.rate == "adapters" and part.seconds == pytest.approx(part.flops / (67e12 * 700 / 989))


@pytest.mark.parametrize("fields", [{}, {"tuning": "full"}, {"memory": {"checkpoint": False}}])
def test_parts_add_up_to_the_step(fields):
    plan = plan_for(attention={"train": "s2"}, **fields)
    parts = estimate(plan, RATES).parts
    flops = sum(part.flops for part in parts if part.name != "adapters")
    more = 5 + 2 * (1 + bool(plan.spec.memory.checkpoint))  # units of attention; blocks are computed whole
    pairs = computed_pairs(plan.source.shape, T, (None, T // 4), gpu=True)
    attended = sum(p.flops for p in parts if p.rate == "attention")
    assert attended == pytest.approx(32 * pairs * 2 * 128 * more, rel=1e-6)
    skipped = 2 * T * 32 * 4096 * 11_008 if plan.spec.memory.checkpoint else 0
    assert flops == pytest.approx(plan.step_flops - skipped, rel=0.01)


def test_knobs_cost_what_they_cost():
    def took(**fields):
        return estimate(plan_for(attention={"train": "dense"}, **fields), RATES)

    plain, kept = took(), took(memory={"keep": "attention"})
    names = {part.name for part in plain.parts}
    assert "attention, again" in names and "attention, again" not in {part.name for part in kept.parts}
    assert kept.seconds < plain.seconds < took(memory={"tiles": 4096}).seconds
    assert took(memory={"checkpoint": False}).seconds < kept.seconds
    assert took(tuning="full").seconds > plain.seconds
    offloaded = took(memory={"offload": True}).seconds  # beside 30 s of computation 2 x 26 GB are nothing
    assert offloaded == pytest.approx(plain.seconds)
    waiting = plan_for(attention={"train": "dense"}, memory={"offload": True})
    slow = RATES.times("host", 0.01)
    assert estimate(waiting, slow).seconds == pytest.approx(2 * 32 * T * 4096 * 2 / slow.host, rel=1e-6)


def test_several_cards_divide_the_sequences_and_talk():
    plan = plan_for(attention={"train": "dense"}, global_batch_size=8)
    alone, shared = estimate(plan, RATES), estimate(plan, RATES, SHARED)
    assert alone.tokens == shared.tokens == 8 * T
    assert alone.seconds / 8 < shared.seconds < alone.seconds / 8 * 1.2
    gathered = next(part for part in shared.parts if part.name == "weights gathered")
    assert gathered.moved == pytest.approx(3 * 13.5e9 * 7 / 8, rel=0.01)


def test_a_sliding_layer_computes_whole_blocks():
    shape = replace(resolve("llama2-7b", weights=False).shape, num_heads=1, num_kv_heads=1)
    assert computed_pairs(shape, 8192, (128, None), gpu=False) == 8192 * (128 + 64)
    assert computed_pairs(shape, 8192, (1024, None), gpu=False) == 8192 * (1024 + 256)
    assert computed_pairs(shape, 64, (128, None), gpu=True) == 64 * 64


def test_rates_are_taken_between_widths():
    rates = replace(RATES, linear=((256, 100.0), (512, 200.0), (1024, 300.0)))
    assert [rates.linear_at(width) for width in (64, 256, 384, 512, 1024, 9000)] == [100, 100, 150, 200, 300, 300]
    assert rates.times("linear", 0.5).linear_at(384) == 75
    assert (
        rates.linear_at(384, "adapters")
        == rates.times("adapters", 2).linear_at(9, "adapters") / 2
        == RATES.adapters[0][1]
    )
    assert rates.times("attention", 2).attention["full"] == tuple(2 * rate for rate in rates.attention["full"])
    assert rates.times("stream", 2).stream == 2 * rates.stream


def test_cards():
    assert find_card("24GB")[0] == "3090" and find_card("h200")[1].peak == 989e12
    for name, card in CARDS.items():
        rates = card_rates(name, packed=True)
        assert not rates.measured and "arithmetic" in rates.source and name in rates.source
        slower = rates.attention["full"][0] < card_rates(name, packed=False).attention["full"][0]
        assert slower == card.hopper
