"""The common parts of all suites: items run in batches, each outcome is saved at once, and outcomes become rows.

A suite provides a `Job`. Batches are formed before saved outcomes are looked up, so that a resumed run does the same
arithmetic as an uninterrupted one. Outcome ids are the same for every model: comparisons pair by them (compare.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from ctxext.errors import DataError
from ctxext.progress import CountProgress

STAR = "* beyond the model's usable length"  # the note under tables with numbers at such lengths


class Item(Protocol):
    """One unit of work. `id` is unique in its suite; items of one `size`, in tokens, run together."""

    @property
    def id(self) -> str:
        """Returns the id, which is unique in the suite."""

    @property
    def size(self) -> int:
        """Returns the number of tokens; items of one size run together."""


@dataclass(frozen=True)
class Outcome:
    """The result of one item.

    `score` is a sum over `weight` things: for a case 0 to 1 over 1, for a window nats over tokens.
    """

    id: str
    task: str
    length: int
    score: float
    weight: float = 1.0
    details: dict[str, Any] = field(default_factory=dict)


def checked_details(details: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for details that a report draws and that have a wrong form. Others are not checked."""
    depths, buckets = details.get("by_depth", {}), details.get("buckets", [])
    if not isinstance(depths, dict) or not all(_is_number(float(at)) and _is_number(x) for at, x in depths.items()):
        raise ValueError(f"by_depth is {str(depths)[:80]}; allowed: a share, or null, by depth")
    if not isinstance(buckets, list) or not all(isinstance(bucket, dict) and _is_bucket(bucket) for bucket in buckets):
        raise ValueError(f"buckets are {str(buckets)[:80]}; allowed: a list of start, stop and nats_per_token")
    return details


def _is_bucket(bucket: dict[str, Any]) -> bool:
    edges = isinstance(bucket.get("start"), int) and isinstance(bucket.get("stop"), int)
    return edges and "nats_per_token" in bucket and _is_number(bucket["nats_per_token"])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


@dataclass(frozen=True)
class ResultRow:
    """One number and what it measures. `low` and `high` bound it with 95% confidence, where that is known.

    task          "" for the number over all tasks of the suite
    length        in tokens; 0: the suite has no lengths
    n             number of cases, windows or tokens (the suite's `metric` says which)
    extrapolated  whether the model does not support the length
    """

    suite: str
    protocol: str
    task: str
    length: int
    metric: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    details: Annotated[dict[str, Any], AfterValidator(checked_details)] = field(default_factory=dict)
    extrapolated: bool = False


@dataclass(frozen=True)
class SuiteJob:
    """One suite on one model. `run` takes items of one size; `rows` takes all outcomes in the order of the items."""

    items: Sequence[Any]
    run: Callable[[Sequence[Any]], list[Outcome]]
    rows: Callable[[Sequence[Outcome]], list[ResultRow]]
    notes: tuple[str, ...] = ()


class Ledger:
    """The outcomes of one job, appended to a file as one JSON line each. `path` None keeps them in memory only."""

    def __init__(self, path: Path | None = None):
        self.outcomes: dict[str, Outcome] = {}
        self._path = path
        if path is not None and path.exists():
            self._read(path)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Records outcomes, on disk before it returns; an id that is already known keeps its first outcome."""
        fresh = [outcome for outcome in outcomes if outcome.id not in self.outcomes]
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(outcome)) + "\n" for outcome in fresh))
        self.outcomes |= {outcome.id: outcome for outcome in fresh}

    def _read(self, path: Path) -> None:
        """Reads the saved outcomes; a last line that a kill or a full disk cut off is removed from the file."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        # Truncate the file too, or the next appended line would join the broken one.
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: not an outcome ({error})", hint="remove this line, or the file"
                ) from None
            self.outcomes[outcome.id] = outcome


def run_job(job: SuiteJob, ledger: Ledger, tokens_per_batch: int, progress: CountProgress) -> list[ResultRow]:
    """Runs the items that the ledger does not have yet, batch by batch, and returns the rows."""
    known = sum(item.id in ledger.outcomes for item in job.items)
    progress(known, len(job.items))
    # A batch with any missing item runs whole, so that its shape and arithmetic are those of an uninterrupted run.
    for batch in batches(job.items, tokens_per_batch):
        if all(item.id in ledger.outcomes for item in batch):
            continue
        known -= sum(item.id in ledger.outcomes for item in batch)
        ledger.add(job.run(batch))
        known += len(batch)
        progress(known, len(job.items))
    return job.rows([ledger.outcomes[item.id] for item in job.items])


def batches(items: Sequence[Any], tokens: int) -> Iterator[Sequence[Any]]:
    """Yields neighbouring items of one size, at most `tokens` tokens together, or a single longer item."""
    for size, group in groupby(items, key=lambda item: item.size):
        same = list(group)
        count = max(1, tokens // max(1, size))
        yield from (same[i : i + count] for i in range(0, len(same), count))


def mean(outcomes: Sequence[Outcome]) -> float | None:
    """Returns the sum of scores over the sum of weights; None where the weights sum to 0."""
    weight = sum(outcome.weight for outcome in outcomes)
    return sum(outcome.score for outcome in outcomes) / weight if weight else None


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Returns the 95% interval of a rate, by Wilson's score (1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    middle = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def rates(suite: str, protocol: str, metric: str, outcomes: Sequence[Outcome], **details: Any) -> list[ResultRow]:
    """Returns one row per length for cases that score 0 to 1, with the mean of each depth where cases have depths.

    The interval is Wilson's, which is for cases that are right or wrong; it is left out where any case has partial
    credit.
    """
    rows = []
    for length in dict.fromkeys(outcome.length for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.length == length]
        total, n = sum(outcome.score for outcome in mine), len(mine)
        whole = all(outcome.score in (0.0, 1.0) for outcome in mine)
        low, high = wilson(total, n) if whole else (None, None)
        depths = {
            str(depth): mean([o for o in mine if o.details.get("depth") == depth])
            for depth in dict.fromkeys(o.details.get("depth") for o in mine)
            if depth is not None
        }
        extra = {**details, **({"by_depth": depths} if depths else {})}
        rows.append(ResultRow(suite, protocol, "", length, metric, total / n, n, low, high, extra))
    return rows
