"""The seam in stock classes nobody changed: other families' windows, RoPE, norms and scalings, and torch.compile."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    MellumConfig,
    Olmo3Config,
    Phi3Config,
    SmolLM3Config,
)
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3RotaryEmbedding

from ctxext.errors import ModelError
from ctxext.model import attention
from ctxext.ops.masks import Pattern, document_starts, lower_bounds
from ctxext.ops.naive_attention import naive_attention

T, W, G = 61, 16, 9
NAIVE = "ctxext_test_seam"
LOGITS = {"atol": 5e-5, "rtol": 0}  # the largest logit is 5 or so; fp32
GRADIENTS = {"atol": 5e-6, "rtol": 1e-4}
S, F = "sliding_attention", "full_attention"
TYPES = [S, F, S, F]
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
PER_TYPE = {
    F: {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.0},
    S: {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "smollm3": (
        SmolLM3Config,
        {"layer_types": TYPES, "use_sliding_window": True, "sliding_window": W, "no_rope_layers": [1, 0, 0, 1]},
    ),
    "mellum": (
        MellumConfig,
        {
            "layer_types": TYPES,
            "sliding_window": W,
            "head_dim": 8,
            "rope_parameters": PER_TYPE,
            "mlp_layer_types": ["dense"] * 4,
        },
    ),
    "olmo3": (Olmo3Config, {"layer_types": TYPES, "sliding_window": W}),
    "gemma3": (
        Gemma3TextConfig,
        {"layer_types": TYPES, "sliding_window": W, "head_dim": 8, "query_pre_attn_scalar": 24},
    ),
    "phi3": (Phi3Config, {"sliding_window": W, "original_max_position_embeddings": 64}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "gpt2": (GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def build(config_class, **changes):
    """A random model on its own eager attention, with norms and biases that are not ones and zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | changes), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    config_class, changes = FAMILIES[request.param]
    return build(config_class, **changes)


@pytest.fixture
def ids():
    return torch.randint(2, 260, (2, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def starts():
    return torch.cat([document_starts([0, 1, 17, 40], T), document_starts([0, 33], T)])


def naive(
    module, query, key, value, mask, scaling=None, sliding_window=None, document_starts=None, group_size=None, **_
):
    pattern = Pattern(sliding_window, group_size if sliding_window is None else None)
    lo = lower_bounds(pattern, query.shape[2], document_starts=document_starts)
    return naive_attention(query, key, value, lo, scale=scaling).transpose(1, 2), None


def gradients(model, loss):
    """Every parameter's gradient of a loss, by name; none is missing."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_all_close(ours, truth):
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], **GRADIENTS, msg=lambda text, name=name: f"{name}: {text}")


def test_logits_and_gradients_equal_the_stock_model_and_switching_back_is_exact(model, ids):
    logits, grads = {}, {}
    for turn, name in enumerate(["eager", attention.register(), "eager"]):
        model.set_attn_implementation(name)
        out = model(ids, labels=ids)
        logits[turn], grads[turn] = out.logits.detach(), gradients(model, out.loss)
    torch.testing.assert_close(logits[1], logits[0], **LOGITS)
    assert_all_close(grads[1], grads[0])
    assert torch.equal(logits[2], logits[0]) and not torch.equal(logits[1], logits[0])


def test_groups_and_documents_reach_every_layer_outputs_and_gradients(model, ids, starts):
    AttentionInterface.register(NAIVE, naive)
    model.set_attn_implementation(NAIVE)
    truth = model(ids, labels=ids, document_starts=starts, group_size=G)
    truth_grads = gradients(model, truth.loss)
    model.set_attn_implementation(attention.register())
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours = model(ids, labels=ids, use_cache=False, document_starts=starts, group_size=G)
    torch.testing.assert_close(ours.logits, truth.logits, **LOGITS)
    assert_all_close(gradients(model, ours.loss), truth_grads)


@torch.no_grad()
def test_perturbing_a_token_moves_nothing_before_it(model, ids):
    model.set_attn_implementation(attention.register())
    other = ids.clone()
    other[:, 30] = (other[:, 30] + 1) % 260
    a, b = (model(x, group_size=G).logits for x in (ids, other))
    assert torch.equal(a[:, :30], b[:, :30]) and not torch.equal(a[:, 30], b[:, 30])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_in_chunks_equals_the_stock_model_uncached(model, ids, padded):
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :20] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if padded else {}
    truth = model(ids, use_cache=False, **given).logits
    model.set_attn_implementation(attention.register())
    uncached = model(ids, use_cache=False, **given).logits
    cache, chunks = None, []
    for a, b in [(0, 23), (23, 47), (47, 48), (48, T)]:
        now = {"attention_mask": mask[:, :b], "position_ids": given["position_ids"][:, a:b]} if padded else {}
        out = model(ids[:, a:b], past_key_values=cache, use_cache=True, **now)
        cache = out.past_key_values
        chunks.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(uncached[real], truth[real], **LOGITS)
    torch.testing.assert_close(torch.cat(chunks, 1)[real], uncached[real], **LOGITS)


def test_learned_sinks_are_those_of_a_class_of_others(ids):
    """gpt-oss has the same sinks as GraniteSWA, as one more column of the scores."""
    changes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = GptOssConfig(**SIZES | changes, sliding_window=W, layer_types=TYPES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.randn_like(layer.self_attn.sinks))
        theirs = model(ids).logits
        model.set_attn_implementation(attention.register())
        torch.testing.assert_close(model(ids).logits, theirs, rtol=1e-4, atol=1e-5)


def test_soft_capping_is_refused(ids):
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=50.0, sliding_window=W, layer_types=TYPES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model(ids)
    model.set_attn_implementation(attention.register())
    with pytest.raises(ModelError, match="soft-capping"):
        model(ids)


PACKED = torch.cat([torch.arange(30), torch.arange(T - 30)])[None]
CHUNKED = {"layer_types": ["chunked_attention", F], "attention_chunk_size": W, "num_hidden_layers": 2, "head_dim": 8}
DENSE = {"intermediate_size_mlp": 48, "num_local_experts": 1, "num_experts_per_tok": 1, "moe_layers": []}


@pytest.mark.parametrize(
    ("config_class", "changes", "given"),
    [
        (Phi3Config, {}, {"position_ids": PACKED, "use_cache": False}),
        (Phi3Config, {}, {"attention_mask": torch.ones(2, 1, T, T, dtype=torch.bool).tril()}),
        (Phi3Config, {"is_causal": False}, {}),
        (Gemma3TextConfig, {"head_dim": 8, "use_bidirectional_attention": True, "sliding_window": W}, {}),
        (Llama4TextConfig, CHUNKED | DENSE, {}),
    ],
    ids=["packed_by_position_ids", "4d_mask", "not_causal", "bidirectional", "chunked"],
)
def test_a_mask_that_says_more_than_padding_is_refused(config_class, changes, given, ids):
    model = build(config_class, **changes)
    model(ids, **given)
    model.set_attn_implementation(attention.register())
    with pytest.raises(ModelError):
        model(ids, **given)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer_type", TYPES[:2])
def test_a_compiled_layer_equals_itself_and_new_documents_compile_nothing_new(layer_type, backend, starts):
    torch.manual_seed(0)
    config = SmolLM3Config(**SIZES, layer_types=TYPES, use_sliding_window=True, sliding_window=W)
    config._attn_implementation = attention.register()
    layer = SmolLM3DecoderLayer(config, TYPES.index(layer_type))
    x = torch.randn(2, T, 32, requires_grad=True)
    rope = SmolLM3RotaryEmbedding(config)(x, torch.arange(T)[None])

    def run(function, starts):
        out = function(x, position_embeddings=rope, document_starts=starts, group_size=G)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), [x, *layer.parameters()])]

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend)
    for recompiling_is_an_error, these in [(False, starts), (True, starts.flip(0))]:
        with torch._dynamo.config.patch(error_on_recompile=recompiling_is_an_error):
            results = run(compiled, these)
        for ours, truth in zip(results, run(layer, these), strict=True):
            torch.testing.assert_close(ours, truth, atol=1e-6, rtol=1e-4)
