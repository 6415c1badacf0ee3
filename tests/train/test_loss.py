"""The chunked loss against torch's over whole logits: values, gradients, memory, and labels that do not count."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctxext.errors import InputError
from ctxext.train import loss as loss_module
from ctxext.train.loss import IGNORED, linear_cross_entropy, token_losses, token_scores

N, E, V = 37, 16, 53


def problem(dtype=torch.float32, ignored=(0, 5, 36)):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, E, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, E, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=g)
    labels[list(ignored)] = IGNORED
    return hidden, weight, labels


def reference(hidden, weight, labels):
    return cross_entropy(hidden.float() @ weight.float().t(), labels, reduction="sum", ignore_index=IGNORED)


@pytest.mark.parametrize("chunk", [1, 7, N - 1, N, 1000, None])
@pytest.mark.parametrize("trains", ["both", "hidden", "weight"])
def test_twins(chunk, trains):
    hidden, weight, labels = problem()
    wanted = [x for name, x in (("hidden", hidden), ("weight", weight)) if trains in (name, "both")]
    for x in (hidden, weight):
        x.requires_grad_(any(x is w for w in wanted))
    loss, count = linear_cross_entropy(hidden, weight, labels, chunk)
    theirs = reference(hidden, weight, labels)
    assert loss.dtype == torch.float32 and count == N - 3
    torch.testing.assert_close(loss, theirs)
    ours = torch.autograd.grad(3 * loss, wanted)
    for got, want in zip(ours, torch.autograd.grad(3 * theirs, wanted), strict=True):
        torch.testing.assert_close(got, want)


def test_tied_embeddings_get_both_gradients():
    _, weight, labels = problem()
    tokens = torch.arange(N) % V
    (ours,) = torch.autograd.grad(linear_cross_entropy(weight[tokens], weight, labels)[0], weight)
    (theirs,) = torch.autograd.grad(reference(weight[tokens], weight, labels), weight)
    torch.testing.assert_close(ours, theirs)


def test_the_weight_gradient_is_summed_in_fp32():
    """2,000 chunks that all pull one way: a bf16 sum stops growing at some 256 times their size."""
    hidden = torch.rand(2000, E, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.zeros(V, E, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(2000, dtype=torch.int64)
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 1)[0], weight)
    (theirs,) = torch.autograd.grad(reference(hidden, weight, labels), weight)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


def test_bf16_is_as_good_as_its_logits():
    hidden, weight, labels = problem(torch.bfloat16)
    theirs = torch.autograd.grad(reference(hidden, weight, labels), (hidden, weight))
    for chunk in (1, N):
        loss, _ = linear_cross_entropy(hidden, weight, labels, chunk)
        torch.testing.assert_close(loss, reference(hidden, weight, labels), rtol=1e-2, atol=0)
        for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), theirs, strict=True):
            assert got.dtype == torch.bfloat16
            assert (got - want).abs().max() <= 0.02 * want.abs().max()


def test_fp32_head_under_bf16_hidden():
    hidden, weight, labels = problem()
    loss, _ = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]
    torch.testing.assert_close(loss, reference(hidden, weight, labels), rtol=1e-2, atol=0)


def test_autocast():
    hidden, weight, labels = problem()
    plain, _ = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(loss, plain) and loss.dtype == torch.float32
    assert torch.autograd.grad(loss, hidden)[0].dtype == torch.float32


def test_nothing_to_score():
    hidden, weight, labels = problem(ignored=range(N))
    loss, count = linear_cross_entropy(hidden, weight, labels)
    assert loss == 0 and count == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_pieces_add_up():
    """Accumulation: sums and counts of parts make the mean of the whole."""
    hidden, weight, labels = problem()
    parts = [linear_cross_entropy(hidden[a:b], weight, labels[a:b]) for a, b in ((0, 3), (3, 30), (30, N))]
    mean = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    torch.testing.assert_close(mean, cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORED))


def test_large_logits_and_nan():
    hidden, weight, labels = problem()
    loss, _ = linear_cross_entropy(hidden * 1e4, weight, labels)
    torch.testing.assert_close(loss, reference(hidden * 1e4, weight, labels))
    with torch.no_grad():
        hidden[3, 0] = float("nan")
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan() and dhidden[3].isnan().all() and dhidden[4].isfinite().all()


def test_the_gradients_are_handed_down_not_kept_and_a_second_backward_is_refused():
    hidden, weight, labels = problem()
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    made = loss.grad_fn.gradients
    first = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    assert [one.data_ptr() for one in first] == [one.data_ptr() for one in made] and loss.grad_fn.gradients is None
    again = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))
    assert all(torch.equal(twice, 2 * once) for twice, once in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("split", [1, 1 << 22])
def test_the_factor_of_the_mean_is_not_rounded_to_the_gradients_dtype(split, monkeypatch):
    """1 / 102,399 in bf16 is off by 0.1%, and so were all gradients, in one direction."""
    monkeypatch.setattr(loss_module, "SCALED", split)
    hidden, weight, labels = problem(torch.bfloat16)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))
    factor = 1 / 102_399
    mean = linear_cross_entropy(hidden, weight, labels)[0] * factor
    for scaled, whole in zip(torch.autograd.grad(mean, (hidden, weight)), once, strict=True):
        # The fp32 twin, rounded once.
        assert torch.equal(scaled, (whole.float() * torch.tensor(factor)).bfloat16())
        wide = whole.double() * factor
        along = (scaled.double() * wide).sum() / (wide * wide).sum()
        assert abs(along - 1) < 3e-4, f"the gradient is {along - 1:+.2e} too long"


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_token_losses_and_scores(chunk):
    hidden, weight, labels = problem()
    losses = token_losses(hidden, weight, labels, chunk)
    logits = hidden @ weight.t()
    torch.testing.assert_close(losses, cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED).detach())
    assert losses.dtype == torch.float32 and not losses.requires_grad and losses[5] == 0
    likely = logits.argmax(-1)
    likely[::2] = labels[::2]
    both, right = token_scores(hidden, weight, likely, chunk)
    assert torch.equal(right, (likely == logits.argmax(-1)).float()) and 0 < right.sum() < N
    assert torch.equal(both[1::2], token_losses(hidden, weight, likely, chunk)[1::2])


class LargestTensor(TorchDispatchMode):
    """The most bytes of one tensor's storage, of all that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("call", [linear_cross_entropy, token_losses])
def test_no_tensor_holds_all_logits(call):
    n, v, chunk = 4096, 2048, 64
    hidden = torch.randn(n, E, requires_grad=True)
    weight = torch.randn(v, E, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    with LargestTensor() as mode:
        result = call(hidden, weight, labels, chunk)
        if call is linear_cross_entropy:
            result[0].backward()
    assert mode.largest == 4 * chunk * v, f"{mode.largest:,} bytes; all logits are {4 * n * v:,}"


@pytest.mark.parametrize(
    ("hidden", "weight", "labels"), [((5, 4), (7, 3), (5,)), ((5, 4), (7, 4), (4,)), ((1, 5, 4), (7, 4), (5,))]
)
def test_refusals(hidden, weight, labels):
    with pytest.raises(InputError, match=r"expected \[N,E\]"):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.int64))
