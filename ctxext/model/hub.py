"""Downloads a model from the hub and reports one clear error for each way in which that can fail. No torch.

huggingface_hub reports most failures as "not in the local cache", with the true error as its cause. The code
therefore examines the whole chain of causes: a full disk is not an unreachable hub.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctxext.errors import CtxextError, EnvironmentFault, InputError

UNREAD = ["consolidated*.safetensors"]  # a second copy of the weights in a format that transformers does not read
LOCAL = "or give a local directory instead of the hub id"


def download(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Downloads files of a hub model into huggingface_hub's cache, with huggingface_hub's token, and returns the path.

    Raises InputError for a model that does not exist or that the user may not read. Raises EnvironmentFault for a
    full disk, a cache that cannot be written, a hub that limits requests or fails, and an unreachable hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    network = HfHubHTTPError.__mro__[1]  # the base of all errors of the HTTP client that huggingface_hub uses
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=UNREAD))
    except HFValidationError as error:
        raise InputError(f"{hub_id}: not a model's name ({error})", hint=f"check the spelling, {LOCAL}") from None
    except (network, OSError) as error:
        raise _fault(hub_id, revision, error) from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    # A chain of exceptions may be cyclic.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _fault(hub_id: str, revision: str | None, error: Exception) -> CtxextError:
    """Returns the error to report for a failed download: the first known failure in the chain of causes."""
    for cause in _chain(error):
        if found := _refused(hub_id, revision, cause) or _on_this_machine(hub_id, cause) or _answered(hub_id, cause):
            return found
    return EnvironmentFault(
        f"{hub_id} is not in the local cache and the hub cannot be reached ({_first_name(error)})",
        hint=f"download it once with a network connection, {LOCAL}",
    )


def _refused(hub_id: str, revision: str | None, cause: BaseException) -> CtxextError | None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    # GatedRepoError is a subclass of RepositoryNotFoundError, so it comes first.
    if isinstance(cause, GatedRepoError):
        return InputError(
            f"{hub_id} is gated and no accepted token was found",
            hint=f"accept its licence on its page, then `hf auth login`; {LOCAL}",
        )
    if isinstance(cause, RepositoryNotFoundError):
        return InputError(
            f"{hub_id}: no such model on the hub, or a private one without a token",
            hint=f"check the spelling, `hf auth login` if it is private, {LOCAL}",
        )
    if isinstance(cause, RevisionNotFoundError):
        return InputError(f"{hub_id}: no revision {revision} on the hub", hint="check the revision")
    return None


def _on_this_machine(hub_id: str, cause: BaseException) -> CtxextError | None:
    if not isinstance(cause, OSError) or isinstance(cause, ConnectionError):
        return None
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFault(
            f"{hub_id}: the disk of the hub's cache is full ({cause.filename or cause.strerror})",
            hint="free disk space, or set HF_HOME to a directory on a larger disk",
        )
    if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EnvironmentFault(
            f"{hub_id}: the hub's cache cannot be written ({cause.filename or cause.strerror})",
            hint="set HF_HOME to a directory that you can write to",
        )
    return None


def _answered(hub_id: str, cause: BaseException) -> CtxextError | None:
    """Returns the error for a hub that answered with an error status, or for offline mode; None for other causes."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(cause, OfflineModeIsEnabled):
        return EnvironmentFault(
            f"{hub_id} is not in the local cache, and HF_HUB_OFFLINE forbids a request to the hub",
            hint=f"unset HF_HUB_OFFLINE, {LOCAL}",
        )
    if not isinstance(cause, HfHubHTTPError):
        return None
    # Access errors are the user's to fix (InputError); the other statuses are the hub's state (EnvironmentFault).
    status = cause.response.status_code
    if status in (401, 403):
        return InputError(f"{hub_id}: the hub denies access (HTTP {status})", hint=f"`hf auth login`, {LOCAL}")
    if status == 429:
        return EnvironmentFault(
            f"{hub_id}: the hub received too many requests (HTTP 429)",
            hint=f"try again in some minutes; with a token (`hf auth login`) more requests are allowed; {LOCAL}",
        )
    return EnvironmentFault(
        f"{hub_id}: the hub returns a server error (HTTP {status})", hint=f"try again later, {LOCAL}"
    )


def _first_name(error: BaseException) -> str:
    """Returns the type name of the last cause in the chain, which is the failure that came first."""
    return type(list(_chain(error))[-1]).__name__
