"""lower_bounds against predicates written independently of it, and every refusal of a bad description."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxext.errors import InputError
from ctxext.ops import masks
from ctxext.ops.backends import blocked
from ctxext.ops.masks import Pattern, check_document_starts, document_starts, first_shifted_head, lower_bounds


def sees(q: int, k: int, bounds: list[int], W: int | None, G: int | None, s: int) -> bool:
    """The definition, one pair at a time: causal, same document, within the window, same group."""
    document = [max(b for b in bounds if b <= t) for t in (q, k)]
    if k > q or document[0] != document[1]:
        return False
    same_group = G is None or (q - document[0] + s) // G == (k - document[0] + s) // G
    return same_group and (W is None or q - k < W)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    W=st.none() | st.integers(1, 20),
    G=st.none() | st.integers(2, 12),
    shift=st.none() | st.integers(1, 11),
)
@settings(max_examples=200, deadline=None)
def test_lower_bounds_are_the_predicate(lengths, W, G, shift):
    shift = None if G is None or shift is None else min(shift, G - 1)
    T = sum(lengths)
    bounds = [sum(lengths[:i]) for i in range(len(lengths))]
    lo = lower_bounds(Pattern(W, G, shift), T, document_starts=document_starts(bounds, T))
    assert lo.dtype == torch.int64 and lo.shape == (1, 1 if G is None else 2, T)
    for half in range(lo.shape[1]):
        s = 0 if half == 0 else shift or G // 2
        want = [next(k for k in range(q + 1) if sees(q, k, bounds, W, G, s)) for q in range(T)]
        assert lo[0, half].tolist() == want, f"half {half}"
        for q in range(T):  # what is seen has no gaps: the lower bound tells all
            assert all(sees(q, k, bounds, W, G, s) for k in range(want[q], q + 1)), f"half {half}, q {q}"


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    G=st.integers(2, 12),
    N=st.integers(0, 5),
    cut=st.integers(0, 8),
)
@settings(max_examples=200, deadline=None)
def test_sink_tokens_and_the_interval_are_disjoint_and_complete(lengths, G, N, cut):
    """The first N tokens of the document that a group hides, one pair at a time; the row lost `cut` tokens."""
    T = sum(lengths)
    cut = min(cut, T - 1)
    bounds = [sum(lengths[:i]) for i in range(len(lengths))]
    starts = document_starts(bounds, T)[:, cut:] - cut
    lo = lower_bounds(Pattern(None, G, None, N), T - cut, document_starts=starts)
    for half in range(2):
        counts = masks.sinks_before(N, lo[:, half], starts)[0].tolist()
        for q, count in enumerate(counts):
            d, first = int(starts[0, q]), max(int(starts[0, q]), 0)
            hidden = [k for k in range(int(lo[0, half, q])) if d <= k < d + N]
            assert hidden == list(range(first, first + count)), f"half {half}, q {q}"


def test_the_drawing_is_true():
    rows = re.findall(r"^    q (\d) +((?:[x.] ){10}) +(\d) +q \d +((?:[x.] ){10}) +(\d)", masks.__doc__, re.M)
    assert len(rows) == 10
    lo = lower_bounds(Pattern(group_size=4), 10)[0]
    for q, unshifted, lo0, shifted, lo1 in rows:
        for half, (drawn, bound) in enumerate(((unshifted, lo0), (shifted, lo1))):
            seen = [k for k, mark in enumerate(drawn.split()) if mark == "x"]
            assert int(bound) == lo[half, int(q)] and seen == list(range(int(bound), int(q) + 1)), f"q {q}, half {half}"


@pytest.mark.parametrize("G", [2, 3, 4, 7, 1000])
def test_released_boundaries(G):
    """Heads of the second half: groups start at 0, G - G//2, and every G after it; for even G that is 0, G/2, 3G/2."""
    T = 5 * G + 1
    lo = lower_bounds(Pattern(group_size=G), T)
    assert lo[0, 0].unique().tolist() == list(range(0, T, G))
    assert lo[0, 1].unique().tolist() == [0, *range(G - G // 2, T, G)]


def test_cached_queries_are_the_last_rows():
    pattern, S = Pattern(5, 7), 40
    starts = document_starts([0, 3, 21], S)
    whole = lower_bounds(pattern, S, document_starts=starts)
    last = lower_bounds(pattern, 6, S=S, document_starts=starts[:, -6:])
    assert torch.equal(last, whole[..., -6:])


def test_rows_may_differ():
    starts = torch.cat([document_starts([0, 2], 5), document_starts([0, 4], 5)])
    assert lower_bounds(Pattern(), 5, document_starts=starts)[:, 0].tolist() == [[0, 0, 2, 2, 2], [0, 0, 0, 0, 4]]


def test_document_starts_takes_starts_or_cu_seqlens():
    assert document_starts([0, 3, 4], 6).tolist() == document_starts([0, 3, 4, 6], 6).tolist() == [[0, 0, 0, 3, 4, 4]]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Pattern(sliding_window=0), "sliding_window = 0"),
        (lambda: Pattern(sliding_window=-3), "sliding_window = -3"),
        (lambda: Pattern(sliding_window=2.0), "sliding_window = 2.0"),
        (lambda: Pattern(group_size=1), "group_size = 1"),
        (lambda: Pattern(group_size=True), "group_size = True"),
        (lambda: Pattern(group_size=4, shift=4), "shift = 4"),
        (lambda: Pattern(group_size=4, shift=0), "shift = 0"),
        (lambda: Pattern(shift=1), "shift = 1"),
        (lambda: Pattern(sink_tokens=1), "sink_tokens = 1"),
        (lambda: Pattern(None, 4, sink_tokens=-1), "sink_tokens = -1"),
        (lambda: Pattern(3, 4, sink_tokens=1), "sink_tokens = 1"),
        (lambda: lower_bounds(Pattern(), 0), "T = 0"),
        (lambda: lower_bounds(Pattern(), 5, S=4), "S = 4"),
        (lambda: document_starts([], 4), "must start at 0"),
        (lambda: document_starts([1, 2], 4), "must start at 0"),
        (lambda: document_starts([0, 2, 2], 4), "2 and then 2"),
        (lambda: document_starts([0, 3, 1], 4), "3 and then 1"),
        (lambda: document_starts([0, 5], 4), "row of 4"),
    ],
)
def test_bad_descriptions_are_refused(make, told):
    with pytest.raises(InputError, match=re.escape(told)):
        make()


@pytest.mark.parametrize(
    ("rows", "S", "told"),
    [
        ([[0, 0, 2, 2], [0, 1, 1, 3]], 4, None),
        ([[0, 1, 2, 3]], 4, None),
        ([[0, 0, 8, 8]], 10, None),
        ([[2, 2, 2]], 10, None),
        ([[0, 0, 2]], 4, "shape [1, 3]"),
        ([[0, 0, -1, 3]], 4, "[0, 2] = -1 (token at 2) is negative"),
        ([[0, 0, 3, 3]], 4, "[0, 2] = 3 (token at 2) lies after"),
        ([[0, 1, 0, 0]], 4, "[0, 2] = 0 (token at 2) is before"),
        ([[0, 0, 2, 2], [0, 0, 1, 1]], 4, "[1, 2] = 1 (token at 2) is new"),
        ([[0.0, 0.0, 2.0, 2.0]], 4, "torch.float32"),
    ],
)
def test_check_document_starts(rows, S, told):
    starts = torch.tensor(rows)
    size = {"B": len(rows), "T": 4 if S == 4 else len(rows[0]), "S": S}
    if told is None:
        check_document_starts(starts, **size)
    else:
        with pytest.raises(InputError, match=re.escape(told)):
            check_document_starts(starts, **size)


@pytest.mark.parametrize(
    ("H", "K", "first"),
    [(2, 2, 1), (4, 4, 2), (32, 8, 16), (9, 3, 6), (14, 2, 7), (8, 1, 4), (9, 1, 5), (2, 1, 1), (3, 3, 2), (15, 5, 9)],
)
def test_first_shifted_head(H, K, first):
    assert first_shifted_head(H, K) == first
    assert K == 1 or first % (H // K) == 0, "a key/value head would serve both halves"


@pytest.mark.parametrize(("H", "K"), [(1, 1), (4, 3), (2, 4), (4, 0)])
def test_heads_that_cannot_halve(H, K):
    with pytest.raises(InputError):
        first_shifted_head(H, K)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    W=st.none() | st.integers(1, 20),
    G=st.none() | st.integers(2, 30),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=150, deadline=None)
def test_a_piece_of_a_row_sees_what_it_saw_in_the_row(lengths, W, G, cut):
    """Starts relative to the piece, negative for a document that began before it."""
    T, pattern = sum(lengths), Pattern(W, G)
    starts = document_starts([sum(lengths[:i]) for i in range(len(lengths))], T)
    begin, end = sorted(min(int(part * T), T - 1) for part in cut)
    piece = lower_bounds(pattern, end + 1 - begin, document_starts=starts[:, begin : end + 1] - begin)
    whole = lower_bounds(pattern, T, document_starts=starts)[..., begin : end + 1]
    assert torch.equal(piece, (whole - begin).clamp_min(0))
    masks.check_lower_bounds(piece, end + 1 - begin)


@pytest.mark.parametrize("pattern", [Pattern(9), Pattern(None, 24), Pattern(None, 15), Pattern(9, 24)], ids=str)
def test_blocked_attention_of_a_piece_is_that_of_the_row(pattern):
    T, end = 150, 140
    q, k, v = torch.randn(3, 2, 4, T, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = torch.cat([document_starts([0, 50, 51, 84], T), document_starts([0, 9], T)])
    whole = blocked.attention(q, k, v, pattern, document_starts=starts)
    for start in (1, 23, 50, 60, 100):
        begin = int(lower_bounds(pattern, T, document_starts=starts)[..., start].min())
        own = (x[:, :, begin:end] for x in (q, k, v))
        piece = blocked.attention(*own, pattern, document_starts=starts[:, begin:end] - begin)
        assert piece.isfinite().all(), "the halo"
        torch.testing.assert_close(piece[:, :, start - begin :], whole[:, :, start:end], rtol=1e-12, atol=1e-12)
