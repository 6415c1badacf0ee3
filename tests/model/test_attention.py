"""The seam: ctxext's attention in stock models equals stock attention, and naive where stock has none."""

import math

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from ctxext.errors import ModelError
from ctxext.model import attention
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.decode import generate
from ctxext.model.load import hidden_states, load_model
from ctxext.ops.masks import Pattern, document_starts, lower_bounds
from ctxext.ops.naive_attention import naive_attention

T = 61
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {},
}


@pytest.fixture(params=FAMILIES)
def directory(request, model_dir):
    return model_dir(request.param, **FAMILIES[request.param])


@pytest.fixture
def ids():
    return torch.randint(2, 260, (2, T), generator=torch.Generator().manual_seed(0))


def naive(
    module, query, key, value, mask, scaling=None, sliding_window=None, document_starts=None, group_size=None, **_
):
    pattern = Pattern(sliding_window, group_size if sliding_window is None else None)
    lo = lower_bounds(pattern, query.shape[2], document_starts=document_starts)
    return naive_attention(query, key, value, lo, scale=scaling).transpose(1, 2), None


def test_dense_and_sliding_equal_the_stock_model_and_switching_back_is_exact(directory, ids):
    stock = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa").eval()
    with torch.no_grad():
        truth = stock(ids).logits
        stock.set_attn_implementation(attention.register())
        ours = stock(ids).logits
        stock.set_attn_implementation("sdpa")
        again = stock(ids).logits
    torch.testing.assert_close(ours, truth, atol=2e-4, rtol=0)
    assert torch.equal(again, truth)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_groups_and_documents_reach_every_layer_outputs_and_gradients(directory, ids, checkpointing):
    AttentionInterface.register("ctxext_test_naive", naive)
    starts = torch.cat([document_starts([0, 1, 17, 40], T), document_starts([0, 33], T)])
    results = []
    for name in (attention.register(), "ctxext_test_naive"):
        model = load_model(directory).model
        model.set_attn_implementation(name)
        if checkpointing and name == attention.NAME:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        states = hidden_states(model, ids, document_starts=starts, group_size=9)
        states.square().mean().backward()
        results.append([states.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, atol=3e-4, rtol=1e-3)


def test_left_padding_is_a_document_that_starts_late(directory, ids):
    model = load_model(directory).model
    short = ids[1:, 20:]
    padded = torch.cat([torch.zeros(1, 20, dtype=ids.dtype), short], dim=1)
    mask = torch.cat([torch.zeros(1, 20), torch.ones_like(short)], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = model(short).logits
        beside = model(
            torch.cat([ids[:1], padded]),
            attention_mask=torch.cat([torch.ones_like(mask), mask]),
            position_ids=torch.cat([torch.arange(T)[None], positions]),
        ).logits[1:, 20:]
    torch.testing.assert_close(beside, alone, atol=2e-4, rtol=0)


def test_cached_decoding_equals_uncached(directory, ids):
    model = load_model(directory).model
    kept = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(ids[:1, :40], use_cache=use, **kept) for use in (True, False))
    assert torch.equal(cached, plain)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :23], use_cache=True)  # chunked: 23 tokens, then 38
        second = model(ids[:, 23:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full, atol=2e-4, rtol=0)


def test_perturbing_a_token_moves_nothing_before_it(directory, ids):
    model = load_model(directory).model
    other = ids.clone()
    other[:, 30] = (other[:, 30] + 1) % 260
    with torch.no_grad():
        a, b = (hidden_states(model, x, group_size=9) for x in (ids, other))
    assert torch.equal(a[:, :30], b[:, :30]) and not torch.equal(a[:, 30], b[:, 30])


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"dropout": 0.1}], ids=str)
def test_what_it_has_not_is_refused(given):
    q = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ModelError):
        attention.attend(torch.nn.Module(), q, q, q, None, **given)


def test_a_mask_of_all_pairs_is_refused(model_dir, ids):
    model = load_model(model_dir("llama")).model
    with pytest.raises(ModelError, match="no T x T mask"):
        model(ids, attention_mask=torch.ones(2, 1, T, T, dtype=torch.bool).tril())


def test_right_padding_and_static_caches_are_refused():
    mask = torch.tensor([[1, 1, 0]])
    with pytest.raises(ModelError, match="left"):
        attention.left_padding(q_length=3, kv_length=3, q_offset=0, kv_offset=0, attention_mask=mask)
    with pytest.raises(ModelError, match="static"):
        attention.left_padding(q_length=3, kv_length=8, q_offset=0, kv_offset=0, attention_mask=None)


A = 20.0  # of the log scale: small, so that it does much in a few tokens


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def hybrid(request, model_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("log") / "hybrid"
    run_conversion(plan_conversion(str(model_dir(request.param)), "SN", out=place, sliding_window=16), gate=False)
    return place


def by_hand(module, query, key, value, mask, scaling=None, sliding_window=None, document_starts=None, **_):
    """Naive attention; without a window (so: without positions) each query times its factor, one by one."""
    query = query.clone()
    for row in range(query.shape[0]):
        for i in range(query.shape[2] if sliding_window is None else 0):
            t = i - int(document_starts[row, i])
            query[row, :, i] *= math.log(t + A) / math.log(A)
    lo = lower_bounds(Pattern(sliding_window), query.shape[2], document_starts=document_starts)
    return naive_attention(query, key, value, lo, scale=scaling).transpose(1, 2), None


def test_the_log_scale_counts_from_each_documents_start_on_layers_without_positions(hybrid, ids):
    AttentionInterface.register("ctxext_test_log", by_hand)
    starts = torch.cat([document_starts([0, 1, 17, 40], T), document_starts([0, 33], T)])
    with torch.no_grad():
        plain = hidden_states(load_model(hybrid).model, ids, document_starts=starts)
        scaled = load_model(hybrid, nope_log_scale=A)
        ours = hidden_states(scaled.model, ids, document_starts=starts)
        alone = hidden_states(scaled.model, ids[:, 40:])  # the last document of the first row, by itself
        scaled.model.set_attn_implementation("ctxext_test_log")
        truth = hidden_states(scaled.model, ids, document_starts=starts)
    assert (truth - plain).abs().max() > 0.05
    torch.testing.assert_close(ours, truth, atol=3e-4, rtol=1e-3)
    assert "nope_log" not in scaled.model.config.to_json_string()
    if scaled.source.config.family.name == "mellum":  # SmolLM3 rotates by the place in the row
        torch.testing.assert_close(ours[:1, 40:], alone[:1], atol=3e-4, rtol=1e-3)


def test_the_log_scale_is_the_same_in_chunks_from_a_cache_and_behind_padding(hybrid, ids):
    model = load_model(hybrid, nope_log_scale=A).model
    prompts = [ids[0, :50].tolist(), ids[1, :23].tolist()]  # the second is padded by 27
    with torch.no_grad():
        expected = []
        for prompt in prompts:
            row = list(prompt)
            for _ in range(20):
                row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
            expected.append(row[len(prompt) :])
        plain = load_model(hybrid).model
        assert generate(model, prompts, 20, chunk=16) == expected != generate(plain, prompts, 20)
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :23], use_cache=True)
        second = model(ids[:, 23:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full, atol=2e-4, rtol=0)


def test_without_the_log_scale_nothing_changes(hybrid, ids, monkeypatch):
    with torch.no_grad():
        plain = load_model(hybrid).model(ids).logits
        monkeypatch.setattr(attention, "_by_log_position", None)  # it is not even called
        assert torch.equal(load_model(hybrid).model(ids).logits, plain)
