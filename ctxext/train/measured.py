"""What is known of a model from evaluations lying under ./runs. No torch."""

from __future__ import annotations

from pathlib import Path

from ctxext.config import manifest as manifests
from ctxext.errors import ModelError
from ctxext.model.source import ModelSource


def measured_length(source: ModelSource, root: Path = manifests.RUNS) -> int | None:
    """The longest length, in tokens, at which an eval under `root` measured the model with these weights.

    No weights are read: a plan that is only printed does not hash a model of 140 GB. An eval hashes the weights that it
    measures, and the user's cache remembers them by path, size and time of change. Weights that are not remembered were
    not measured here, as far as is known: None.
    """
    if source.path is None or not root.is_dir():
        return None
    evals = []
    for directory in root.iterdir():
        try:
            manifest = manifests.read(directory)
        except ModelError:
            continue
        if manifest is not None and manifest.kind == "eval":
            evals.append(manifest)
    weights = manifests.remembered_hashes(source.path) if evals else None
    lengths = [
        manifest.facts.get("longest", 0)
        for manifest in evals
        if weights and any(parent["weights"] == weights for parent in manifest.parents.values())
    ]
    return max(lengths, default=0) or None
