"""The blocked backend against the naive truth: outputs and every gradient, causality, memory, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ctxext.errors import InputError
from ctxext.ops.backends import blocked, sdpa
from ctxext.ops.masks import Pattern, check_document_starts, document_starts, lower_bounds
from ctxext.ops.naive_attention import naive_attention

HEADS = [(4, 2), (9, 3), (4, 1), (2, 2)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def tensors(B, H, K, T, *, S=None, D=8, dtype=torch.float64, seed=0):
    """q, k, v laid out [B,T,H,D] in memory, as a model's projections are."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((T, H), (S or T, K), (S or T, K))
    return [
        torch.randn(B, t, h, D, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for t, h in sizes
    ]


def rows_of_documents(T, lengths: list[list[int]]) -> torch.Tensor:
    """Rows of documents whose lengths repeat until T is full."""
    rows = []
    for row in lengths:
        bounds, i = [0], 0
        while bounds[-1] < T:
            bounds.append(min(T, bounds[-1] + row[i % len(row)]))
            i += 1
        rows.append(document_starts(bounds, T))
    return torch.cat(rows)


def assert_twins(q, k, v, pattern, starts=None, scale=None):
    if starts is not None:
        check_document_starts(starts, B=q.shape[0], T=q.shape[2], S=k.shape[2])
    lo = lower_bounds(pattern, q.shape[2], S=k.shape[2], document_starts=starts)
    theirs = naive_attention(q, k, v, lo, scale=scale, sink_tokens=pattern.sink_tokens, document_starts=starts)
    ours = blocked.attention(q, k, v, pattern, document_starts=starts, scale=scale)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(q.dtype)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    pairs = [("out", ours, theirs)]
    pairs += zip(
        ("dq", "dk", "dv"),
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(theirs, (q, k, v), upstream),
        strict=True,
    )
    for name, got, want in pairs:
        assert got.isfinite().all(), f"{name} is not finite for {pattern}"
        worst = ((got - want).abs().max() / want.abs().max().clamp_min(1)).item()
        assert worst <= TOLERANCE[q.dtype], f"{name} differs by {worst:.2e} for {pattern}, q {list(q.shape)}"


@pytest.mark.parametrize("T", [1, 2, 63, 127, 128, 129, 1000])
@pytest.mark.parametrize("H_K", HEADS, ids=str)
def test_twins(T, H_K):
    if T < 1000:
        patterns = [
            *((W, None) for W in (None, 1, 2, 100, T, T + 5)),
            (None, 2),
            (None, 37),
            (None, T + 2),
            (9, 37),
            (None, 37, 5),
            (None, 37, None, 1),
            (None, 9, 8, 4),
            (None, 2, None, 50),
        ]
    else:
        patterns = [
            (None, None),
            (100, None),
            (None, 250),
            (None, 77),
            (65, 333),
            (None, 250, 249),
            (None, 250, 249, 3),
        ]
    for pattern in patterns:
        q, k, v = tensors(2 if T < 1000 else 1, *H_K, T, D=4)
        assert_twins(q, k, v, Pattern(*pattern))


@pytest.mark.parametrize("T", [1, 2, 63, 128, 129, 1000])
@pytest.mark.parametrize(
    "lengths",
    [[[1]], [[300, 1, 777, 970]], [[1, 1, 50, 3], [200]], [[129, 128, 127], [64, 64, 5]]],
    ids=["all of length 1", "long and 1", "short", "around blocks"],
)
def test_twins_packed(T, lengths):
    starts = rows_of_documents(T, lengths)
    for pattern in (
        Pattern(),
        Pattern(2),
        Pattern(90),
        Pattern(None, 2),
        Pattern(None, 101),
        Pattern(70, 90),
        Pattern(None, 40, None, 2),
    ):
        q, k, v = tensors(len(lengths), 2, 2, T, D=4)
        assert_twins(q, k, v, pattern, starts)


@pytest.mark.parametrize("W", [63, 64, 65, 127, 128, 129, 131, 255, 257, 300])
def test_window_cuts(W):
    """Every remainder a window can leave in its blocks, and segments just above them."""
    q, k, v = tensors(1, 2, 1, 2 * W + 65)
    assert_twins(q, k, v, Pattern(W))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(100), Pattern(None, 37), Pattern(None, 37, None, 2)], ids=str)
def test_other_dtypes(dtype, pattern):
    q, k, v = tensors(2, 4, 2, 333, dtype=dtype)
    assert_twins(q, k, v, pattern)
    assert_twins(q, k, v, pattern, rows_of_documents(333, [[200, 1, 17], [40]]), scale=0.3)


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    W=st.none() | st.integers(1, 200),
    G=st.none() | st.integers(2, 200),
    N=st.integers(0, 9),
    heads=st.sampled_from(HEADS),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_twins_of_anything(lengths, W, G, N, heads, seed):
    T = sum(lengths)
    q, k, v = tensors(1, *heads, T, D=4, seed=seed)
    assert_twins(q, k, v, Pattern(W, G), rows_of_documents(T, [lengths]))
    if G is not None:
        assert_twins(q, k, v, Pattern(None, G, None, N), rows_of_documents(T, [lengths]))


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    G=st.integers(2, 90),
    N=st.integers(0, 9),
    share=st.floats(0, 0.99),
)
@settings(max_examples=20, deadline=None)
def test_sink_tokens_outside_of_a_piece_of_a_row_are_not_seen(lengths, G, N, share):
    """A document that began before the row keeps its groups; only the sink tokens that lie in the row are seen."""
    T = sum(lengths)
    cut = int(share * T)
    starts = rows_of_documents(T, [lengths])[:, cut:] - cut
    q, k, v = tensors(1, 4, 2, T - cut, D=4)
    pattern = Pattern(None, G, None, N)
    lo = lower_bounds(pattern, T - cut, document_starts=starts)
    ours = blocked.attention(q, k, v, pattern, document_starts=starts)
    theirs = naive_attention(q, k, v, lo, sink_tokens=N, document_starts=starts)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["heads first", "expanded gradient", "one tensor", "no gradient"])
def test_layouts(layout):
    pattern, starts = Pattern(70, 150), rows_of_documents(300, [[200], [10, 90]])
    q, k, v = (x.detach().contiguous().requires_grad_() for x in tensors(2, 4, 4, 300))
    if layout == "one tensor":  # slices of one projection
        whole = torch.randn(2, 300, 12, 8, dtype=torch.float64, requires_grad=True)
        q, k, v = (x.transpose(1, 2) for x in whole.split(4, dim=2))
    if layout == "expanded gradient":
        lo = lower_bounds(pattern, 300, document_starts=starts)
        ours = torch.autograd.grad(blocked.attention(q, k, v, pattern, document_starts=starts).sum(), (q, k, v))
        theirs = torch.autograd.grad(naive_attention(q, k, v, lo).sum(), (q, k, v))
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want)
    elif layout == "no gradient":
        with torch.inference_mode():
            out = blocked.attention(q, k, v, pattern, document_starts=starts)
        torch.testing.assert_close(
            out, naive_attention(q, k, v, lower_bounds(pattern, 300, document_starts=starts)).detach()
        )
    else:
        assert_twins(q, k, v, pattern, starts)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(100), Pattern(None, 64), Pattern(None, 64, None, 2)], ids=str)
def test_checkpointed_gradients_are_the_same(pattern):
    q, k, v = tensors(1, 4, 2, 300)
    plain = torch.autograd.grad(blocked.attention(q, k, v, pattern).square().sum(), (q, k, v))
    again = checkpoint(blocked.attention, q, k, v, pattern, use_reentrant=False)
    for got, want in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(got, want)


# Cached keys


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(1), Pattern(5), Pattern(None, 7), Pattern(5, 12), Pattern(None, 7, None, 2)], ids=str
)
@pytest.mark.parametrize("T", [1, 2, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_twins_cached(pattern, T, packed):
    S = 90
    q, k, v = tensors(2, 4, 2, T, S=S)
    starts = rows_of_documents(S, [[30, 1, 20], [88]])[:, -T:] if packed else None
    assert_twins(q, k, v, pattern, starts)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(8), Pattern(None, 10), Pattern(None, 10, None, 3)], ids=str)
def test_decoding_step_by_step_equals_the_whole(pattern):
    T = 40
    q, k, v = (x.detach() for x in tensors(2, 4, 2, T))
    whole = blocked.attention(q, k, v, pattern)
    steps = [blocked.attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], pattern) for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, dim=2), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(200)], ids=str)
def test_a_long_prompt_over_a_cache_is_taken_in_pieces(pattern):
    q, k, v = (x.detach() for x in tensors(1, 1, 1, 4200, S=4300, D=4, dtype=torch.float32))
    lo = lower_bounds(pattern, 4200, S=4300)
    torch.testing.assert_close(blocked.attention(q, k, v, pattern), naive_attention(q, k, v, lo), rtol=1e-4, atol=1e-5)


def test_left_padding_is_a_document_that_starts_late():
    """Pads are documents of one token; what follows must not depend on them."""
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 50))
    starts = torch.tensor([[*range(20), *[20] * 30]])
    for pattern in (Pattern(), Pattern(9)):
        padded = blocked.attention(q, k, v, pattern, document_starts=starts)[:, :, 20:]
        alone = blocked.attention(*(x[:, :, 20:] for x in (q, k, v)), pattern)
        torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)


# Causality


def future_leaks(attend: Callable, T: int, H: int, K: int, at: list[int]) -> list[tuple[int, int]]:
    """(j, first output before j that moved) for every j in `at` whose key and value, changed, move an earlier output.

    Fails if an output at j does not move: then the perturbation proves nothing.
    """
    q, k, v = (x.detach() for x in tensors(1, H, K, T, dtype=torch.float32))
    before, leaks = attend(q, k, v), []
    for j in at:
        k2, v2 = k.clone(), v.clone()
        k2[:, :, j] += 1
        v2[:, :, j] -= 2
        moved = (attend(q, k2, v2) != before).any(-1).any(1)[0]  # [T]
        assert moved[j], f"token {j} does not see itself"
        if moved[:j].any():
            leaks.append((j, int(moved.nonzero()[0])))
    return leaks


def naive(q, k, v, pattern, document_starts=None):
    lo = lower_bounds(pattern, q.shape[2], document_starts=document_starts)
    return naive_attention(q, k, v, lo, sink_tokens=pattern.sink_tokens, document_starts=document_starts)


@pytest.mark.parametrize("attend", [naive, blocked.attention], ids=["naive", "blocked"])
@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(),
        Pattern(1),
        Pattern(100),
        Pattern(None, 64),
        Pattern(None, 37),
        Pattern(30, 64),
        Pattern(None, 37, None, 1),
        Pattern(None, 37, 5, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_no_output_moves_before_what_changed(attend, pattern, packed):
    T = 300
    starts = rows_of_documents(T, [[150, 1, 20, 30]]) if packed else None
    edges = [1, 18, 19, 31, 32, 63, 64, 99, 100, 127, 128, 149, 150, 151, 171, 200, 298, 299]
    leaks = future_leaks(lambda q, k, v: attend(q, k, v, pattern, document_starts=starts), T, 4, 2, edges)
    assert not leaks, f"(changed, moved) {leaks}"


@pytest.mark.parametrize("attend", [naive, blocked.attention], ids=["naive", "blocked"])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(100), Pattern(None, 64), Pattern(None, 9, None, 2)], ids=str)
def test_documents_do_not_see_each_other(attend, pattern):
    starts = rows_of_documents(300, [[150, 1, 20, 30]])
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 300))
    before = attend(q, k, v, pattern, document_starts=starts)
    k[:, :, 151:171] += 1
    v[:, :, 151:171] += 1
    moved = (attend(q, k, v, pattern, document_starts=starts) != before).any(-1).any(1)[0]
    assert moved.nonzero()[:, 0].tolist() == list(range(151, 171))


def rolled_s2(q, k, v, G):
    """S² as it is often written: half the heads rolled by G // 2, a triangular mask in each group, rolled back."""
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))

    def grouped(x):
        x = torch.cat([x[:, : H // 2], x[:, H // 2 :].roll(-(G // 2), dims=2)], dim=1)
        return x.reshape(B, H, T // G, G, D)

    out = torch.nn.functional.scaled_dot_product_attention(*map(grouped, (q, k, v)), is_causal=True)
    out = out.reshape(B, H, T, D)
    return torch.cat([out[:, : H // 2], out[:, H // 2 :].roll(G // 2, dims=2)], dim=1)


def test_the_check_catches_a_roll_that_wraps():
    leaks = future_leaks(lambda q, k, v: rolled_s2(q, k, v, 64), 256, 4, 2, [100, 223, 224, 255])
    assert leaks == [(224, 0), (255, 0)], "the last G // 2 tokens must be found in the first outputs"


def test_the_check_catches_a_mask_that_was_dropped():
    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert future_leaks(attend, 64, 4, 2, [63]) == [(63, 0)]


# Memory


class LargestTensor(TorchDispatchMode):
    """The most bytes one tensor's storage had, of all that any operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "pattern", [Pattern(128), Pattern(1000), Pattern(None, 1024), Pattern(2), Pattern(None, 1024, None, 2)], ids=str
)
def test_nothing_is_of_order_T_squared(pattern, packed):
    T, H, D = 32 * 1024, 2, 8
    q, k, v = tensors(1, H, H, T, D=D, dtype=torch.float32)
    starts = rows_of_documents(T, [[5000, 1, 30, 700, 7, 7]]) if packed else None
    with LargestTensor() as largest:
        blocked.attention(q, k, v, pattern, document_starts=starts).sum().backward()
    band = 4 * 1250 * 1250  # the mask of one block and its window, fp32
    allowed = max(6 * T * H * D * 4, band)  # the key gradients of overlapping windows, before they are added
    assert largest.bytes >= T * H * D * 4, "the backward was not recorded"
    assert largest.bytes <= allowed, f"a tensor of {largest.bytes:,} bytes; T x T bools are {T * T:,}"


def test_the_memory_check_sees_a_T_by_T_mask():
    with LargestTensor() as largest:
        torch.ones(2048, 2048, dtype=torch.bool).tril()
    assert largest.bytes == 2048 * 2048


# Bad input


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(100), Pattern(None, 64), Pattern(None, 64, None, 1)], ids=str)
@pytest.mark.parametrize("at", [0, 130])
def test_nan_is_never_hidden(pattern, at):
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 300))
    k[0, 0, at, 0] = math.nan
    must = naive(q, k, v, pattern).isnan()
    assert must.any() and blocked.attention(q, k, v, pattern).isnan()[must].all()


@pytest.mark.parametrize(
    ("shapes", "pattern", "told"),
    [
        (((1, 4, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)), Pattern(), "K dividing H"),
        (((1, 4, 5, 8), (1, 4, 4, 8), (1, 4, 4, 8)), Pattern(), "1 <= T <= S"),
        (((1, 4, 0, 8), (1, 4, 4, 8), (1, 4, 4, 8)), Pattern(), "1 <= T <= S"),
        (((1, 4, 5, 8), (1, 4, 5, 8), (1, 4, 6, 8)), Pattern(), "v [1, 4, 6, 8]"),
        (((2, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8)), Pattern(), "[B,H,T,D]"),
        (((1, 1, 5, 8), (1, 1, 5, 8), (1, 1, 5, 8)), Pattern(None, 4), "half of the heads"),
    ],
)
def test_refusals(shapes, pattern, told):
    with pytest.raises(InputError) as caught:
        blocked.attention(*(torch.zeros(shape) for shape in shapes), pattern)
    assert told in str(caught.value)


def test_document_starts_of_another_batch_are_refused():
    q, k, v = tensors(2, 4, 2, 5)
    with pytest.raises(InputError, match="document_starts has shape"):
        blocked.attention(q, k, v, Pattern(), document_starts=torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("masked", ["causal", "one mask", "a mask a row"])
@pytest.mark.parametrize("H_K", [(4, 2), (9, 3), (4, 1)], ids=str)
def test_heads_that_share_keys_without_a_kernel_that_knows_of_it(H_K, masked):
    """What a GPU is given where only the formula would serve shared heads: the same outputs and gradients."""
    H, K = H_K
    q, k, v = tensors(2, H, K, 7, S=7 if masked == "causal" else 12)
    mask = None
    if masked != "causal":
        mask = torch.rand(*((2, 1) if masked == "a mask a row" else ()), 7, 12) < 0.6
        mask[..., 0] = True
    causal = mask is None
    truth = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    q2, k2, v2, mask2 = sdpa._without_sharing(q, k, v, mask, causal)
    assert q2.shape[1] == k2.shape[1] == v2.shape[1]
    assert causal or (k2 is k and v2 is v)  # no copy of a cache
    ours = scaled_dot_product_attention(q2, k2, v2, attn_mask=mask2, is_causal=causal).reshape(truth.shape)
    weight = torch.randn_like(truth)
    for got, want in zip(
        (ours, *torch.autograd.grad(ours, (q, k, v), weight)),
        (truth, *torch.autograd.grad(truth, (q, k, v), weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "masked", "T", "heads"),
    [
        (torch.float32, False, 8, (4, 4)),  # FlashAttention takes no fp32: the keys are repeated
        (torch.float32, True, 8, (2, 2)),
        (torch.bfloat16, True, 8, (2, 2)),
        (torch.bfloat16, False, 8, (4, 2)),  # and serves this
        (torch.bfloat16, False, 1, (2, 2)),
    ],
)
def test_what_a_gpu_is_given_of_shared_heads(dtype, masked, T, heads, monkeypatch):
    seen = []

    def kernel(q, k, v, **options):
        seen.append((q.shape[1], k.shape[1], options["enable_gqa"]))
        return q

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(sdpa, "_is_hopper", lambda device: False)
    with FakeTensorMode():
        q, k = (torch.empty(1, h, t, 8, dtype=dtype, device="cuda") for h, t in ((4, T), (2, 8)))
        mask = torch.ones(T, 8, dtype=torch.bool, device="cuda") if masked else None
        assert sdpa.sdpa(q, k, k, mask, None).shape == q.shape
    assert seen == [(*heads, heads[0] != heads[1])]


@pytest.mark.parametrize(
    ("causal", "version", "first"), [(True, 91_600, True), (True, 91_002, False), (False, 91_600, False)]
)
def test_cudnn_comes_first_on_hopper_where_it_is_sound(causal, version, first, monkeypatch):
    given = []
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda order, set_priority: given.append(order))
    monkeypatch.setattr(sdpa, "_is_hopper", lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    with FakeTensorMode():
        sdpa._kernels(torch.empty(1, 2, 8, 8, dtype=torch.bfloat16, device="cuda"), causal)
    assert (SDPBackend.CUDNN_ATTENTION in given[0]) == first
