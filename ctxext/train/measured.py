"""What evaluations under ./runs have measured of a model. No torch."""

from __future__ import annotations

from pathlib import Path

from ctxext.config import manifest as manifests
from ctxext.errors import ModelError
from ctxext.model.source import ModelSource


def measured_length(source: ModelSource, root: Path = manifests.RUNS) -> int | None:
    """Returns the longest length, in tokens, at which an eval under `root` measured the model with these weights.

    No weights are read: `--plan` must not hash a model of 140 GB. An eval hashes the weights that it measures, and the
    user's cache keeps these hashes by path, size and modification time. Weights without a cached hash count as never
    measured: None.
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
    # An eval's manifest lists the hashes of the weights that it measured as parents.
    weights = manifests.remembered_hashes(source.path) if evals else None
    lengths = [
        manifest.facts.get("longest", 0)
        for manifest in evals
        if weights and any(parent["weights"] == weights for parent in manifest.parents.values())
    ]
    return max(lengths, default=0) or None
