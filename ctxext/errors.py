"""What can go wrong, named by who is at fault: each leaf carries the exit code the command line ends with.

    1  a check that was asked for did not pass          CheckFailed
    2  what was given cannot be used                    InputError, SpecError, ModelError, DataError
    3  the machine or its surroundings cannot do it     EnvironmentFault

`message` says what was found and what is allowed; `hint` says what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class CtxextError(Exception):
    """The root: catching it catches everything ctxext refuses on purpose."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(CtxextError):
    """An argument, an option or a path that cannot be used as given."""


class SpecError(InputError):
    """A YAML file or `--set` that does not fit its spec; `faults` has every fault, not the first."""

    def __init__(self, source: str, faults: Sequence[str], *, hint: str | None = None):
        lines = "\n".join(f"  {fault}" for fault in faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"{source}: {count}\n{lines}", hint=hint)
        self.faults = tuple(faults)


class ModelError(CtxextError):
    """A model directory that is incomplete, contradicts itself, or is of no supported family."""


class DataError(CtxextError):
    """Text that is missing, empty, or not what its file name says."""


class EnvironmentFault(CtxextError):
    """Full disk, no network, a missing kernel or package: nothing the arguments could change."""

    exit_code = 3


class CheckFailed(CtxextError):
    """A gate or a proof that was run and did not hold. The output it guards is not written."""

    exit_code = 1
