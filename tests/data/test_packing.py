"""Tokens on disk are those of the text; sequences are a permutation of the stream, found by index alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctxext.data.documents import Document
from ctxext.data.packing import NO_LABEL, PackedSequences, _permuted, attended_share
from ctxext.data.store import TokenStore, tokenise
from ctxext.errors import DataError, InputError

EOS = 0


def tokenizer(size: int = 300) -> PreTrainedTokenizerFast:
    """One token a word: the word `wN` is token N."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")


def documents(lengths: list[int]) -> list[Document]:
    """Document d has `lengths[d]` words, all of token 2 + d % 200."""
    return [Document(f"w{2 + d % 200} " * n, f"d{d}") for d, n in enumerate(lengths)]


def make(directory: Path, lengths: list[int], **options: object) -> TokenStore:
    return tokenise(documents(lengths), tokenizer(), directory, eos_id=EOS, **options)  # type: ignore[arg-type]


def stream(lengths: list[int]) -> list[int]:
    return [t for d, n in enumerate(lengths) if n for t in [2 + d % 200] * n + [EOS]]


@pytest.mark.parametrize("shard_tokens", [1, 7, 1 << 20])
def test_tokens_are_those_of_the_text_across_shards(tmp_path: Path, shard_tokens: int) -> None:
    lengths = [5, 1, 0, 9, 2, 30]
    store = make(tmp_path / "t", lengths, shard_tokens=shard_tokens)
    expected = stream(lengths)
    assert store.read(0, store.meta.tokens).tolist() == expected
    assert store.read(3, 17).tolist() == expected[3:17]
    assert store.read(4, 4).tolist() == []
    assert store.bounds.tolist() == [0, 6, 8, 18, 21]  # the empty document is not there
    assert store.meta.documents == 5
    assert store.meta.text_bytes == sum(3 * n for n in lengths)
    assert not list(tmp_path.glob(".*")), "something was left beside the tokens"


def test_ids_are_two_bytes_up_to_65535_entries(tmp_path: Path) -> None:
    for size, dtype in [(65_535, "uint16"), (65_536, "uint32")]:
        text = [Document(f"w{size - 1} w3", "d")]
        store = tokenise(text, tokenizer(size), tmp_path / dtype, eos_id=EOS)
        assert store.meta.dtype == dtype
        assert store.read(0, 3).tolist() == [size - 1, 3, EOS]


def unreadable() -> Iterator[Document]:
    yield Document("w2 w3", "d")
    raise AssertionError("the documents were read again")


def test_equal_hashes_are_reused_and_others_replaced(tmp_path: Path) -> None:
    first = make(tmp_path / "t", [5, 6], source_fingerprint="a")
    assert not first.reused
    again = tokenise(unreadable(), tokenizer(), tmp_path / "t", eos_id=EOS, source_fingerprint="a")
    assert again.reused
    assert again.read(0, 13).tolist() == stream([5, 6])
    for options in [{"source_fingerprint": "b"}, {"source_fingerprint": ""}]:
        other = make(tmp_path / "t", [4], **options)
        assert not other.reused
        assert other.meta.tokens == 5
    other_eos = tokenise(documents([4]), tokenizer(), tmp_path / "t", eos_id=1, source_fingerprint="")
    assert other_eos.read(4, 5).tolist() == [1]


def test_an_interrupted_tokenisation_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        tokenise(unreadable(), tokenizer(), tmp_path / "t", eos_id=EOS)
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "t", [5], source_fingerprint="a")
    with pytest.raises(AssertionError):
        tokenise(unreadable(), tokenizer(), tmp_path / "t", eos_id=EOS, source_fingerprint="b")
    assert TokenStore.open(tmp_path / "t").meta.source == "a"


def test_unfinished_or_damaged_tokens_are_not_opened(tmp_path: Path) -> None:
    store = make(tmp_path / "t", [50])
    shard = store.directory / "tokens-00000.bin"
    whole = shard.read_bytes()
    del store
    shard.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="damaged"):
        TokenStore.open(tmp_path / "t")
    shard.write_bytes(whole)
    (tmp_path / "t" / "meta.json").unlink()
    with pytest.raises(DataError, match="no finished tokens"):
        TokenStore.open(tmp_path / "t")
    assert make(tmp_path / "t", [50]).meta.tokens == 51


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="thesis.tex"):
        make(tmp_path / "theirs", [3])
    with pytest.raises(InputError, match="outside the vocabulary"):
        tokenise(documents([3]), tokenizer(), tmp_path / "t", eos_id=300)
    with pytest.raises(DataError, match="no document has a token"):
        make(tmp_path / "t", [0])
    assert not (tmp_path / "t").exists()
    with pytest.raises(DataError, match="the data has 4 tokens; one sequence needs 5"):
        PackedSequences(make(tmp_path / "t", [3]), 5, seed=0, document_mask=True)


def test_documents_of_other_lengths_are_left_out_and_counted(tmp_path: Path) -> None:
    lengths = [5, 1, 0, 9, 2, 30]
    for shortest, longest, kept in [(2, None, [5, 9, 2, 30]), (None, 9, [5, 1, 9, 2]), (5, 9, [5, 9]), (5, 5, [5])]:
        limits = {"min_tokens": shortest, "max_tokens": longest, "source_fingerprint": "a"}
        store = make(tmp_path / "t", lengths, **limits)
        assert not store.reused, "tokens of other limits were taken"
        ids = [token for token in stream(lengths) if token]
        assert [np.count_nonzero(part) for part in np.split(store.read(0, store.meta.tokens), store.bounds[1:])] == kept
        assert set(store.read(0, store.meta.tokens).tolist()) <= {EOS, *ids}
        assert (store.meta.documents, store.meta.left_out) == (len(kept), 5 - len(kept))
        assert make(tmp_path / "t", lengths, **limits).reused
    with pytest.raises(DataError, match="all 5 documents are left out: none has 31 tokens or more, at most 40"):
        make(tmp_path / "t", lengths, min_tokens=31, max_tokens=40)


def naive(tokens: list[int], starts: list[int], first: int, seq_len: int, mask: bool) -> tuple[list[int], ...]:
    """(tokens, document_starts, labels) of the sequence at `first`, a position at a time."""
    out: list[tuple[int, int, int]] = []
    for at in range(first, first + seq_len):
        begun = [s for s in starts if s <= at]
        start = max(begun[-1] - first, 0) if mask else 0
        last = at == first + seq_len - 1
        crosses = mask and at + 1 in starts
        out.append((tokens[at], start, NO_LABEL if last or crosses else tokens[at + 1]))
    return tuple(list(column) for column in zip(*out, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=25),
    seq_len=st.integers(2, 17),
    mask=st.booleans(),
    seed=st.integers(0, 9),
)
def test_sequences_against_a_walk(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, mask: bool, seed: int
) -> None:
    expected = stream(lengths)
    if len(expected) < seq_len:
        return
    store = make(tmp_path_factory.mktemp("walk") / "t", lengths, shard_tokens=11)
    packed = PackedSequences(store, seq_len, seed=seed, document_mask=mask)
    assert len(packed) == len(expected) // seq_len
    for i in range(2 * len(packed)):
        got = packed.sequence(i)
        want = naive(expected, store.bounds.tolist(), packed.offset(i), seq_len, mask)
        for name, have, should in zip(got._fields, got, want, strict=True):
            assert have.dtype == torch.int64
            assert have.tolist() == should, f"{name} of sequence {i} at offset {packed.offset(i)}"


def test_every_epoch_has_every_sequence_once_in_another_order(tmp_path: Path) -> None:
    store = make(tmp_path / "t", [999])
    packed = PackedSequences(store, 10, seed=3, document_mask=True)
    epochs = [[packed.offset(i) for i in range(e * 100, (e + 1) * 100)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 1000, 10))
    assert epochs[0] != epochs[1] != epochs[2]
    other = PackedSequences(store, 10, seed=4, document_mask=True)
    assert [other.offset(i) for i in range(100)] not in epochs
    same = PackedSequences(TokenStore.open(tmp_path / "t"), 10, seed=3, document_mask=True)
    assert [same.offset(i) for i in (250, 7)] == [epochs[2][50], epochs[0][7]], "the order depends on the past"
    with pytest.raises(IndexError):
        packed.sequence(-1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_the_permutation_is_one(count: int) -> None:
    assert sorted(_permuted(i, count, 0, 0) for i in range(count)) == list(range(count))


def test_the_permutation_is_cheap_and_shuffles_at_any_size() -> None:
    count = 10**9
    places = [_permuted(i, count, 1, 2) for i in range(2000)]
    assert len(set(places)) == 2000
    assert abs(np.mean(places) / count - 0.5) < 0.05, f"mean place {np.mean(places) / count:.3f}, not near 0.5"
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.1


def test_attended_share_against_a_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for case, lengths in enumerate([[1] * 40, [200], [9, 10, 11, 60], rng.integers(1, 50, 30).tolist()]):
        store = make(tmp_path / f"t{case}", lengths)
        for seq_len in (2, 7, 20):
            packed = PackedSequences(store, seq_len, seed=0, document_mask=True)
            history = torch.stack(
                [torch.arange(seq_len) - packed.sequence(i).document_starts for i in range(len(packed))]
            )
            counted = (history >= seq_len / 2).double().mean().item()
            assert attended_share(store, seq_len) == pytest.approx(counted), f"{lengths} at {seq_len}"
    assert attended_share(store, 10**6) == 0.0


def test_rows_of_documents_of_one_token(tmp_path: Path) -> None:
    packed = PackedSequences(make(tmp_path / "t", [1] * 8), 6, seed=0, document_mask=True)
    row = packed.sequence(0)
    assert row.document_starts.tolist() == [0, 0, 2, 2, 4, 4]
    assert row.labels.tolist() == [EOS, NO_LABEL, EOS, NO_LABEL, EOS, NO_LABEL]
