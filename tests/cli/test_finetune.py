"""What `ctxext finetune` prints of a plan and of a run that is done: every number with what it is of."""

from pathlib import Path

import pytest

from ctxext.config.loader import build
from ctxext.finetuning import PlannedRun
from ctxext.model.source import resolve
from ctxext.train.finetune import FinetuneReport
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_plan import plan_run

REPORT = FinetuneReport("runs/a", True, 1, 1, 3.0, 2.0, (3.5, 2.5), 4.0, 3 * 2**30, 0, 0, 7, 0.004)


def plan_for(*, gpu: bool = False, **fields):
    data = {"ctx": "2k", "steps": 1, "global_batch_size": 1, **fields}
    return plan_run(resolve("tiny", weights=False), build(FinetuneSpec, data, source="test"), gpu=gpu)


def finished(plan):
    return dict(PlannedRun(Path("runs/a"), plan, None, resume=False, repeats=None).finished_rows(REPORT))


def test_on_a_cpu_the_resident_set_is_not_set_beside_what_is_held_as_if_it_were_one_thing():
    cpu, gpu = (finished(plan_for(gpu=on))["peak memory"] for on in (False, True))
    assert cpu.startswith("3 GiB resident, freed blocks included; ") and cpu.endswith(" predicted to be held")
    assert gpu.startswith("3 GiB, predicted ")


def test_losses_name_their_context_where_there_were_several():
    rows = finished(plan_for())
    assert rows["loss"] == "3.000 -> 2.000 nats a token" and "ctx" not in rows["held-out loss"]
    rows = finished(plan_for(stages=["512", "1k"], steps=3))
    assert rows["loss"] == "3.000 -> 2.000 nats a token at ctx 2,048"
    assert rows["held-out loss"] == "3.500 -> 2.500 nats a token at ctx 2,048, with the attention of inference"


@pytest.mark.parametrize(("batch", "words"), [(1, "1 sequence, 2,048 tokens, 1 forward of 1,"), (2, "2 sequences, ")])
def test_one_sequence_is_no_plural(batch, words):
    plan = plan_for(global_batch_size=batch)
    assert words in dict(plan.rows())["a step"]
    assert finished(plan)["gradient spikes"] == "0 of 1 step scaled down"
