"""What every fuzz test holds a call to: an error of ours or a result, that it ends, in little memory."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxext.errors import CtxextError

SINK_SHARE = 60.0  # seconds: a call that takes milliseconds is not done by then, however busy the machine
MEMORY = 4 * 1024**3  # bytes that a call may take on top of what the process has


def survives(call: Callable[[], Any]) -> Any:
    """What `call` gives, or the CtxextError it ends with. Any other exception is a failure, and so is not ending."""

    def hangs(*_: Any) -> None:
        raise AssertionError(f"not done after {SINK_SHARE:g} seconds")

    old = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, SINK_SHARE)
    try:
        outcome = call()
    except CtxextError as error:
        assert error.message.strip()
        outcome = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    return outcome


@pytest.fixture(scope="package", autouse=True)
def little_memory() -> Iterator[None]:
    """A list of 10^9 entries is to be a MemoryError here, not the machine's end."""
    with open("/proc/self/status", encoding="ascii") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)


@pytest.fixture(name="survives", scope="session")
def survives_fixture() -> Callable[[Callable[[], Any]], Any]:
    return survives


@pytest.fixture(params=["quick", pytest.param("slow", marks=pytest.mark.slow)])
def fuzz(request: Any) -> Callable[..., None]:
    """fuzz(strategy, check, quick=, slow=): `check` on so many drawn inputs; the quick ones are the same every time."""

    def run(strategy: st.SearchStrategy[Any], check: Callable[[Any], Any], *, quick: int, slow: int) -> None:
        short = request.param == "quick"
        examples = {"max_examples": quick if short else slow, "derandomize": short}

        @settings(**examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def drawn(value: Any) -> None:
            check(value)

        drawn()

    return run


SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**53, 2**63, -(2**63), 10**30, 10**300, 10**400]),
    st.sampled_from([1e308, 1e-320, -0.0, 0.5, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "x", "8", "1e5", "\0", "é", "nan", "true", "../..", "/dev/zero", "x" * 5000]),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.text(max_size=8),
)


@pytest.fixture(scope="session")
def anything() -> st.SearchStrategy[Any]:
    """Any value JSON may hold, absurd ones above all."""
    return st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=8,
    )
