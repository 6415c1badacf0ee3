"""What a layer keeps, recomputes, tiles or moves changes no number: against no checkpointing, loss and every gradient.

In float64 throughout: the stock RMSNorm works in float32 inside and is replaced by torch's, which does not.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from functools import lru_cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from ctxext.errors import InputError, ModelError
from ctxext.model import attention
from ctxext.model.load import causal_lm, hidden_states
from ctxext.model.model_config import parse_config
from ctxext.ops.masks import Pattern, document_starts
from ctxext.train import recompute, tiles
from ctxext.train.finetune_spec import MemorySpec

E, F, W = 32, 112, 16
SIZES = {
    "vocab_size": 50,
    "hidden_size": E,
    "intermediate_size": F,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "attn_implementation": attention.NAME,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": W}
HYBRID = WINDOWED | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "smollm3": (SmolLM3Config, HYBRID | {"no_rope_layers": [1, 0, 1]}),
    "mistral": (MistralConfig, {"sliding_window": W}),
    "qwen2": (Qwen2Config, HYBRID),
    "qwen3": (Qwen3Config, HYBRID | {"head_dim": 8}),
    "granite_swa": (
        GraniteSWAConfig,
        {"sliding_window": W, "layer_types": HYBRID["layer_types"], "layer_rope_theta": [10000.0, 0, 10000.0],
         "attention_multiplier": 8**-0.5, "attention_bias": True},
    ),
}  # fmt: skip
KINDS = {"llama, S²": ("llama", 24), "llama, odd S²": ("llama", 15), "hybrid": ("smollm3", None)}
KINDS |= {"hybrid, S²": ("smollm3", 24), "LoRA, hybrid": ("smollm3", None), "LoRA, S²": ("llama", 24)}
KINDS |= {"sinks, S²": ("granite_swa", 24)}
MEMORIES = {
    "plain": {},
    "keep": {"keep": "attention"},
    "tiles 7": {"tiles": 7},
    "tiles 48": {"tiles": 48},
    "tiles 1000": {"tiles": 1000},
    "offload": {"offload": True},
    "tiles, offload": {"tiles": 30, "offload": True},
    "keep, offload": {"keep": "attention", "offload": True},
    "all": {"keep": "attention", "tiles": 20, "offload": True},
    "two": {"checkpoint": 2},
    "three, offload": {"checkpoint": 3, "offload": True},
}


def build(name: str, stock_norms: bool = False):
    attention.register()
    torch.manual_seed(0)
    make, own = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(make(**SIZES | own))
    for path, module in list(model.named_modules()):
        if path.endswith("norm") and not stock_norms:
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            model.get_submodule(path.rpartition(".")[0]).register_module(path.rpartition(".")[2], norm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().train()


def with_lora(model):
    """LoRA on attention and one MLP matrix, norms and embeddings whole, B not zero."""
    whole = [name for name, _ in model.named_modules() if name.endswith(("norm", "embed_tokens"))]
    adapted = get_peft_model(
        model, LoraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], modules_to_save=whole)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return adapted.double()


def patterns_of(model, group):
    """As a plan derives them: from the config, by the family's row."""
    config = parse_config(causal_lm(model).config.to_dict())
    windows = [kind.sliding_window for kind in config.kinds]
    return [Pattern(window) if window else Pattern(None, group) for window in windows]


def model_of(kind: str):
    name, group = KINDS[kind]
    model = build(name)
    return (with_lora(model) if "LoRA" in kind else model), group


def rows(T: int) -> torch.Tensor:
    """Two rows of documents: some shorter than a halo, one as long as several tiles."""
    bounds = ([0, 50, 51, 84, 90, 199], [0, 9, 130])
    return torch.cat([document_starts([b for b in row if b < T], T) for row in bounds])


def ids_of(T: int) -> torch.Tensor:
    return torch.randint(2, 50, (2, T), generator=torch.Generator().manual_seed(T))


def step(model, group, T, packed):
    """The loss of two rows and the gradient of everything that trains."""
    starts = rows(T) if packed else None
    states = hidden_states(model, ids_of(T), group_size=group, document_starts=starts, backend="auto")
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (states * weight).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@lru_cache(maxsize=64)
def truth(kind, T, packed):
    model, group = model_of(kind)
    return step(model, group, T, packed)


def assert_same(found, wanted, tolerance=1e-11):
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=0)
    assert found[1].keys() == wanted[1].keys()
    for name, want in wanted[1].items():
        got = found[1][name]
        assert (got is None) == (want is None), f"{name}: {'no' if got is None else 'a'} gradient"
        if want is not None:
            worst = ((got - want).abs().max() / want.abs().max().clamp_min(1e-4)).item()
            assert worst <= tolerance, f"the gradient of {name} differs by {worst:.1e}"


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_without_checkpointing(kind, packed, memory):
    for T in (200,) if "LoRA" in kind else (61, 130, 200):
        model, group = model_of(kind)
        assert recompute.enable(model, MemorySpec(**MEMORIES[memory]), patterns_of(model, group)) == []
        assert_same(step(model, group, T, packed), truth(kind, T, packed))


@pytest.mark.parametrize("name", [*CONFIGS, "mellum"])
def test_every_stock_layer_is_its_two_halves(name):
    """Tiles call a layer's children themselves: that must be what the stock forward does, bit for bit."""
    if name == "mellum":
        mellum = pytest.importorskip("transformers.models.mellum.configuration_mellum").MellumConfig
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        own = HYBRID | {"head_dim": 8, "mlp_layer_types": ["dense"] * 3}
        own["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}
        CONFIGS.setdefault(name, (mellum, own))
    model = build(name, stock_norms=True)
    wanted = step(model, None, 61, True)
    model = build(name, stock_norms=True)
    recompute.enable(model, MemorySpec(tiles=1000), patterns_of(model, None))
    found = step(model, None, 61, True)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][key], want) for key, want in wanted[1].items() if want is not None)


class Seen(TorchDispatchMode):
    """How often each operation ran, and the most elements a tensor had."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out

    @property
    def kernels(self):
        return sum(self.calls[name] for name in recompute.KERNELS)


@pytest.mark.parametrize("kind", ["llama, S²", "hybrid", "hybrid, S²"])
@pytest.mark.parametrize("tiled", [None, 48])
def test_keep_runs_the_attention_of_full_and_s2_layers_once(kind, tiled):
    counts = {}
    for keep in ("nothing", "attention"):
        model, group = model_of(kind)
        memory, patterns = MemorySpec(keep=keep, tiles=tiled), patterns_of(model, group)
        recompute.enable(model, memory, patterns)
        with Seen() as forward:
            loss = hidden_states(model, ids_of(200), group_size=group).sum()
        with Seen() as backward:
            loss.backward()
        counts[keep] = forward.kernels, backward.kernels
        assert forward.kernels > 0, "no kernel was counted"
    assert counts["nothing"][0] == counts["nothing"][1] == counts["attention"][0]
    if kind == "llama, S²":
        assert counts["attention"][1] == 0
    else:  # what is left are the two sliding layers
        model, group = model_of(kind)
        with Seen() as sliding, torch.no_grad():
            layers = causal_lm(model).model.layers
            causal_lm(model).model.layers = layers[:1]
            model.config.num_hidden_layers = 1
            if tiled is not None:
                recompute.enable(model, MemorySpec(tiles=tiled), [Pattern(W)])
            hidden_states(model, ids_of(200))
        assert counts["attention"][1] == 2 * sliding.kernels


@pytest.mark.parametrize("kind", ["llama, S²", "hybrid", "hybrid, S²"])
@pytest.mark.parametrize("memory", ["tiles 7", "tiles 48", "all"])
def test_the_mlp_sees_each_token_twice_and_never_three_times(kind, memory):
    model, group = model_of(kind)
    recompute.enable(model, MemorySpec(**MEMORIES[memory]), patterns_of(model, group))
    tokens = Counter()
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, index=index: tokens.update({index: args[0].shape[1]})
        )
    step(model, group, 130, packed=True)
    assert tokens == dict.fromkeys(range(3), 2 * 130)


@pytest.mark.parametrize("kind", ["llama, S²", "hybrid", "hybrid, S²"])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_as_large_as_the_mlp_of_a_row(kind, packed):
    T, largest = 1000, {}
    bounds = document_starts([0, 50, 51, 84, 400], T) if packed else None
    for name in ("plain", "tiles 48"):
        model, group = model_of(kind)
        recompute.enable(model, MemorySpec(**MEMORIES[name]), patterns_of(model, group))
        with Seen() as seen:
            hidden_states(model, ids_of(T)[:1], group_size=group, document_starts=bounds).sum().backward()
        largest[name] = seen.largest
    assert largest["plain"] >= T * F, "the backward was not recorded"
    assert largest["tiles 48"] <= T * E, f"{largest['tiles 48']} elements; an MLP tile has {48 * F}, a row {T * F}"


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_parameter_gets_one_gradient_a_backward(memory):
    model, group = model_of("LoRA, hybrid")
    recompute.enable(model, MemorySpec(**MEMORIES[memory]), patterns_of(model, group))
    fired = Counter()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.update([name]))
    for _ in range(2):
        step(model, group, 61, packed=False)
    assert fired == dict.fromkeys(trained, 2)


@pytest.mark.parametrize("kind", ["llama, odd S²", "hybrid"])
def test_no_output_moves_before_the_token_that_changed(kind):
    model, group = model_of(kind)
    recompute.enable(model, MemorySpec(tiles=20), patterns_of(model, group))
    ids = ids_of(130)
    before = hidden_states(model, ids, group_size=group)
    for j in (1, 15, 16, 29, 30, 47, 48, 100, 129):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % 50
        moved = (hidden_states(model, changed, group_size=group) != before).any(-1).any(0)
        assert moved[j] and not moved[:j].any(), f"{j} changed, {moved.nonzero()[:, 0].tolist()} moved"


@pytest.mark.parametrize("inside", [False, True])
def test_the_recomputation_has_the_autocast_of_the_forward(inside):
    """`inside`: the backward pass is called under autocast too."""
    results = []
    for memory in (MemorySpec(), MemorySpec(tiles=48)):
        model = build("smollm3").float()
        recompute.enable(model, memory, patterns_of(model, None))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = hidden_states(model, ids_of(130)).square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert_same(results[1], results[0], tolerance=3e-2)  # bfloat16 has 8 bits


def test_gradients_of_narrow_parameters_are_summed_in_fp32():
    sums = tiles._Sums([torch.zeros(1, dtype=torch.bfloat16)])
    for _ in range(1000):
        sums.add([torch.full((1,), 2.0**-10, dtype=torch.bfloat16)], 0)
    (total,) = sums.gradients()
    assert total.dtype == torch.bfloat16 and total.item() == pytest.approx(1000 / 1024, rel=2**-8)


@pytest.mark.parametrize("memory", ["offload", "tiles, offload", "keep, offload", "all"])
def test_the_inputs_alone_wait_on_the_host_each_knows_the_one_below_and_all_are_freed(memory, monkeypatch):
    made = []

    class Noted(recompute._HostInput):
        def __init__(self, x, stream, below):
            super().__init__(x, stream, below)
            made.append(weakref.ref(self))
            assert self.host.data_ptr() != x.data_ptr(), "no copy was made"

    monkeypatch.setattr(recompute, "_HostInput", Noted)
    model, group = model_of("hybrid")
    recompute.enable(model, MemorySpec(**MEMORIES[memory]), patterns_of(model, group))
    for _ in range(2):
        loss = hidden_states(model, ids_of(61)).sum()
        inputs = [one() for one in made]
        assert [tuple(one.host.shape) for one in inputs] == [(2, 61, E)] * 3
        assert [one.below for one in inputs] == [None, *inputs[:2]]
        del inputs
        loss.backward()
        del loss
        gc.collect()
        assert [one() for one in made] == [None] * 3
        made.clear()


@pytest.mark.parametrize("k", [1, 2])
def test_every_forward_has_a_chain_of_inputs_of_its_own(k, monkeypatch):
    made, real = [], recompute._HostInput
    monkeypatch.setattr(recompute, "_HostInput", lambda *given: made.append(real(*given)) or made[-1])
    model, group = model_of("hybrid")
    recompute.enable(model, MemorySpec(checkpoint=k, offload=True), patterns_of(model, group))
    graphs = [hidden_states(model, ids_of(61)) for _ in range(2)]  # both alive
    each = -(-3 // k)
    assert len(made) == len(graphs) * each and [one.below for one in made[::each]] == [None, None]


@pytest.mark.parametrize("memory", ["tiles 48", "tiles, offload", "offload"])
def test_a_graph_can_be_kept_for_a_second_backward(memory):
    model, group = model_of("hybrid")
    recompute.enable(model, MemorySpec(**MEMORIES[memory]), patterns_of(model, group))
    loss = hidden_states(model, ids_of(61)).square().mean()
    weight = model.model.layers[0].mlp.up_proj.weight
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_a_copied_model_trains_itself():
    model, group = model_of("hybrid")
    recompute.enable(model, MemorySpec(tiles=48, offload=True), patterns_of(model, group))
    copied = copy.deepcopy(model)
    assert_same(step(copied, group, 61, False), truth("hybrid", 61, False))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_halos_are_as_documented():
    def halos(pattern, T, t, starts=None):
        found = tiles.tiles_of(pattern, T, t, starts)
        assert [tile.end for tile in found[:-1]] == [tile.start for tile in found[1:]] and found[-1].end == T
        return {tile.end - tile.start for tile in found[:-1]}, {tile.start - tile.begin for tile in found[1:]}

    assert halos(Pattern(16), 200, 7) == ({16}, {15})
    assert halos(Pattern(16), 200, 48) == ({48}, {15})
    assert halos(Pattern(None, 24), 200, 7) == ({24}, {12})
    assert halos(Pattern(None, 15), 200, 20) == ({30}, {7})
    assert halos(Pattern(), 200, 20) == (set(), set())
    packed = document_starts([0, 5], 200)
    assert halos(Pattern(None, 24), 200, 24, packed) == ({24}, {19})  # 48 - 5 = 24 + 19
    assert max(halos(Pattern(None, 24), 200, 24, rows(200))[1]) <= 23


def test_without_checkpointing_nothing_is_set_up():
    model, group = model_of("hybrid")
    assert recompute.enable(model, MemorySpec(checkpoint=False), patterns_of(model, group)) == []
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_layer_of_another_shape_is_left_whole_and_told():
    model, group = model_of("hybrid")
    model.model.layers[1].extra = torch.nn.Identity()
    notes = recompute.enable(model, MemorySpec(tiles=48), patterns_of(model, group))
    assert len(notes) == 1 and "without tiles (unsupported shape): 1 layer" in notes[0] and "first 1" in notes[0]
    assert_same(step(model, group, 61, False), truth("hybrid", 61, False))


@pytest.mark.parametrize("given", [{"keep": "attention"}, {"tiles": 64}, {"offload": True}], ids=str)
def test_what_would_do_nothing_is_refused(given):
    with pytest.raises(InputError, match=next(iter(given))) as caught:
        recompute.check(MemorySpec(checkpoint=False, **given), [None, 16])
    assert "checkpoint: true" in caught.value.hint
    recompute.check(MemorySpec(**given), [None, 16])


@pytest.mark.parametrize(
    ("given", "windows", "told"),
    [
        ({"tiles": 64}, [None] * 4, "tiles need one layer"),
        ({"keep": "attention"}, [None, 16] * 2, "full layers only"),
        ({}, [None], "the model has 1 layer"),
    ],
    ids=str,
)
def test_what_cannot_share_a_checkpoint_is_refused(given, windows, told):
    with pytest.raises(InputError, match=told):
        recompute.check(MemorySpec(checkpoint=2, **given), windows)
    recompute.check(MemorySpec(checkpoint=2, keep="attention", offload=True), [None] * 2)


def test_layers_that_share_a_checkpoint_are_computed_together_and_their_attention_once_where_it_is_kept():
    counts = {}
    for keep in ("nothing", "attention"):
        model, group = model_of("llama, S²")
        recompute.enable(model, MemorySpec(checkpoint=2, keep=keep), patterns_of(model, group))
        with Seen() as forward:
            loss = hidden_states(model, ids_of(61), group_size=group).square().mean()
        with Seen() as backward:
            loss.backward()
        counts[keep] = forward.kernels, backward.kernels
    assert counts["nothing"][0] == counts["nothing"][1] == counts["attention"][0] > 0
    assert counts["attention"][1] == 0
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model, group = model_of("llama, S²")
    hidden_states(model, ids_of(61), group_size=group).square().mean().backward()
    assert_same((loss, found), (loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))


def test_one_input_is_kept_for_every_k_layers():
    kept = {1: [], 2: [], 3: []}
    for k, shapes in kept.items():
        model, group = model_of("hybrid")
        recompute.enable(model, MemorySpec(checkpoint=k), patterns_of(model, group))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=shapes: to.append(x.shape) or x, lambda x: x):
            hidden_states(model, ids_of(61))
    inputs = {k: shapes.count((2, 61, E)) for k, shapes in kept.items()}  # and what the last norm keeps
    assert [inputs[1] - inputs[k] for k in (2, 3)] == [1, 2]  # of three layers


def test_without_gradients_every_layer_gives_its_own_output():
    model, group = model_of("hybrid")
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        hidden_states(model, ids_of(61))
        recompute.enable(model, MemorySpec(checkpoint=3), patterns_of(model, group))
        hidden_states(model, ids_of(61))
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


def test_a_forward_that_broke_off_leaves_nothing_to_the_next():
    model, group = model_of("hybrid")
    recompute.enable(model, MemorySpec(checkpoint=3), patterns_of(model, group))
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_states(model, ids_of(61))
    hook.remove()
    assert_same(step(model, group, 61, False), truth("hybrid", 61, False))


def test_groups_are_those_of_the_call():
    """A schedule changes them from step to step (train/schedule.py)."""
    results = []
    for memory in (MemorySpec(checkpoint=False), MemorySpec(tiles=48)):
        model, _ = model_of("llama, S²")
        recompute.enable(model, memory, patterns_of(model, 24))
        for G, shift in ((15, 4), (24, None), (None, None)):
            loss = hidden_states(model, ids_of(130), group_size=G, shift=shift).square().sum()
            results.append(
                [loss, *torch.autograd.grad(loss, [p for p in model.get_decoder().parameters() if p.requires_grad])]
            )
    for ours, truth in zip(results[3:], results[:3], strict=True):
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert results[0][0] != results[1][0]


def test_what_does_not_fit_is_refused():
    model, _ = model_of("hybrid")
    right = patterns_of(model, None)
    with pytest.raises(ModelError, match="2 attention patterns for a model of 3"):
        recompute.enable(model, MemorySpec(), right[:2])
    with pytest.raises(ModelError, match="layer 0 has the window 16, its pattern says 8"):
        recompute.enable(model, MemorySpec(), [Pattern(8), *right[1:]])
    recompute.enable(model, MemorySpec(tiles=48), right)
    with pytest.raises(ModelError, match="padding cannot be cut"):
        hidden_states(model, ids_of(61), attention_mask=torch.tensor([[0] * 5 + [1] * 56] * 2))
    with pytest.raises(ModelError, match=r"odd of shape \[3\] cannot be cut"):
        hidden_states(model, ids_of(61), odd=torch.zeros(3))
