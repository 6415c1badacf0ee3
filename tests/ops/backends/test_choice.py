"""Which backend serves what: the table, its refusals, and that a named backend is the one that runs."""

from __future__ import annotations

import pytest
import torch

from ctxext.errors import EnvironmentFault, InputError
from ctxext.ops.backends import blocked, choice, varlen
from ctxext.ops.backends.choice import AttentionCall, choose
from ctxext.ops.masks import Pattern, document_starts

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
SLIDING, S2 = Pattern(128), Pattern(None, 64)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(varlen, "installed_kernel", lambda: lambda *_: None)


@pytest.mark.parametrize(
    ("call", "backend"),
    [
        (AttentionCall(CPU, torch.float32, 64), "blocked"),
        (AttentionCall(CPU, BF16, 64, SLIDING, packed=True), "blocked"),
        (AttentionCall(GPU, torch.float32, 64, SLIDING), "blocked"),
        (AttentionCall(GPU, BF16, 64), "blocked"),
        (AttentionCall(GPU, BF16, 64, S2), "blocked"),
        (AttentionCall(GPU, BF16, 64, S2, packed=True), "varlen"),
        (AttentionCall(GPU, BF16, 64, SLIDING), "varlen"),
        (AttentionCall(GPU, BF16, 64, SLIDING, cached=True), "blocked"),
        (AttentionCall(GPU, BF16, 60, SLIDING), "blocked"),
    ],
    ids=str,
)
def test_the_table(hopper, call, backend):
    assert choose(call) == backend


def test_auto_falls_back_where_no_varlen_kernel_is_installed(hopper, monkeypatch):
    monkeypatch.setattr(varlen, "installed_kernel", lambda: None)
    assert choose(AttentionCall(GPU, BF16, 64, SLIDING)) == "blocked"
    with pytest.raises(EnvironmentFault, match="flash-attn is missing"):
        choose(AttentionCall(GPU, BF16, 64, SLIDING), "varlen")


@pytest.mark.parametrize(
    ("call", "backend", "told"),
    [
        (AttentionCall(CPU, BF16, 64), "varlen", "needs a GPU"),
        (AttentionCall(CPU, BF16, 64), "flex", "needs a GPU"),
        (AttentionCall(GPU, torch.float32, 64), "varlen", "not float32"),
        (AttentionCall(GPU, BF16, 512), "varlen", "not 512"),
        (AttentionCall(GPU, BF16, 64, cached=True), "flex", "cached keys"),
    ],
    ids=str,
)
def test_a_named_backend_that_cannot_serve_is_refused(hopper, call, backend, told):
    with pytest.raises(EnvironmentFault, match=told):
        choose(call, backend)


def test_an_old_card_is_refused_varlen(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an older card")
    with pytest.raises(EnvironmentFault, match="an older card"):
        choose(AttentionCall(GPU, BF16, 64), "varlen")


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="allowed are auto, naive, blocked, varlen, flex"):
        choose(AttentionCall(CPU, BF16, 64), "flash")


def test_the_named_backend_runs_and_no_other(monkeypatch):
    q, k, v = (torch.randn(1, heads, 70, 8) for heads in (4, 2, 2))
    starts = document_starts([0, 33], 70)
    auto = choice.attention(q, k, v, SLIDING, document_starts=starts)
    monkeypatch.setattr(blocked, "attention", None)
    naive = choice.attention(q, k, v, SLIDING, document_starts=starts, backend="naive")
    torch.testing.assert_close(auto, naive)
    with pytest.raises(TypeError):
        choice.attention(q, k, v, SLIDING, backend="blocked")
