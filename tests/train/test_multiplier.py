"""The search for lora.multiplier: same start and data in every trial, judged on held-out text, nothing left behind."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ctxext.config.loader import build
from ctxext.errors import CheckFailed, InputError
from ctxext.model.source import resolve
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.multiplier import GRID, SMALL, MultiplierSearch, Trial, find_multiplier, plan_trials, run_trial
from ctxext.train.run_plan import plan_run

QUIET = Events()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def make_plan(model_dir, text):
    def make(**fields):
        given = {"ctx": 64, "steps": 4, "global_batch_size": 1, "data": {"source": str(text)}, **fields}
        return plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, given, source="test"))

    return make


def trial(multiplier: float, held_out: float, training: float = 2.0, stopped: str | None = None) -> Trial:
    return Trial(multiplier, ((1, 3.0), (4, training)), ((0, 3.0), (4, held_out)), stopped)


def test_held_out_loss_decides_and_the_training_loss_does_not():
    found = MultiplierSearch((trial(0.25, 2.5, 2.4), trial(1, 2.0, 2.3), trial(4, 2.2, 0.1)), given=1, steps=4)
    assert found.best.multiplier == 1 and found.option == "--set lora.multiplier=1" and found.remarks == ()
    diverged = (trial(0.25, 2.5), trial(1, 1.0, stopped="step 3: the loss is nan"), trial(4, 2.6))
    assert MultiplierSearch(diverged, given=1, steps=4).best.multiplier == 0.25
    assert "trials" in MultiplierSearch(diverged, given=1, steps=4).as_dict()


def test_what_is_to_be_known_of_the_best_is_said():
    edge = MultiplierSearch((trial(0.05, 2.5), trial(0.2, 2.0)), given=0.05, steps=4)
    assert edge.option == "--set lora.multiplier=0.2" and "0.2 is at one end" in edge.remarks[0]
    near = MultiplierSearch(
        (trial(0.5, 2.5), trial(1, 2.0 + SMALL / 2), trial(2, 2.0), trial(4, 2.2)), given=1, steps=4
    )
    assert near.remarks == (f"the difference to 1 is small ({SMALL / 2:.4f} nats a token)",)
    far = MultiplierSearch((trial(0.5, 2.5), trial(1, 2.0 + 2 * SMALL), trial(2, 2.0), trial(4, 2.2)), given=1, steps=4)
    assert far.remarks == ()
    worse = MultiplierSearch((trial(0.5, 3.2), trial(1, 3.1), trial(2, 3.4)), given=1, steps=4)
    assert "no multiplier lowered" in worse.remarks[0]


def test_trials_differ_in_the_multiplier_alone(make_plan):
    plan = make_plan(lora={"multiplier": 0.5}, steps=10, optimizer={"warmup_steps": 20})
    trials = plan_trials(plan)
    assert (
        [t.spec.lora.multiplier for t in trials]
        == [0.5 * factor for factor in GRID]
        == sorted(t.spec.lora.multiplier for t in trials)
    )
    scales = [t.trainables.lora[0].scale for t in trials]
    assert scales == pytest.approx([factor * plan.trainables.lora[0].scale for factor in GRID])
    assert {t.spec.optimizer.warmup_steps for t in trials} == {2} and {t.steps for t in trials} == {10}
    assert {t.spec.faults.on_divergence for t in trials} == {"stop"}
    same = [replace(t.spec, lora=plan.spec.lora) for t in trials]
    assert all(spec == same[0] for spec in same)


def test_what_has_no_multiplier_or_nothing_to_judge_by_is_refused(make_plan, tmp_path):
    for fields, told in (
        ({"tuning": "full"}, "no lora.multiplier"),
        ({"ctx": 128, "stages": [64]}, "one context"),
        ({"validation": {"every_steps": None}}, "holds out no text"),
    ):
        with pytest.raises(InputError, match=told):
            plan_trials(make_plan(**fields))
    short = tmp_path / "short.txt"
    short.write_text("too short to hold a tenth of it out " * 10)
    trials = plan_trials(make_plan(data={"source": str(short)}))
    with pytest.raises(InputError, match="too short to hold out a part"):
        find_multiplier(trials, tmp_path / "scratch", 1.0, QUIET, lambda t: pytest.fail("trained all the same"))


def test_every_trial_starts_alike_and_leaves_its_curves_alone(make_plan, tmp_path):
    trials = plan_trials(make_plan(optimizer={"learning_rate": 1e-3}))
    seen = list[float]()
    found = find_multiplier(trials[4:7:2], tmp_path / "scratch", 1.0, QUIET, lambda t: seen.append(t.multiplier))
    assert seen == [t.multiplier for t in found.trials] == [1.0, 4.0]
    assert len({t.held_out[0] for t in found.trials}) == 1 and len({t.training[0] for t in found.trials}) == 1
    assert len({t.final for t in found.trials}) == 2
    assert all([step for step, _ in t.training] == [1, 2, 3, 4] for t in found.trials)
    assert not any((tmp_path / "scratch").glob("*"))
    again = run_trial(trials[4], tmp_path / "again")
    assert again == found.trials[0] and not (tmp_path / "again").exists()


def test_a_trial_that_diverges_is_reported_and_is_not_fatal(make_plan, tmp_path):
    fields = {"steps": 12, "optimizer": {"learning_rate": 0.3, "warmup_steps": 0}, "faults": {"spike": 0.5}}
    trials = plan_trials(make_plan(**fields))
    found = find_multiplier([trials[0], trials[-1]], tmp_path / "scratch", 1.0, QUIET, lambda t: None)
    assert found.trials[1].final is None and found.trials[1].stopped
    assert found.best is found.trials[0] and len(found.trials[1].training) < 12
    with pytest.raises(CheckFailed, match="every multiplier from 4 to 4 diverged"):
        find_multiplier(trials[-1:], tmp_path / "scratch", 1.0, QUIET, lambda t: None)
    assert not any((tmp_path / "scratch").glob("*"))


def test_an_interruption_ends_the_search_and_leaves_nothing(make_plan, tmp_path):
    trials, steps = plan_trials(make_plan()), list[int]()

    def interrupt(metrics) -> None:
        steps.append(metrics.step)
        if len(steps) == 6:  # in the second trial
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        find_multiplier(trials, tmp_path / "scratch", 1.0, Events(on_step=interrupt), lambda t: None)
    assert steps == [1, 2, 3, 4, 1, 2] and not any((tmp_path / "scratch").glob("*"))
