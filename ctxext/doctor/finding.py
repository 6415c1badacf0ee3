"""The result of one check, and its remedy where the check fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from ctxext.errors import CheckFailed, CtxextError

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. `remedy`: what to do; empty where nothing is wrong or nothing can be done."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Returns the finding as a dict, for JSON."""
        return asdict(self)


def judged(name: str, check: Callable[[], str], remedy: str = "") -> Finding:
    """Runs `check` and returns its finding: ok with the returned text, or a failure where it raises.

    `remedy` is used where the error has no hint.
    """
    try:
        return Finding(name, "ok", check())
    except CtxextError as error:
        return Finding(name, "failure", error.message, error.hint or remedy)
    except Exception as error:
        # Libraries raise errors of any kind for broken files. One of them must not end the other checks.
        return Finding(name, "failure", f"{type(error).__name__}: {str(error)[:200]}", remedy)


def guarded(name: str, part: Callable[[], list[Finding]], remedy: str = "") -> list[Finding]:
    """Returns the findings of `part`, or one failure with the name `name` where it raises."""
    try:
        return part()
    except CtxextError as error:
        return [Finding(name, "failure", error.message, error.hint or remedy)]
    except Exception as error:  # as in `judged`
        return [Finding(name, "failure", f"{type(error).__name__}: {str(error)[:200]}", remedy)]


def require_health(findings: Iterable[Finding]) -> None:
    """Raises CheckFailed with the names of the failures, where there are any."""
    failed = [finding for finding in findings if finding.status == "failure"]
    if failed:
        raise CheckFailed(
            f"{len(failed)} failed: {', '.join(finding.name for finding in failed)}", hint=failed[0].remedy or None
        )
