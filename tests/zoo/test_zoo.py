"""Every checkpoint of the zoo through every station, each compared with stock transformers."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.zoo.known import KNOWN
from tests.zoo.models import ZOO
from tests.zoo.stations import QUICK, STATIONS, YES, Subject, outcome

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((Path(__file__).parent / "outcomes.json").read_text("utf-8"))


def cases() -> list[object]:
    """A case for each checkpoint and station, in the order of the checkpoints."""
    found = []
    for slug in ZOO:
        for station in STATIONS:
            marks = [] if station in QUICK else [pytest.mark.slow]
            if (slug, station) in KNOWN:
                marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=KNOWN[slug, station]))
            found.append(pytest.param(slug, station, marks=marks, id=f"{slug}-{station.replace(' ', '-')}"))
    return found


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """subject(slug): the checkpoint, built once, with what earlier stations made of it."""
    made: dict[str, Subject] = {}

    def get(slug: str) -> Subject:
        if slug not in made:
            made[slug] = Subject(ZOO[slug], tmp_path_factory.mktemp(slug))
        return made[slug]

    return get


@pytest.mark.parametrize(("slug", "station"), cases())
def test_a_station(slug: str, station: str, subject: Callable[[str], Subject]) -> None:
    """The result is transformers', or the refusal that is recorded."""
    meant = YES if (slug, station) in KNOWN else RECORDED[slug][station]
    assert outcome(station, subject(slug)) == meant


@pytest.mark.slow
@pytest.mark.parametrize("slug", ZOO)
def test_stock_transformers_opens_it(slug: str, tmp_path: Path) -> None:
    """The files of every row are those of a model that transformers builds, of unsupported families too."""
    from tests.zoo.build import build

    path = build(ZOO[slug], tmp_path / slug)
    assert len(list(path.glob("*.safetensors"))) >= ZOO[slug].shards


def test_the_records_are_of_this_zoo() -> None:
    assert {slug: set(row) for slug, row in RECORDED.items()} == {slug: set(STATIONS) for slug in ZOO}
    assert {slug for slug, _ in KNOWN} <= set(ZOO) and {station for _, station in KNOWN} <= set(STATIONS)
    assert len(ZOO) >= 30


def test_every_row_says_where_its_facts_come_from() -> None:
    assert all(row.source.strip() for row in ZOO.values())


def test_the_page_is_what_the_records_say() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "models_table.py"))["page"]
    assert (ROOT / "docs" / "models.md").read_text("utf-8") == page(), "run `make docs`"
