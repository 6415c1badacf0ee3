"""Out of memory is answered with what is largest and what to turn; the estimate moves as each knob says."""

import pytest
import torch

from ctxext.config.loader import build
from ctxext.errors import EnvironmentFault
from ctxext.model.source import resolve
from ctxext.ops import cost
from ctxext.train import loop
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.memory_options import next_knob
from ctxext.train.parallel import Host, Launch, read_zero
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import divided, plan_run


def plan_for(model, gpu=False, **fields):
    spec = build(FinetuneSpec, {"ctx": "100k", **fields}, source="test")
    return plan_run(resolve(model, weights=False), spec, gpu=gpu)


@pytest.mark.parametrize(
    ("memory", "fields", "knob"),
    [
        ({"checkpoint": False}, {}, "memory.checkpoint=true"),
        ({}, {"micro_batch_size": 2, "global_batch_size": 2}, "micro_batch_size=1"),
        ({"checkpoint": 8}, {"dtype": "bfloat16"}, "memory.checkpoint=true"),
        ({"offload": True}, {"dtype": "bfloat16"}, "memory.tiles=4096"),
        ({}, {"dtype": "bfloat16"}, "memory.tiles=4096"),
        ({}, {"dtype": "float32"}, "memory.offload=true"),
        ({"offload": True, "tiles": 4096}, {"dtype": "bfloat16", "attention": {"train": "s2", "group_size": 2048}},
         "--zero 3 over several cards, or memory.quantize=nf4"),
        ({"offload": True, "tiles": 4096, "quantize": "nf4"}, {"dtype": "bfloat16", "attention":
         {"train": "s2", "group_size": 2048}}, "optimizer.name=adamw8bit"),
        # what keeps the numbers comes first, also where the weights or what trains are the largest item
        ({}, {"dtype": "bfloat16", "ctx": "8k"}, "memory.tiles=4096"),
        ({"tiles": 4096}, {"dtype": "bfloat16", "ctx": "8k"}, "memory.offload=true"),
        ({}, {"dtype": "bfloat16", "ctx": "4k", "tuning": "full"}, "memory.offload=true"),
        ({"offload": True}, {"dtype": "bfloat16", "ctx": "4k", "tuning": "full"},
         "--zero 2 over several cards, or optimizer.name=adamw8bit"),
        # tiles do nothing for layers that train dense, and cannot keep sink tokens
        ({"offload": True}, {"dtype": "bfloat16", "attention": {"train": "dense"}},
         "--zero 3 over several cards, or memory.quantize=nf4"),
        ({"offload": True}, {"dtype": "bfloat16", "attention": {"train": "s2", "sinks": 1}},
         "--zero 3 over several cards, or memory.quantize=nf4"),
    ],
)  # fmt: skip
def test_the_next_knob_is_against_the_largest_item_and_keeps_the_numbers_if_one_can(memory, fields, knob):
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


def test_a_checkpoint_every_k_layers_trades_inputs_for_layers_that_live_together():
    T, E, F = 102_400, 4096, 11_008
    found = {
        k: plan_for("llama2-7b", dtype="bfloat16", memory={"checkpoint": k}).memory for k in (True, 4, 5, 32, False)
    }
    assert found[True] == plan_for("llama2-7b", dtype="bfloat16", memory={"checkpoint": 1}).memory
    # bytes of one input; of all that a layer keeps for its backward pass, its input with it: of its norms' inputs in
    # fp32 and what they make of them in bf16 12 E, of q, k, v, their attention 8 E, of LoRA's inputs in fp32 16 E
    X, live = 2 * T * E, T * ((12 + 8 + 16 + 2) * E + 6 * F)
    for k, inputs in ((4, 8), (5, 7), (32, 1)):
        assert found[k]["checkpoints"] == inputs * X
        assert found[k]["layer"] == found[1]["layer"] + (k - 1) * live
        assert found[k].items() - found[1].items() == {(name, found[k][name]) for name in ("checkpoints", "layer")}
    assert found[False]["activations"] == 32 * live
    four = {"checkpoint": 4, "offload": True}
    assert plan_for("llama2-7b", dtype="bfloat16", memory=four).memory["checkpoints"] == 2 * X
    flops = [plan_for("llama2-7b", memory={"checkpoint": k}).step_flops for k in (1, 4)]
    assert flops[0] == flops[1]


def test_zero_divides_what_its_stage_divides():
    """Of 8 processes; P trainable parameters have 12 bytes of master and moments and 4 of gradient each."""
    plan = plan_for("llama2-7b", dtype="bfloat16", tuning="full", global_batch_size=8)
    P, weights = plan.trainables.parameters, plan.memory["weights"]

    def memory(name, world=8):
        return divided(plan, Launch(read_zero(name), (Host("localhost", world),)).partition).memory

    assert plan.memory["trainable"] == 16 * P
    for name, state, kept in (
        ("1", 12 * P / 8 + 4 * P, weights),
        ("2", 16 * P / 8, weights),
        ("3", 16 * P / 8, weights / 8),
        ("2_offload", 0, weights),
        ("3_offload", 0, 0),
    ):
        found = memory(name)
        assert found.get("trainable", 0) == pytest.approx(state, abs=2), name
        assert found.get("weights", 0) == pytest.approx(kept, abs=2), name
        assert found.get("gathered weights", 0) == (2 * 1_050_000_000 if "3" in name else 0), name
        assert all(found[item] == plan.memory[item] for item in ("checkpoints", "layer", "loss", "runtime")), name
    for name in ("1", "3"):  # alone there is nothing to divide; the bucket is there all the same
        alone = memory(name, world=1)
        assert alone.pop("buckets") == 10**9 * (2 if name == "1" else 1) and alone == plan.memory
    assert [memory(name)["buckets"] for name in ("1", "2", "3")] == [2 * 10**9, 2 * 10**9, 10**9]
    shared, alone = (
        divided(plan_for("tiny", ctx=512, tuning="full", global_batch_size=2), partition).memory
        for partition in (Launch(read_zero("1"), (Host("localhost", 2),)).partition, cost.WHOLE)
    )
    P = shared["buckets"] // 4  # an fp32 weight is its own master where there is one process; DeepSpeed's are copies
    assert alone["trainable"] == 12 * P and shared["trainable"] == 12 * P // 2 + 4 * P
    # a bucket holds no more than there is to send
    plan = plan_for("llama2-7b", gpu=True, dtype="bfloat16", global_batch_size=8)
    P = plan.trainables.parameters
    assert P < 500_000_000 and [memory(name)["buckets"] for name in ("2", "3")] == [2 * 2 * P, 2 * P]
    plan = plan_for("llama2-7b", dtype="bfloat16", global_batch_size=8)  # a CPU never touches the second buffer then
    assert memory("2")["buckets"] == 2 * P


def test_micro_batches_are_no_larger_than_what_a_process_gets():
    plan = plan_for("tiny", ctx=512, micro_batch_size=4, global_batch_size=4)
    alone = plan_for("tiny", ctx=512, micro_batch_size=2, global_batch_size=4)
    two = divided(plan, Launch(read_zero("1"), (Host("localhost", 2),)).partition)
    assert two.memory["checkpoints"] == alone.memory["checkpoints"] < plan.memory["checkpoints"]


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
    with pytest.raises(EnvironmentFault, match=r"out of memory at ctx 64.*the largest parts are runtime") as caught:
        run_finetune(plan, tmp_path / "run")
    assert "--set" in caught.value.hint and "=" in caught.value.hint


def test_tiles_of_a_dense_phase_are_counted():
    """A run that ends dense needs the room of its dense steps, whose full layers are no tiles."""
    s2 = {"train": "s2", "group_size": 2048}
    tiled, ends = (
        plan_for("llama2-7b", dtype="bfloat16", memory={"tiles": 4096}, attention=s2 | more).memory["layer"]
        for more in ({}, {"dense_last": 0.5})
    )
    dense = plan_for("llama2-7b", dtype="bfloat16", memory={"tiles": 4096}, attention={"train": "dense"})
    assert tiled < ends == dense.memory["layer"]


def test_a_dense_phase_without_a_step_is_not_counted():
    """A share that rounds to no step, and a first context that ends before the dense steps begin."""
    given = {"dtype": "bfloat16", "memory": {"tiles": 4096}, "stages": ["32k"], "steps": 4}
    none, little, half = (
        plan_for("llama2-7b", attention={"train": "s2", "dense_last": share}, **given) for share in (0, 0.1, 0.5)
    )
    assert little.memory == none.memory and little.earlier[0].memory == none.earlier[0].memory
    assert half.memory["layer"] > none.memory["layer"] and half.earlier[0].memory == none.earlier[0].memory
