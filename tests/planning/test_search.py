"""The search against brute force, the longest context against its neighbour, the printed command against its plan."""

import itertools
import json
import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ctxext.cli.app import app
from ctxext.errors import CheckFailed, InputError
from ctxext.model.source import resolve
from ctxext.planning import search
from ctxext.planning.answer import answer, ask
from ctxext.planning.cards import card_rates
from ctxext.planning.time import estimate
from ctxext.train import parallel
from ctxext.train import run_plan as planning
from ctxext.train.parallel import Host, Launch, read_zero

ctxext = CliRunner()


def requested(model="tinyllama-1.1b", ctx="16k", **given):
    given = {"gpu": "24gb", "preset": "lora-alpha", "fixed": {}} | given
    return ask(model, ctx, **given)


@pytest.mark.parametrize("memory", ["24G", "12G", "8G"])
def test_the_fastest_is_that_of_brute_force(memory):
    """Every combination by hand, each planned as `finetune` would plan it."""
    question, rates = requested(gpu="h100", memory=memory, fixed={"memory.offload": False}, cards_=2)
    best = None
    spaces = [("s2", "dense"), ("none", "nf4"), ("adamw", "adamw8bit"), (True, False), ("nothing", "attention"),
              (None, 16_384, 4096, 1024)]  # fmt: skip
    names = ("attention.train", "memory.quantize", "optimizer.name", "memory.checkpoint", "memory.keep", "memory.tiles")
    launches = [None, *((zero, ranks) for zero in search.STAGES for ranks in (1, 2))]
    for values, launch in itertools.product(itertools.product(*spaces), launches):
        changes = dict(zip(names, values, strict=True))
        if launch and launch[1] == 1 and "offload" not in launch[0]:
            continue
        try:
            plan = search.plan_with(question, question.source, changes)
            where = Launch(read_zero(launch[0]), (Host("far", launch[1]),)) if launch else None
            if where:
                parallel._check(plan, where)
        except InputError:
            continue
        partition = where.partition if where else search.WHOLE
        plan = planning.divided(plan, partition)
        if sum(plan.memory.values()) <= question.memory:
            best = max(best or 0, estimate(plan, rates, partition).tokens_per_second)
    found = search.fitting(list(search.choices(question)), rates)
    assert (found[0][1].tokens_per_second if found else None) == pytest.approx(best, rel=1e-3)


def test_the_longest_fits_and_a_step_longer_does_not():
    question, _ = requested(memory="12G")
    furthest = search.longest(question)
    ctx = furthest.plan.spec.ctx
    assert ctx % search.STEP == 0 and furthest.needed <= question.memory
    assert all(choice.needed > question.memory for choice in search.choices(question, ctx + search.STEP))
    assert any(choice.needed <= question.memory for choice in search.choices(question, ctx))


@pytest.mark.parametrize("fixed", [{"rope_scaling": "yarn"}, {"attention.group_size": 8192}])
def test_short_contexts_that_are_refused_do_not_hide_the_longest(fixed):
    question, _ = requested(fixed=fixed)
    with pytest.raises(InputError):
        list(search.choices(question, search.STEP))
    furthest = search.longest(question)
    ctx = furthest.plan.spec.ctx
    assert ctx > 16_384 and furthest.needed <= question.memory
    assert all(choice.needed > question.memory for choice in search.choices(question, ctx + search.STEP))


def test_an_optimizer_on_the_host_hangs_on_the_hosts_memory():
    fixed = {"tuning": "full", "tokens_per_step": 2048}
    question, rates = requested("llama2-7b", "2k", gpu="h100", memory="30G", fixed=fixed)
    fit = search.fitting(list(search.choices(question)), rates)
    hangs = search.dominating(fit, rates)
    assert hangs["rate"] == "host_memory"
    assert hangs["slower_if_20_percent_less"] == pytest.approx(0.25 * hangs["share"])


@pytest.mark.parametrize(("cards", "gpu"), [(1, "24gb"), (8, "24gb"), (3, "h100")])
def test_the_printed_commands_plan_what_was_printed(cards, gpu, monkeypatch, tmp_path):
    found = answer(*requested(gpu=gpu, cards_=cards))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "visible_gpus", lambda: cards)
    monkeypatch.setattr(parallel, "visible_gpus", lambda: cards)
    for _, choice in found.commands():
        (line,) = choice.commands()
        words = shlex.split(line)
        assert words[:2] == ["ctxext", "finetune"]
        result = ctxext.invoke(app, [*words[1:], "--plan", "--json"])
        assert result.exit_code == 0, result.output
        planned = json.loads(result.stdout)
        assert planned["memory"]["total"] == choice.needed
        assert planned["step_flops"] == choice.plan.step_flops
        assert planned["launch"]["processes"] == choice.ranks


def test_a_hybrid_is_planned_as_its_conversion_is(model_dir, tmp_path):
    from ctxext.model.convert import plan_conversion, run_conversion

    model = str(model_dir("llama"))
    question, _ = requested(model, "256", hybrid="swa128-nope", fixed={"attention.train": "dense"})
    planned = next(search.choices(question))
    assert planned.commands()[0].startswith(f"ctxext convert {model} --hybrid swa128-nope --out ")
    out = tmp_path / "converted"
    run_conversion(plan_conversion(model, "swa128-nope", out=out), gate=False)
    real = search.plan_with(question, resolve(str(out)), planned.changes)
    assert real.memory == planned.plan.memory and real.step_flops == planned.plan.step_flops
    assert real.kinds == planned.plan.kinds and real.positions == planned.plan.positions


def test_what_was_given_is_not_searched():
    question, _ = requested(fixed={"attention.train": "dense", "memory.tiles": 4096})
    for choice in search.choices(question):
        assert not {"attention.train", "memory.tiles"} & choice.changes.keys()
        assert choice.plan.group_size is None and choice.plan.spec.memory.tiles == 4096
    longlora, _ = requested(preset="longlora")  # which says attention.train: s2
    assert all(choice.plan.group_size for choice in search.choices(longlora))


def test_listed_leaves_out_what_turns_more_for_nothing():
    question, rates = requested(gpu=None, memory="80G")
    fit = search.fitting(list(search.choices(question)), rates)
    shown = search.listed(fit)
    assert len(shown) == 4 and shown[0] is fit[0][0]
    speeds = [choice.timed(rates).seconds for choice in shown]
    assert speeds == sorted(speeds)
    for faster, slower in itertools.combinations(shown, 2):
        assert not faster.knobs <= slower.knobs


def test_the_rate_that_dominates_is_the_one_with_the_most_seconds():
    question, rates = requested(ctx="128k", gpu=None, memory="140G")
    fit = search.fitting(list(search.choices(question)), rates)
    hangs, took = search.dominating(fit, rates), fit[0][1]
    assert hangs["rate"] == max(took.by_rate(), key=took.by_rate().get)
    slower = fit[0][0].timed(rates.times(hangs["rate"], 0.8)).seconds
    assert hangs["slower_if_20_percent_less"] == pytest.approx(slower / took.seconds - 1)
    assert slower == pytest.approx(took.seconds * (1 + 0.25 * hangs["share"]))


def test_where_nothing_fits_it_is_said():
    found = answer(*requested("llama2-70b", "100k", fixed={"memory.tiles": None}))
    assert found.listed == [] and found.as_dict()["fastest"] is None
    with pytest.raises(CheckFailed, match="no configuration fits: at least .* mostly layer"):
        found.refuse()


def test_on_a_cpu_what_waits_on_the_host_waits_in_the_same_memory():
    question, _ = requested("tiny", "4k")
    here = replace(question, gpu=False, fields={"memory": {"offload": True}})
    choice = next(search.choices(here))
    assert choice.needed == sum(choice.plan.memory.values()) + choice.host > choice.host > 0
    assert card_rates("a100-40", packed=True).link > 0


def test_a_model_with_one_head_is_planned_without_s2(model_dir):
    """S²-Attn shifts half of the heads: auto leaves it out, and asked for by name it is refused."""
    one = str(model_dir("llama", num_attention_heads=1, num_key_value_heads=1))
    question, _ = requested(one, "1k")
    found = list(search.choices(question))
    assert found and all(choice.plan.group_size is None for choice in found)
    with pytest.raises(InputError, match="there is one"):
        list(search.choices(requested(one, "1k", fixed={"attention.train": "s2"})[0]))
    with pytest.raises(InputError, match="there is one"):
        search.plan_with(question, question.source, {"attention.train": "s2"})
