"""On an accelerator: an optimizer that was put back steps on, to the same weights."""

import pytest
import torch

from ctxext.train.finetune_spec import OptimizerSpec
from ctxext.train.optimizer import MasterAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU paths were not run"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_from_a_checkpoint_steps_as_the_one_that_wrote_it(dtype):
    def make():
        weight = torch.nn.Parameter(torch.ones(64, device="cuda", dtype=dtype))
        return MasterAdamW({"p": weight}, OptimizerSpec())

    def step(optimizer):
        for parameter in optimizer.parameters.values():
            parameter.square().sum().backward()
        optimizer.step(1.0, 1.0)

    whole, again = make(), make()
    for _ in range(3):
        step(whole)
    again.load({name: tensor.cpu() for name, tensor in whole.tensors().items()})  # as a checkpoint holds it
    for optimizer in (whole, again):
        step(optimizer)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in whole.tensors().items())
