"""The embedded corpus: what is read, how it is split, and that the same arguments give the same stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re

import pytest

from ctxext.data import corpus, synthetic
from ctxext.errors import DataError


def _stream(count: int, **arguments):
    return list(itertools.islice(corpus.corpus_documents("train", **arguments), count))


def test_files_are_sorted_and_none_is_a_test_or_vendored():
    names = [path.relative_to(corpus.stdlib_root()).as_posix() for path in corpus.stdlib_files()]
    assert names == sorted(names)
    assert len(names) > 100
    bad = [name for name in names if corpus.SKIPPED_DIRECTORIES.intersection(name.split("/")[:-1])]
    assert not bad, f"files of skipped directories are in the corpus: {bad[:5]}"


def test_splits_are_disjoint_and_about_nine_to_one():
    train = {document.name: len(document.text) for document in corpus.stdlib_documents("train")}
    held_out = {document.name: len(document.text) for document in corpus.stdlib_documents("held-out")}
    assert not train.keys() & held_out.keys()
    share = sum(held_out.values()) / (sum(held_out.values()) + sum(train.values()))
    assert 0.04 < share < 0.2, f"held-out share of the characters is {share:.3f}"


def test_split_depends_on_the_path_alone():
    assert {corpus.split_of(f"file{i}.py") for i in range(200)} == {"train", "held-out"}
    # Written down: a change of the hash would move files a released model was trained on into its evaluation.
    assert [corpus.split_of(name) for name in FROZEN_SPLITS] == list(FROZEN_SPLITS.values())


FROZEN_SPLITS = {"os.py": "train", "json/decoder.py": "train", "compileall.py": "held-out", "crypt.py": "held-out"}


def test_stream_is_deterministic_and_seeded():
    arguments = {"synthetic_fraction": 0.5, "span_chars": 1000}
    assert _stream(60, seed=3, **arguments) == _stream(60, seed=3, **arguments)
    assert _stream(60, seed=3, **arguments) != _stream(60, seed=4, **arguments)


def test_stream_leaves_the_global_generator_alone():
    random.seed(0)
    before = random.getstate()
    _stream(20, synthetic_fraction=0.5)
    assert random.getstate() == before


def test_one_pass_has_every_real_character_once_and_the_fraction_asked_for():
    real = made = 0
    for document in corpus.corpus_documents("held-out", synthetic_fraction=0.4):
        if document.name.startswith("synthetic:"):
            made += len(document.text)
        else:
            real += len(document.text)
    assert real == sum(len(document.text) for document in corpus.stdlib_documents("held-out"))
    assert made / (made + real) == pytest.approx(0.4, abs=0.02)


def test_max_chars_ends_the_stream_and_goes_past_one_pass():
    whole = sum(len(document.text) for document in corpus.stdlib_documents("held-out"))
    wanted = 2 * whole
    lengths = [len(document.text) for document in corpus.corpus_documents("held-out", max_chars=wanted)]
    assert wanted <= sum(lengths) < wanted + max(lengths) + 1


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match="synthetic_fraction"):
        next(corpus.corpus_documents("train", synthetic_fraction=1.0))
    with pytest.raises(DataError, match="span_chars"):
        next(corpus.corpus_documents("train", span_chars=10))
    with pytest.raises(DataError, match="split"):
        corpus.stdlib_documents("test")  # type: ignore[arg-type]


def test_fingerprint_is_of_the_files_and_json():
    found = corpus.fingerprint()
    json.dumps(found)
    assert found["file_count"] == len(found["files"]) == len(corpus.stdlib_files())
    assert found["sha256"] == hashlib.sha256("\n".join(found["files"]).encode()).hexdigest()
    first = corpus.stdlib_files()[0]
    assert found["files"][0].split(" ")[0] == hashlib.sha256(first.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def filler() -> synthetic.Filler:
    return synthetic.Filler(corpus.stdlib_documents("held-out"))


@pytest.mark.parametrize("make", [make for make, _ in synthetic.KINDS.values()], ids=lambda make: make.__name__)
@pytest.mark.parametrize("chars", [160, 1280, 6000])
def test_synthetic_documents_have_about_the_size_asked_for(make, chars, filler):
    for seed in range(20):
        text = make(random.Random(seed), filler, chars)
        assert len(text) <= chars + 80, f"{make.__name__} made {len(text)} characters for {chars}"
        assert len(text) >= min(chars, 120) * 0.5 - 80


def test_a_passkey_is_answered_by_its_own_key_at_every_distance(filler):
    distances = []
    for seed in range(300):
        text = synthetic.passkey(random.Random(seed), filler, 4000)
        key = re.search(r"What is the pass key\? The pass key is (\d+)\.\n$", text).group(1)
        assert text.count(key) >= 3, text
        distances.append((len(text) - text.index(key)) / len(text))
    assert min(distances) < 0.1 and max(distances) > 0.9, "needles are not spread over the document"


def test_key_value_questions_follow_their_assignment(filler):
    text = synthetic.key_value(random.Random(0), filler, 6000)
    for match in re.finditer(r"^assert ([a-z]+) == (\d{5})$", text, re.MULTILINE):
        name, value = match.groups()
        assert f"{name} = {value}\n" in text[: match.start()], f"{name} is asked for before it is told"


def test_filler_ends_with_a_line_and_keeps_to_its_size(filler):
    rng = random.Random(0)
    assert filler.draw(rng, 0) == ""
    for chars in (1, 5, 100, 3000):
        text = filler.draw(rng, chars)
        assert text.endswith("\n") and len(text) <= chars
