"""Mean distance, sink mass and entropy against attention written out in full; what a window makes of them."""

import dataclasses
import json
import math

import pytest
import torch

from ctxext.model.attention import Intervention, intervening
from ctxext.model.source import resolve
from ctxext.ops.masks import Pattern, lower_bounds
from ctxext.ops.naive_attention import attention_rows, naive_attention
from ctxext.probes import attention_distance
from ctxext.probes.probe_spec import AttentionDistance
from ctxext.probes.subject import Subject, watch_rows
from ctxext.probes.texts import text_rows


@pytest.mark.parametrize("window", [None, 1, 7])
def test_chosen_rows_are_those_of_naive_attention(window):
    """With values that are the unit vectors naive attention gives its weights."""
    generator = torch.Generator().manual_seed(0)
    B, H, K, T, D = 2, 4, 2, 33, 8
    q, k = torch.randn(B, H, T, D, generator=generator), torch.randn(B, K, T, D, generator=generator)
    unit = torch.eye(T).expand(B, K, T, T)
    truth = naive_attention(q, k, unit, lower_bounds(Pattern(window), T), scale=0.3)  # [B,H,T,T]
    at = torch.tensor([[0, 5, 32], [9, 8, 31]])
    chosen = q.gather(2, at[:, None, :, None].expand(B, H, 3, D))
    given = attention_rows(chosen, k, at, sliding_window=window, scale=0.3)
    torch.testing.assert_close(given, truth.gather(2, at[:, None, :, None].expand(B, H, 3, T)))


def test_watched_rows_come_in_turns_and_leave_the_model_alone(monkeypatch):
    subject = Subject(resolve("tiny"))
    ids = text_rows(subject.loaded.tokenizer, "embedded", 96, 2, 0)
    at = torch.tensor([[3, 50, 95], [4, 51, 94]])
    whole, parts = {}, {}
    model = subject.loaded.model
    first = watch_rows(model, ids, at, lambda layer, weights, rows: whole.setdefault(layer, weights))
    monkeypatch.setattr("ctxext.probes.subject.ROWS_BYTES", 1)
    again = watch_rows(model, ids, at, lambda layer, weights, rows: parts.setdefault(layer, []).append(weights))
    assert torch.equal(first, again) and set(whole) == set(range(4))
    for layer, weights in whole.items():
        assert len(parts[layer]) == 3
        torch.testing.assert_close(torch.cat(parts[layer], 2), weights)


def test_distance_sink_and_entropy_are_those_of_the_weights():
    """Of equal weights a query at t looks t / 2 back, has sinks / (t + 1) on the first tokens and ln(t + 1) nats."""
    subject = Subject(resolve("tiny"))
    for layer in subject.loaded.model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    spec = AttentionDistance(length=128, lengths=(64,), samples=1, rows=4, sinks=3)
    facts = attention_distance.measure(subject, spec, lambda *_: None).facts
    for length in (64, 128):
        rows = torch.linspace(length // 2, length - 1, 4).long().tolist()
        meant = {
            "distance": sum(t / 2 for t in rows) / 4,
            "sink": sum(3 / (t + 1) for t in rows) / 4,
            "entropy": sum(math.log(t + 1) for t in rows) / 4,
        }
        for name, value in meant.items():
            cells = torch.tensor(facts["by_length"][str(length)][name])
            torch.testing.assert_close(cells, torch.full((4, 4), value), rtol=1e-5, atol=1e-6)


def test_a_window_bounds_distance_and_hides_the_first_tokens():
    subject, spec = Subject(resolve("tiny")), AttentionDistance(length=256, samples=2, rows=8)
    with intervening(subject.loaded.model.model, {2: Intervention(visible=16)}):
        finding = attention_distance.measure(subject, spec, lambda *_: None)
    grids = {picture.name: picture for picture in finding.pictures}
    assert max(grids["distance"].cells[2]) < 16 and max(grids["sink"].cells[2]) == 0
    assert min(grids["sink"].cells[1]) > 0
    assert [line.label for line in grids["growth-entropy"].lines] == [f"layer {i}" for i in range(4)]
    json.dumps(dataclasses.asdict(finding), allow_nan=False)


def test_texts_begin_alike_and_are_drawn_with_the_seed():
    tokenizer = Subject(resolve("tiny")).loaded.tokenizer
    rows = text_rows(tokenizer, "embedded", 100, 3, 1)
    assert torch.equal(rows[:, :60], text_rows(tokenizer, "embedded", 60, 3, 1))
    assert not torch.equal(rows, text_rows(tokenizer, "embedded", 100, 3, 2)) and rows.shape == (3, 100)
