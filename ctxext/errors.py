"""The exceptions of ctxext, named by cause; each class has the exit code of the command line.

    1  a requested check failed                         CheckFailed
    2  the given input cannot be used                   InputError, SpecError, ModelError, DataError
    3  the machine or its environment cannot do it      EnvironmentFault

`message` describes the problem and what is allowed; `hint` describes what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class CtxextError(Exception):
    """The base class of all errors that ctxext raises on purpose."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(CtxextError):
    """An argument, an option or a path that cannot be used as given."""


class SpecError(InputError):
    """A YAML file or `--set` that does not fit its spec; `faults` lists all faults, not only the first."""

    def __init__(self, source: str, faults: Sequence[str], *, hint: str | None = None):
        lines = "\n".join(f"  {fault}" for fault in faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"{source}: {count}\n{lines}", hint=hint)
        self.faults = tuple(faults)


class ModelError(CtxextError):
    """A model directory that is incomplete, contradicts itself, or belongs to no supported family."""


class DataError(CtxextError):
    """Text that is missing, empty, or not of the type that its file name indicates."""


class EnvironmentFault(CtxextError):
    """A problem of the machine, such as a full disk, no network, or a missing kernel or package."""

    exit_code = 3


class NoSharedRun(EnvironmentFault):
    """Rank 0 has no run for the other ranks; its own error says why. `exit_code` is that of rank 0."""

    def __init__(self, exit_code: int):
        super().__init__("rank 0 has no run for the other ranks", hint="the error of rank 0 says why")
        self.exit_code = exit_code


class CheckFailed(CtxextError):
    """A check that ran and failed. The output that it guards is not written."""

    exit_code = 1
