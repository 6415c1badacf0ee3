"""One thing looked at, and what helps where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from ctxext.errors import CheckFailed, CtxextError

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """`remedy` says what to do; empty where all is well or nothing can be done."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def judged(name: str, check: Callable[[], str], remedy: str = "") -> Finding:
    """`check`, which says what it found, or raises what is a failure."""
    try:
        return Finding(name, "ok", check())
    except CtxextError as error:
        return Finding(name, "failure", error.message, error.hint or remedy)
    except Exception as error:  # an ill file makes libraries raise whatever they like; the examination goes on
        return Finding(name, "failure", f"{type(error).__name__}: {str(error)[:200]}", remedy)


def guarded(name: str, part: Callable[[], list[Finding]], remedy: str = "") -> list[Finding]:
    """The findings of a part of the examination; one failure called `name` where that part raises."""
    try:
        return part()
    except CtxextError as error:
        return [Finding(name, "failure", error.message, error.hint or remedy)]
    except Exception as error:  # as above: a broken file makes libraries raise errors of any kind
        return [Finding(name, "failure", f"{type(error).__name__}: {str(error)[:200]}", remedy)]


def require_health(findings: Iterable[Finding]) -> None:
    """Raises CheckFailed, naming the failures."""
    ill = [finding for finding in findings if finding.status == "failure"]
    if ill:
        raise CheckFailed(
            f"{len(ill)} failed: {', '.join(finding.name for finding in ill)}", hint=ill[0].remedy or None
        )
