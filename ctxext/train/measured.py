"""What is known of a model from evaluations lying under ./runs. No torch."""

from __future__ import annotations

from pathlib import Path

from ctxext.config import manifest as manifests
from ctxext.errors import ModelError
from ctxext.model.source import ModelSource


def measured_length(source: ModelSource, root: Path = manifests.RUNS) -> int | None:
    """The longest length, in tokens, at which an eval under `root` measured the model with these weights."""
    if source.path is None or not root.is_dir():
        return None
    weights, longest = manifests.weight_hashes(source.path), 0
    for directory in root.iterdir():
        try:
            manifest = manifests.read(directory)
        except ModelError:
            continue
        if manifest is None or manifest.kind != "eval":
            continue
        if any(parent["weights"] == weights for parent in manifest.parents.values()):
            longest = max(longest, manifest.facts.get("longest", 0))
    return longest or None
