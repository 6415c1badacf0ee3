"""Chains of layers against stock models of the same layout, damages against whole logits, and what is in memory."""

import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ctxext.errors import ModelError
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind
from ctxext.model.load import hidden_states, load_model
from ctxext.model.relayout import relayout
from ctxext.model.shards import tensor_reader
from ctxext.model.source import resolve
from ctxext.retrofit.damage import Samples, answer_loss, final_states, head_scores, measure, open_layers, source_states

W, T, CPU = 7, 45, torch.device("cpu")
S, N, F = LayerKind(True, W), LayerKind(False, None), LayerKind(True, None)
LAYOUTS = {"SNSN": (S, N, S, N), "SSSF": (S, S, S, F), "NNNN": (N, N, N, N), "FSSF": (F, S, S, F)}
SOURCES = {
    "llama": {},
    "llama-gqa1": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 11},
    "qwen2": {},
    "qwen3": {},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
}


def token_rows(n=3, vocab=260, seed=0):
    return torch.randint(2, vocab, (n, T), generator=torch.Generator().manual_seed(seed))


def opened(directory, kinds=(S, N, F), read=None):
    source = resolve(str(directory))
    return open_layers(source.config, source.kinds, kinds, read or tensor_reader(directory), CPU)


def requested(ids, texts, last=40, needle=(20, 25)):
    """Samples whose questions end at `last`, with an answer up to the row's end and a needle further up."""
    answers, needles = torch.zeros(2, *ids.shape, dtype=torch.bool)
    answers[texts:, last : T - 1] = True
    needles[texts:, slice(*needle)] = True
    return Samples(ids, texts, answers, needles)


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_a_chain_is_the_stock_model_of_its_layout(model_dir, name):
    directory, ids = model_dir(name.split("-")[0], **SOURCES[name]), token_rows()
    stock = load_model(directory, device="cpu")
    layers = opened(directory)
    states = final_states(layers, ids, list(LAYOUTS.values()))
    for layout in LAYOUTS.values():
        model = relayout(stock.model, hybrid_config(stock.source.config, layout))
        torch.testing.assert_close(states[layout], hidden_states(model, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(source_states(layers, ids), hidden_states(stock.model, ids), rtol=0, atol=1e-5)
    assert (states[LAYOUTS["SNSN"]] - states[LAYOUTS["FSSF"]]).abs().max() > 0.1


def test_a_layout_that_no_stock_class_has_is_measured_all_the_same(model_dir):
    """One NoPE layer among RoPE ones in a qwen3: Mellum cannot say it, a chain can."""
    layers, layout = opened(model_dir("qwen3")), (F, N, F, F)
    with pytest.raises(ModelError, match="in all or in none"):
        hybrid_config(layers.config, layout)
    samples = requested(token_rows(), texts=3)
    truth = source_states(layers, samples.ids)
    one, none = measure(layers, samples, [layout, (F, F, F, F)], truth)
    assert one.text > 0.01 and none.text == none.loss == 0


@pytest.mark.parametrize("vocab", [260, 65_536])  # at 65,536 the logits come in chunks of 256 positions
@torch.no_grad()
def test_damage_is_what_whole_logits_say(model_dir, vocab):
    directory = model_dir("llama", vocab_size=vocab, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    layers, samples = opened(directory), requested(token_rows(9, vocab), texts=7)
    stock, layout = load_model(directory, device="cpu"), LAYOUTS["SNSN"]
    student = relayout(stock.model, hybrid_config(stock.source.config, layout))
    meant, given = (log_softmax(model(samples.ids).logits, -1) for model in (stock.model, student))
    labels = samples.ids.roll(-1, 1)
    kl = kl_div(given, meant, reduction="none", log_target=True).sum(-1)  # [n, T]
    losses = [cross_entropy(p[:7, :-1].flatten(0, 1), labels[:7, :-1].flatten()) for p in (given, meant)]

    truth = source_states(layers, samples.ids)
    (damage,) = measure(layers, samples, [layout], truth)
    assert damage.text == pytest.approx(float(kl[:7, :-1].mean()), rel=1e-4)
    assert damage.answer == pytest.approx(float(kl[7:, 40 : T - 1].mean()), rel=1e-4)
    assert damage.loss == pytest.approx(float(losses[0] - losses[1]), abs=1e-4)
    assert damage.score(0.5) == damage.text + 0.5 * damage.answer
    expected = cross_entropy(meant[7:, 40 : T - 1].flatten(0, 1), labels[7:, 40 : T - 1].flatten())
    assert answer_loss(layers, samples, truth) == pytest.approx(float(expected), rel=1e-5)


def test_buckets_double_and_a_window_costs_nothing_within_itself(model_dir):
    directory = model_dir("llama", max_position_embeddings=512)
    wide = LayerKind(True, 100)
    ids = torch.randint(2, 260, (2, 300), generator=torch.Generator().manual_seed(1))
    none = torch.zeros_like(ids, dtype=torch.bool)
    layers, samples = opened(directory, [wide]), Samples(ids, 2, none, none)
    (damage,) = measure(layers, samples, [(wide,) * 4], source_states(layers, ids))
    assert [bucket[:2] for bucket in damage.buckets] == [(1, 64), (64, 128), (128, 256), (256, 300)]
    costs = [bucket[2] for bucket in damage.buckets]
    assert costs[0] == 0 and 0 < costs[1] < costs[2]
    assert damage.text == pytest.approx(sum((b - a) * cost for a, b, cost in damage.buckets) / 299, rel=1e-9)
    assert damage.answer is None and head_scores(layers, samples) is None


def test_layouts_that_begin_alike_share_their_layers_and_turns_change_nothing(model_dir):
    layers, samples = opened(model_dir("llama")), requested(token_rows(), texts=2)
    singles = [(*(F,) * i, kind, *(F,) * (3 - i)) for kind in (S, N) for i in range(4)]
    truth, calls = source_states(layers, samples.ids), []
    together = measure(layers, samples, singles, truth, lambda *n: calls.append(n))
    assert calls == [
        (i + 1, 4**2 + 2 * 4 - 1) for i in range(4**2 + 2 * 4 - 1)
    ]  # one less: the source is not asked for
    in_turns = measure(layers, samples, [*singles, singles[0]], truth, state_bytes=3 * truth.nbytes)
    assert in_turns == [*together, together[0]]
    assert len(set(together)) == 8


def test_one_layer_is_in_memory_at_a_time(model_dir):
    """Every tensor the reader hands out is on a numpy array of its own, whose end is seen."""
    directory = model_dir("llama", num_hidden_layers=6)
    stored, alive, most = tensor_reader(directory), {}, 0

    def read(name):
        nonlocal most
        array = stored(name).numpy().copy()
        alive[id(array)] = array.nbytes
        weakref.finalize(array, alive.pop, id(array))
        most = max(most, sum(alive.values()))
        return torch.from_numpy(array)

    layers, samples = opened(directory, [S, N], read), requested(token_rows(), texts=2)
    truth = source_states(layers, samples.ids)
    streamed = measure(layers, samples, [(S, N) * 3, (N, S) * 3], truth)
    head_scores(layers, samples)
    sizes = {name: tensor.nbytes for name in [*layers_of(6), "lm_head.weight"] if (tensor := stored(name)) is not None}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert most <= layer + sizes["lm_head.weight"], "more than a layer and a head's worth was alive at once"

    held = {name: stored(name) for name in [*sizes, "model.embed_tokens.weight", "model.norm.weight"]}
    in_memory = opened(directory, [S, N], held.get)
    assert measure(in_memory, samples, [(S, N) * 3, (N, S) * 3], source_states(in_memory, samples.ids)) == streamed


def layers_of(count):
    projections = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    names = [*projections, "input_layernorm", "post_attention_layernorm"]
    return [f"model.layers.{i}.{name}.weight" for i in range(count) for name in names]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@torch.no_grad()
def test_head_scores_are_the_attention_that_eager_shows(model_dir, name):
    from transformers import AutoModelForCausalLM

    changes = {"mistral": {"sliding_window": 18}}.get(name, {})  # the window cuts the needle in two: 23 <= key
    directory = model_dir(name, **changes)
    samples = requested(token_rows(5), texts=2)
    found = head_scores(opened(directory), samples)
    eager = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    shown = eager(samples.ids[2:], output_attentions=True).attentions  # L x [B, H, T, T]
    expected = torch.stack([layer[:, :, 40, 20:25].sum(-1).mean(0) for layer in shown])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.shape == (4, 4) and found.max() > 0.1


def test_a_weight_that_is_missing_is_named(model_dir):
    layers = opened(model_dir("llama"), [S], lambda name: None)
    with pytest.raises(ModelError, match=r"no model\.embed_tokens\.weight"):
        source_states(layers, token_rows())
