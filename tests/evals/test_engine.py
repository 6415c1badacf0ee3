"""Items are run once, whatever happened before; a limit is spread; outcomes on disk survive a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ctxext.errors import DataError
from ctxext.evals.item_runner import Ledger, Outcome, SuiteJob, batches, rates, run_job


@dataclass(frozen=True)
class Item:
    id: str
    size: int


ITEMS = [Item(f"{size}/{i}", size) for size in (4, 8) for i in range(5)]


class Killed(Exception):
    """What a kill looks like from within."""


def job(seen: list[list[str]], most: int = 10**9) -> SuiteJob:
    def run(batch: Sequence[Item]) -> list[Outcome]:
        if len(seen) == most:
            raise Killed
        seen.append([item.id for item in batch])
        return [Outcome(item.id, "", item.size, float(len(item.id))) for item in batch]

    return SuiteJob(ITEMS, run, lambda outcomes: rates("s", "p", "m", outcomes))


def test_batches_hold_items_of_one_size_up_to_a_number_of_tokens() -> None:
    assert [[item.id for item in batch] for batch in batches(ITEMS, 12)] == [
        ["4/0", "4/1", "4/2"],
        ["4/3", "4/4"],
        ["8/0"],
        ["8/1"],
        ["8/2"],
        ["8/3"],
        ["8/4"],
    ]
    assert [len(batch) for batch in batches(ITEMS, 1)] == [1] * 10


def test_a_killed_job_goes_on_with_the_batches_it_had_not_done(tmp_path: Path) -> None:
    path, first, second, whole = (
        tmp_path / "x" / "ledger.jsonl",
        list[list[str]](),
        list[list[str]](),
        list[list[str]](),
    )
    with pytest.raises(Killed):
        run_job(job(first, 3), Ledger(path), 12, lambda *_: None)
    with path.open("a") as file:
        file.write('{"id": "8/1", "task": "", "len')  # killed in the middle of a line
    said: list[tuple[int, int]] = []
    rows = run_job(job(second), Ledger(path), 12, lambda *at: said.append(at))
    unbroken = run_job(job(whole), Ledger(), 12, lambda *_: None)
    assert first + second == whole and not set(map(tuple, first)) & set(map(tuple, second))
    assert rows == unbroken
    assert said == [(6, 10), (7, 10), (8, 10), (9, 10), (10, 10)]
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert ids == [item.id for item in ITEMS]


def test_a_batch_known_in_part_is_run_whole_and_written_once(tmp_path: Path) -> None:
    path, seen = tmp_path / "ledger.jsonl", list[list[str]]()
    ledger = Ledger(path)
    ledger.add([Outcome("4/1", "", 4, 9.0)])
    run_job(job(seen), ledger, 12, lambda *_: None)
    assert seen[0] == ["4/0", "4/1", "4/2"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["score"] for line in lines if line["id"] == "4/1"] == [9.0]


def test_a_line_that_is_no_outcome_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"id": "a", "task": "", "length": 1, "score": 1.0}\n{"id": 3}\n')
    with pytest.raises(DataError, match="ledger.jsonl:2"):
        Ledger(path)


def test_rates_by_length_and_depth() -> None:
    made = [Outcome(str(i), "", 8, float(i < 3), details={"depth": i % 2 / 2}) for i in range(4)]
    (row,) = rates("niah", "p", "accuracy", made, seed=3)
    assert (row.value, row.n, row.details) == (0.75, 4, {"seed": 3, "by_depth": {"0.0": 1.0, "0.5": 0.5}})
    assert (row.low, row.high) == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson, 3 of 4
    (part,) = rates("ruler", "p", "score", [Outcome("a", "", 8, 0.5)])
    assert (part.value, part.low, part.details) == (0.5, None, {})
