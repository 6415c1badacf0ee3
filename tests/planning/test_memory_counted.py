"""What training_memory counts for the peak of a step is what torch's allocator holds at that peak."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ctxext.config.loader import build
from ctxext.data.packing import Packed
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import resolve
from ctxext.train import recompute
from ctxext.train.engine import LocalEngine
from ctxext.train.finetune import _model, _teacher, training_device
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import forward_backward
from ctxext.train.run_plan import plan_run

pytestmark = pytest.mark.slow  # the profiler takes seconds
T = 2048
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
STATE = {"weights", "trainable", "runtime"}  # held before the step begins


def peak(plan):
    """Bytes that the allocator holds at most in a step, beyond what it held before."""
    device, dtype = training_device(plan)
    model = _model(plan, device, dtype)
    recompute.enable(model, plan.spec.memory, plan.patterns)
    engine = LocalEngine(model, plan.spec.optimizer, _teacher(plan, model, dtype))
    engine.model.train()
    ids = torch.randint(3, 250, (T,), generator=torch.Generator().manual_seed(0))
    packed = Packed(ids, torch.zeros(T, dtype=torch.int64), ids.roll(-1))
    rows = [packed] * plan.global_batch_size
    forward_backward(engine, rows, plan, 0)
    engine.step(1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        forward_backward(engine, rows, plan, 0)
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"attention": {"train": "s2"}}, {}),
        ({"attention": {"train": "dense"}, "dtype": "bfloat16"}, {"num_key_value_heads": 4}),
        ({"attention": {"train": "s2"}, "memory": {"checkpoint": False}}, {}),
        ({"attention": {"train": "s2"}, "memory": {"checkpoint": 2}}, {}),
        ({"attention": {"train": "s2", "group_size": 256}, "memory": {"tiles": 256}}, {}),
        ({"attention": {"train": "dense"}, "memory": {"keep": "attention"}}, {}),
        ({"lora": {"rank": 8, "target_modules": ["gate_proj", "down_proj"], "norms": "frozen"}}, {}),
    ],
    ids=["s2", "bf16", "kept", "every 2", "tiles", "keep", "mlp"],
)
def test_the_peak_of_a_step_is_what_was_counted(fields, sizes, model_dir):
    source = resolve(str(model_dir("llama", **SHAPE, **sizes)))
    given = {"ctx": T, "global_batch_size": 1, "lora": {"rank": 8}, **fields}
    plan = plan_run(source, build(FinetuneSpec, given, source="test"), gpu=False)
    counted = sum(size for name, size in plan.memory.items() if name not in STATE)
    assert counted == pytest.approx(peak(plan), rel=0.05 if plan.spec.memory.tiles is None else 0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"distill": {}},
        {"distill": {}, "dtype": "bfloat16"},
        {"distill": {"objectives": [{"ce": 1.0}]}},
        {"distill": {"objectives": [{"kl": 1.0, "top_k": 20}]}, "micro_batch_size": 2, "global_batch_size": 2},
        {"distill": {"objectives": [{"kl": 1.0, "hidden": 1.0}]}},
    ],
    ids=["kl", "bf16", "ce", "two rows", "hidden"],
)
def test_the_logits_of_a_teacher_are_counted(fields, model_dir, tmp_path):
    """With this vocabulary the peak is in the loss, which holds the logits of both models."""
    source = model_dir("llama", **SHAPE, vocab_size=1024)
    run_conversion(plan_conversion(str(source), "SN", out=tmp_path / "SN", sliding_window=64), gate=False)
    given = {"ctx": T, "global_batch_size": 1, "lora": {"rank": 8}, **fields}
    plan = plan_run(resolve(str(tmp_path / "SN")), build(FinetuneSpec, given, source="test"), gpu=False)
    counted = sum(size for name, size in plan.memory.items() if name not in STATE)
    assert counted == pytest.approx(peak(plan), rel=0.05)
