"""Out of memory is answered with what is largest and what to turn; the estimate moves as each knob says."""

import pytest
import torch

from ctxext.config.loader import build
from ctxext.errors import EnvironmentFault
from ctxext.model.source import resolve
from ctxext.train import loop
from ctxext.train.finetune import run_finetune
from ctxext.train.memory import next_knob
from ctxext.train.plan import plan_run
from ctxext.train.run import start_run
from ctxext.train.spec import FinetuneSpec


def plan_for(model, **fields):
    return plan_run(resolve(model, weights=False), build(FinetuneSpec, {"ctx": "100k", **fields}, source="test"))


@pytest.mark.parametrize(
    ("memory", "fields", "knob"),
    [
        ({"checkpoint": False}, {}, "memory.checkpoint=true"),
        ({}, {"micro_batch_size": 2, "global_batch_size": 2}, "micro_batch_size=1"),
        ({"offload": True}, {"dtype": "bfloat16"}, "memory.tiles=4096"),
        ({}, {"dtype": "bfloat16"}, "memory.offload=true"),
        ({"offload": True, "tiles": 4096}, {"dtype": "bfloat16", "attention": {"train": "s2", "group_size": 2048}},
         "memory.quantize=nf4"),
        ({"offload": True, "tiles": 4096, "quantize": "nf4"}, {"dtype": "bfloat16", "attention":
         {"train": "s2", "group_size": 2048}}, "optimizer.name=adamw8bit, or --zero 2 over several cards"),
    ],
)  # fmt: skip
def test_the_next_knob_is_against_the_largest_item(memory, fields, knob):
    assert next_knob(plan_for("llama2-7b", memory=memory, **fields)) == knob


def test_every_knob_lowers_its_item_and_no_other():
    def memory(**knobs):
        return plan_for(
            "llama2-7b", dtype="bfloat16", attention={"train": "s2", "group_size": 2048}, memory=knobs
        ).memory

    plain = memory()
    for knobs, item in (
        ({"offload": True}, "checkpoints"),
        ({"tiles": 4096}, "layer"),
        ({"quantize": "nf4"}, "weights"),
    ):
        changed = memory(**knobs)
        assert changed[item] < 0.6 * plain[item], knobs
        assert {name: size for name, size in changed.items() if name != item} == {
            name: size for name, size in plain.items() if name != item
        }
    eight = plan_for("llama2-7b", dtype="bfloat16", optimizer={"name": "adamw8bit"}).memory["trainable"]
    assert eight == plain["trainable"] * 10 // 16
    X = 102_400 * 4096 * 2
    assert memory(keep="attention")["kept attention"] == 32 * (X + 102_400 * 32 * 4)


@pytest.mark.parametrize("kind", ["gpu", "cpu", "python"])
def test_out_of_memory_is_told_kindly(kind, model_dir, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("some words to train on. " * 500)
    fields = {"ctx": 64, "steps": 1, "global_batch_size": 1, "data": {"source": str(text)}}
    plan = plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))

    def planted(*arguments):
        if kind == "cpu":
            torch.empty(2**50)
        raise torch.OutOfMemoryError("CUDA out of memory.") if kind == "gpu" else MemoryError()

    monkeypatch.setattr(loop, "forward_backward", planted)
    start_run(plan, tmp_path / "run")
    with pytest.raises(EnvironmentFault, match=r"out of memory at ctx 64: .*most of it runtime") as caught:
        run_finetune(plan, tmp_path / "run")
    assert "--set" in caught.value.hint and "=" in caught.value.hint
