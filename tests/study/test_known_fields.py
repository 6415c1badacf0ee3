"""A request of an older version, which lacks fields, beside one of this version."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ctxext.study.known_fields import known_fields


@dataclass(frozen=True)
class Inner:
    rank: int = 8
    added: str = "auto"


@dataclass(frozen=True)
class Outer:
    model: str
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    settings: dict = field(default_factory=dict)


OLD = {"model": "m", "inner": {"rank": 8}, "parts": [{"rank": 1}], "settings": {}}


def test_new_fields_at_their_default_are_left_out():
    assert known_fields(Outer("m", parts=(Inner(1),)), OLD) == OLD
    assert known_fields({"means": Outer("m", parts=(Inner(1),))}, {"means": OLD}) == {"means": OLD}


@pytest.mark.parametrize(
    "changed",
    [
        Outer("m", Inner(added="none"), (Inner(1),)),
        Outer("m", parts=(Inner(1, added="none"),)),
        Outer("m", parts=(Inner(1), Inner(2))),
        Outer("m", Inner(rank=4), (Inner(1),)),
        Outer("m", parts=(Inner(1),), settings={"added": 1}),
    ],
    ids=str,
)
def test_what_was_asked_otherwise_differs(changed):
    assert known_fields(changed, OLD) != OLD


def test_without_a_record_everything_is_kept():
    whole = {"model": "m", "inner": {"rank": 8, "added": "auto"}, "parts": [], "settings": {}}
    assert known_fields(Outer("m"), None) == whole
    # A field that is gone since differs too.
    assert known_fields(Outer("m"), whole | {"gone": 1}) == whole
