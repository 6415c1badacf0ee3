"""Counts against real models and real bounds, FLOPs and bytes against published or independently derived numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ctxext.ops.cost import (
    ModelShape,
    attention_pairs,
    forward_flops,
    kv_cache_bytes,
    layer_pairs,
    loss_chunk,
    parameter_count,
    step_flops,
    training_memory,
)
from ctxext.ops.masks import Pattern, first_shifted_head, lower_bounds


def llama(E, L, H, K, F, V, **rest) -> ModelShape:
    return ModelShape(
        hidden_size=E, num_layers=L, num_heads=H, num_kv_heads=K, head_dim=rest.pop("D", E // H), intermediate_size=F,
        vocab_size=V, tied=rest.pop("tied", False), **rest,
    )  # fmt: skip


LLAMA2_7B = llama(4096, 32, 32, 32, 11008, 32000)
FULL = (None, None)


@pytest.mark.parametrize(
    ("model", "config", "extra"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (LlamaForCausalLM, LlamaConfig, {"tied": True, "D": 24}),
        (Qwen2ForCausalLM, Qwen2Config, {"attention_bias": True}),
        (Qwen3ForCausalLM, Qwen3Config, {"qk_norm": True, "D": 24}),
    ],
)
def test_parameters_of_real_models(model, config, extra):
    shape = llama(64, 3, 4, 2, 160, 300, **extra)
    with torch.device("meta"):
        built = model(
            config(
                hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=160, vocab_size=300, head_dim=shape.head_dim, tie_word_embeddings=shape.tied,
            )
        )  # fmt: skip
    assert parameter_count(shape) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(
    ("L", "E", "want"), [(10, 384, 14_999_424), (12, 512, 31_470_080), (16, 640, 64_901_760), (18, 768, 104_427_264)]
)
def test_parameters_published_without_embeddings(L, E, want):
    """arXiv 2606.15378: KV width 128, MLP 2.5 E; the counts its code was released with."""
    shape = llama(E, L, E // 64, 2, 5 * E // 2, 73_448, D=64)
    assert parameter_count(shape, embeddings=False) == want


@given(T=st.integers(1, 200), W=st.none() | st.integers(1, 220), G=st.none() | st.integers(2, 220))
@settings(max_examples=200, deadline=None)
def test_pairs_are_the_sum_over_the_bounds(T, W, G):
    lo = lower_bounds(Pattern(W, G), T)[0]
    want = (torch.arange(T) - lo + 1).sum(-1).tolist()
    assert [attention_pairs(T, W, G, shifted=half == 1) for half in range(len(want))] == want


def test_pairs_of_a_layer_follow_the_halves():
    shape, T, G = llama(90, 1, 9, 3, 10, 10), 100, 24
    f = first_shifted_head(9, 3)
    want = f * attention_pairs(T, None, G) + (9 - f) * attention_pairs(T, None, G, shifted=True)
    assert layer_pairs(shape, T, (None, G)) == want and f == 6
    assert layer_pairs(shape, T, (12, None)) == 9 * attention_pairs(T, 12)


@pytest.mark.parametrize(
    ("layers", "petaflop"),
    [
        ([FULL] * 32, 15.8),
        ([(None, 25_000)] * 32, 6.7),
        ([(128, None)] * 24 + [FULL] * 8, 6.9),
        ([(128, None)] * 24 + [(None, 25_000)] * 8, 4.7),
    ],
)
def test_step_of_a_7b_at_100k(layers, petaflop):
    """The floors worked out by hand for llama2-7b, LoRA, checkpointed, T = 100,000."""
    assert step_flops(LLAMA2_7B, layers, 100_000) / 1e15 == pytest.approx(petaflop, abs=0.07)


def test_what_a_step_adds():
    layers = [FULL] * 32
    forward = forward_flops(LLAMA2_7B, layers, 1000)
    plain, again, full = (
        step_flops(LLAMA2_7B, layers, 1000, again=c, trains=w) for c, w in ((False, False), (True, False), (True, True))
    )
    layers[0] = (128, None)
    repeats = step_flops(LLAMA2_7B, layers, 1000) - step_flops(LLAMA2_7B, layers, 1000, kept=True)
    assert repeats == 31 * 32 * (1000 * 1001 // 2) * 4 * 128, "kept attention of full layers is not computed again"
    head = 2 * 1000 * 32_000 * 4096
    assert again - plain == forward - head, "checkpointing repeats the layers' forward, not the head"
    assert full - again == 2 * 1000 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_000 * 4096)


def test_cache_bytes():
    shape = llama(64, 4, 4, 2, 160, 300)
    assert kv_cache_bytes(shape, [None] * 4, 1000) == 2 * 4 * 1000 * 2 * 16 * 2
    assert kv_cache_bytes(shape, [128, None, 128, 2000], 1000, 4) == 2 * (256 + 2000) * 2 * 16 * 4


def test_training_memory_of_a_7b_at_100k():
    """Chunked loss 65 GB, within 5%. Whole logits hold 6 bytes a token and entry while the last norm's states wait."""
    items = training_memory(LLAMA2_7B, [FULL] * 32, 100_000, trainable=139_800_000)
    assert all(isinstance(size, int) and size >= 0 for size in items.values())
    assert sum(items.values()) / 1e9 == pytest.approx(65, rel=0.05)
    whole = training_memory(LLAMA2_7B, [FULL] * 32, 100_000, trainable=139_800_000, chunk=100_000)
    assert whole["layer"] == 100_000 * (5 * 4096 * 2 + 6 * 32_000) > items["layer"]


def test_training_memory_moves_with_its_arguments():
    def total(**changes):
        arguments = {"T": 8192, "micro_batch": 1, "trainable": 10**7} | changes
        return sum(training_memory(LLAMA2_7B, [FULL] * 32, **arguments).values())

    assert total(micro_batch=2) == total(T=16_384) > total()
    assert total(checkpointing=False) > 2 * total()
    assert total(item_bytes=4) > 1.8 * total() - 2.5e9
    assert total(trainable=2 * 10**7) - total() == 16 * 10**7


def test_loss_chunk():
    assert loss_chunk(32_000) * 32_000 * 4 <= 64 * 1024**2 < (loss_chunk(32_000) + 1) * 32_000 * 4
    assert loss_chunk(10**9) == 16


@pytest.mark.parametrize(
    ("V", "cpu", "gpu"),
    [(512, 32_768, 32_768), (32_000, 524, 1024), (128_256, 130, 1024), (152_064, 110, 882), (262_144, 64, 512)],
)
def test_a_gpu_takes_larger_chunks_of_logits_within_512_mib(V, cpu, gpu):
    assert (loss_chunk(V), loss_chunk(V, gpu=True)) == (cpu, gpu)
    assert loss_chunk(V, gpu=True) >= cpu and 4 * V * gpu <= 512 * 2**20
