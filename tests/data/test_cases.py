"""Cases on disk are what they were, or are refused; a limit is spread evenly over every level of groups."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ctxext.data.cases import Case, evenly, largest, manifest_of, private_random, prompt_ids, read_cases, write_cases
from ctxext.errors import DataError, InputError

CASES = [Case(f"t/{i}", "t", 64, f"präfix {i}", ("a", "b"), 8, {"depth": 0.5}) for i in range(3)]


def test_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cases.jsonl"
    manifest = write_cases(path, CASES, {"seed": 0})
    cases, found = read_cases(path)
    assert (cases, found) == (CASES, manifest)
    assert (manifest["cases"], manifest["seed"], len(manifest["sha256"])) == (3, 0, 64)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["cases.jsonl", "cases.jsonl.manifest.json"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "cases.jsonl:2: not JSON"),
        ("[]", "cases.jsonl:2: not a JSON object"),
        ({"prompt": None}, "cases.jsonl:2: prompt is NoneType"),
        ({"references": "a"}, "references is str 'a'; allowed: list"),
        ({"id": "t/0"}, "the id 't/0' is used twice"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: Any, said: str) -> None:
    path = tmp_path / "cases.jsonl"
    good = {"id": "t/0", "task": "t", "length": 8, "prompt": "p", "references": ["a"], "max_new_tokens": 1}
    second = line if isinstance(line, str) else json.dumps({**good, "id": "t/1", **line})
    path.write_text(json.dumps(good) + "\n" + second + "\n")
    with pytest.raises(DataError, match=said):
        read_cases(path)


def test_missing_empty_and_changed_files(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    with pytest.raises(InputError, match="cannot read the cases"):
        read_cases(path)
    path.write_text("")
    with pytest.raises(DataError, match="has no case"):
        read_cases(path)
    write_cases(path, CASES, {})
    path.write_text(path.read_text().replace("präfix 1", "prefix 1"))
    with pytest.raises(DataError, match="the sha256 of .* differs from the one in its manifest"):
        read_cases(path)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"{", "manifest.json: not JSON"),
        (b"\xff", "manifest.json: not JSON"),
        (b"[]", "manifest.json: not a JSON object with a sha256"),
        (b'{"seed": 0}', "manifest.json: not a JSON object with a sha256"),
    ],
)
def test_a_damaged_manifest_is_a_data_error(tmp_path: Path, manifest: bytes, said: str) -> None:
    path = tmp_path / "cases.jsonl"
    write_cases(path, CASES, {})
    manifest_of(path).write_bytes(manifest)
    with pytest.raises(DataError, match=said):
        read_cases(path)


def test_invalid_utf8_is_a_data_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    write_cases(path, CASES, {})
    manifest_of(path).unlink()
    data = path.read_bytes()
    at = data.index("präfix 2".encode()) + 2
    path.write_bytes(data[:at] + b"\xe4" + data[at + 2 :])
    with pytest.raises(DataError, match=f"cases.jsonl:3: invalid UTF-8 at byte {at} of the file .0xe4"):
        read_cases(path)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="cases.jsonl:1: task is missing; allowed: str"):
        read_cases(path)


def test_a_limit_is_spread_over_every_level() -> None:
    cells = [(length, depth, i) for length in (1, 2, 4) for depth in (0, 1) for i in range(5)]
    chosen = evenly(cells, 7, lambda cell: cell[:2])
    assert chosen == sorted(chosen), "the order is kept"
    assert Counter(cell[0] for cell in chosen) == {1: 3, 2: 2, 4: 2}
    assert Counter(cell[:2] for cell in chosen) == {(1, 0): 2, (1, 1): 1, (2, 0): 1, (2, 1): 1, (4, 0): 1, (4, 1): 1}
    assert evenly(cells, None, lambda cell: cell[:1]) == cells == evenly(cells, 99, lambda cell: cell[:1])
    uneven = [("a", 0)] + [("b", i) for i in range(9)]
    assert Counter(case[0] for case in evenly(uneven, 6, lambda case: case[:1])) == {"a": 1, "b": 5}


@pytest.mark.parametrize("most", [0, 1, 2, 7, 64, 1000])
def test_the_largest_that_fits(most: int) -> None:
    for start in (1, 50, 5000):
        assert largest(lambda n: n <= most, start) == most


def test_private_randomness_is_its_own() -> None:
    assert private_random("a", 1, 0.5).random() == private_random("a", 1, 0.5).random()
    assert private_random("a", 1).random() != private_random("a", 2).random()


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_has_no_end(stories_tokenizer: Any) -> None:
    ids = prompt_ids(stories_tokenizer, "Once upon a time")
    assert ids[0] == stories_tokenizer.bos_token_id and ids[-1] != stories_tokenizer.eos_token_id


@pytest.fixture(scope="module")
def stories_tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


def test_line_ends_of_other_alphabets_are_text(tmp_path: Path) -> None:
    case = Case("t/0", "t", 64, "a\u2028b\u2029c\x85d\ne", ("a",), 8)
    write_cases(tmp_path / "cases.jsonl", [case], {})
    assert read_cases(tmp_path / "cases.jsonl")[0] == [case]
