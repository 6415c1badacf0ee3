import math

import pytest
import torch

from ctxext.train import optimizer as optimizer_module
from ctxext.train.finetune_spec import OptimizerSpec
from ctxext.train.optimizer import MasterAdamW, RelativeClip, rate_factor


def test_a_bf16_norm_moves_in_its_master_though_not_in_bf16():
    norm = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"norm": norm}, OptimizerSpec(learning_rate=2e-5))
    for _ in range(50):
        (norm.float() * torch.arange(1.0, 5.0)).sum().backward()
        assert norm.grad is None  # led to the master
        optimizer.step(1.0, 1.0)
    assert (optimizer.masters["norm"] < 1 - 9e-4).all()
    assert (norm == 1).all()  # 0.999 rounds to 1 in bf16: what PEFT's bf16 copy would have stayed at for ever
    for _ in range(200):
        norm.float().sum().backward()
        optimizer.step(1.0, 1.0)
    assert (norm < 1).all()


def test_gradients_of_bf16_parameters_add_up_in_fp32():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"p": parameter}, OptimizerSpec())
    for _ in range(300):
        parameter.float().sum().backward()
    assert optimizer.masters["p"].grad.item() == 300  # bf16 would stop at 256
    assert optimizer.gradient_norm() == 300


def test_fp32_parameters_step_as_torch_adamw_does():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = MasterAdamW({"p": ours}, OptimizerSpec(learning_rate=1e-2, weight_decay=0.1))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999))
    for _ in range(5):
        target = torch.randn(3, 3)
        for parameter in (ours, theirs):
            (parameter - target).square().sum().backward()
        optimizer.step(1.0, 1.0)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(ours, theirs)


def test_all_of_a_resumed_state_is_where_the_weights_are(monkeypatch):
    """The fused kernel of an accelerator reads `step` there; "meta" stands in for one here."""
    monkeypatch.setattr(
        optimizer_module, "_adamw", lambda name, options, betas: torch.optim.AdamW(options, betas=betas)
    )
    there = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = MasterAdamW({"p": there}, OptimizerSpec())
    held = {"master/p": torch.ones(2), "step/p": torch.tensor(3.0), "exp_avg/p": torch.ones(2)}
    optimizer.load(held | {"exp_avg_sq/p": torch.ones(2)})
    assert {key: value.device.type for key, value in optimizer.adamw.state[there].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


def test_modules_trained_whole_have_their_own_rate_beside_an_adapter():
    parameters = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in ("q.lora_A.default.weight", "norm.weight")}
    groups = MasterAdamW(parameters, OptimizerSpec(learning_rate=1e-5, whole_learning_rate=1e-3)).adamw.param_groups
    assert sorted(group["lr"] for group in groups) == [1e-5, 1e-3]


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("cosine", 0.1), ("wsd", 0.0)])
def test_schedules_warm_up_and_end_where_they_say(schedule, end):
    spec = OptimizerSpec(warmup_steps=10, schedule=schedule)
    factors = [rate_factor(step, 100, spec) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and max(factors) <= 1.0
    assert math.isclose(factors[-1], end, abs_tol=0.06)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_the_clip_is_relative_and_ordinary_gradients_of_an_adapter_pass():
    clip = RelativeClip(3.0)
    assert all(clip.scale(20.0 + i % 3) == 1.0 for i in range(50))
    assert clip.scale(630.0) == pytest.approx(3 * 21 / 630, rel=0.05)
    assert clip.scale(20.0) == 1.0
