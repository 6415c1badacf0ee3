"""On an accelerator: what a layer recomputes, tiles or moves gives the same gradients, and the peak falls."""

import pytest
import torch
from transformers import AutoModelForCausalLM, SmolLM3Config

from ctxext.model import attention
from ctxext.model.load import hidden_states
from ctxext.ops.masks import Pattern, document_starts
from ctxext.train import recompute
from ctxext.train.finetune_spec import MemorySpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU paths were not run"),
]
T, E, LAYERS, G = 16 * 1024 + 1, 256, 12, 4096
MEMORIES = {
    "keep": MemorySpec(keep="attention"),
    "tiles": MemorySpec(tiles=1024),
    "offload": MemorySpec(offload=True),
    "tiles, offload": MemorySpec(tiles=1024, offload=True),
    "all": MemorySpec(keep="attention", tiles=1024, offload=True),
}
LOWER = {"tiles": "plain", "offload": "plain", "tiles, offload": "tiles"}  # whose peak is lower than whose


def step(memory: MemorySpec, packed: bool, dtype: torch.dtype):
    """The gradients of two micro-batches, and the peak in bytes over what was there before."""
    attention.register()
    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3)
    config = SmolLM3Config(
        vocab_size=64,
        hidden_size=E,
        intermediate_size=3 * E,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=128,
        layer_types=kinds,
        no_rope_layers=[1, 1, 0] * (LAYERS // 3),
        max_position_embeddings=T,
        pad_token_id=None,
        attn_implementation=attention.NAME,
    )
    model = AutoModelForCausalLM.from_config(config).to("cuda", dtype).train()
    patterns = [Pattern(128) if kind == "sliding_attention" else Pattern(None, G) for kind in kinds]
    assert recompute.enable(model, memory, patterns) == []
    starts = document_starts([0, 5000, 5001, 9000], T) if packed else None
    weight = torch.randn(1, T, E, generator=torch.Generator().manual_seed(2)).cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for seed in range(2):
        ids = torch.randint(0, 64, (1, T), generator=torch.Generator().manual_seed(seed)).cuda()
        states = hidden_states(model, ids, group_size=G, document_starts=starts)
        (states.float() * weight).mean().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, peak


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-1)], ids=["fp32", "bf16"])
def test_gradients_are_those_of_plain_checkpointing_and_the_peak_is_lower(memory, packed, dtype, tolerance):
    wanted, _ = step(MemorySpec(), packed, dtype)
    found, peak = step(MEMORIES[memory], packed, dtype)
    for name, want in wanted.items():
        worst = ((found[name] - want).float().norm() / want.float().norm().clamp_min(1e-6)).item()
        assert worst <= tolerance, f"the gradient of {name} differs by {worst:.1e}"
    if memory in LOWER:
        reference = MEMORIES.get(LOWER[memory], MemorySpec())
        del wanted, found
        assert peak < step(reference, packed, dtype)[1], f"{memory} peaks no lower than {LOWER[memory]}"
