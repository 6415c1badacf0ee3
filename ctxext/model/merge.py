"""Merges a bundle into an ordinary Hugging Face directory: merge in fp32, compare with the live model, then cast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from ctxext.config import manifest as manifests
from ctxext.config.output import staged_output
from ctxext.errors import CheckFailed, ModelError
from ctxext.model.adapters import merge_adapter
from ctxext.model.card import model_card, runtime_note
from ctxext.model.companions import copy_companions, stated_licence
from ctxext.model.convert import write_config
from ctxext.model.load import LoadedModel, build_model, load_model
from ctxext.model.model_config import ModelConfig
from ctxext.model.shards import cast
from ctxext.model.source import ModelSource
from ctxext.model.stock import drop_generation_config
from ctxext.model.tokenizer import settle, warning

SHARD_BYTES = 5 * 1024**3
TOLERANCE = 1e-4  # as a part of the largest logit, in fp32
PROBE_TOKENS = 128


@dataclass(frozen=True)
class Adjustment:
    """A change of the live bundle before the merge. The checks of the merge cover it.

    facts  entries for the report and the manifest
    rows   the same facts as (name, value) lines
    fold   writes into the merged model's weights what the live model computes without a change of its weights
    draw   writes figures into the output
    """

    facts: dict[str, Any] = field(default_factory=dict)
    rows: tuple[tuple[str, str], ...] = ()
    fold: Callable[[Any], None] = lambda merged: None
    draw: Callable[[Path], None] = lambda directory: None


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge: three models compared, and their perplexities.

    live is the base with its adapter in fp32, merged is the merged model in fp32, saved is the model read back from
    disk in `dtype`. Differences are max |logit - logit|. Both perplexities are on the same text, before and after the
    cast to `dtype`; `perplexity_of` states the method, the text and the number of tokens. `adjustment` are the facts of
    the change of the live model, with the measurements that chose it; `adjusted` are its rows.
    """

    source: str
    base: str
    out: str
    dtype: str
    merged_max_diff: float
    saved_max_diff: float
    tolerance: float
    tied: bool
    perplexity_live: float
    perplexity_saved: float
    perplexity_of: str
    seconds: float
    adjustment: dict[str, Any] = field(default_factory=dict)
    adjusted: tuple[tuple[str, str], ...] = ()
    tokenizer: str | None = None  # how AutoTokenizer reads the output differently from ctxext, and what to use

    def as_dict(self) -> dict[str, Any]:
        """Returns the report for JSON, without the rows for the screen."""
        return {name: value for name, value in asdict(self).items() if name != "adjusted"}

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report as (name, value) lines."""
        return [
            ("bundle", f"{self.source} on {self.base}"),
            *self.adjusted,
            ("live = merged, fp32", f"max logit difference {self.merged_max_diff:.2g} (allowed {self.tolerance:.2g})"),
            (f"merged = reloaded, {self.dtype}", f"max logit difference {self.saved_max_diff:.2g} (must be 0)"),
            (
                "perplexity",
                f"{self.perplexity_live:.4f} live in fp32, {self.perplexity_saved:.4f} saved in {self.dtype}",
            ),
            ("perplexity of", self.perplexity_of),
            ("embeddings", "tied, as the base's" if self.tied else "not tied, as the base's"),
            *([] if self.tokenizer is None else [("tokenizer", self.tokenizer)]),
        ]


def merge(
    source: ModelSource,
    out: Path,
    *,
    dtype: str | None,
    force: bool,
    measure: Callable[[LoadedModel], tuple[float, str]],
    adjust: Callable[[LoadedModel], Adjustment] = lambda live: Adjustment(),
    requested: dict[str, Any] | None = None,
) -> MergeReport:
    """Merges a bundle and writes it to `out`.

    `measure` returns a loaded model's perplexity and a description of the text. `adjust` changes the live model before
    the merge. `requested` is the requested change, for the manifest. `dtype` None is the base's dtype.
    Raises CheckFailed when a comparison fails.
    """
    # Load in fp32: `merge_adapter` accepts nothing else, and the tolerance below is for fp32.
    began = time.monotonic()
    assert source.base is not None
    dtype = dtype or source.base.config.dtype or "float32"
    live = load_model(source, dtype="float32")
    adjustment = adjust(live)
    # Measure the live model before the merge: `merge_adapter` changes its weights in place.
    ids = _probe(source.config.shape.vocab_size, live.device)
    before, (perplexity_live, of) = _logits(live.model, ids), measure(live)
    merged = merge_adapter(live.model).eval()
    adjustment.fold(merged)
    after = _logits(merged, ids)
    merged_diff, tolerance = ((after - before).abs().max().item(), TOLERANCE * max(1.0, before.abs().max().item()))
    if not merged_diff <= tolerance:
        raise CheckFailed(f"merged logits differ from the live model's by {merged_diff:.3g} (allowed {tolerance:.2g})")
    # Cast parameters only: the buffers, RoPE's frequencies, stay in fp32. `cast` raises for a value that overflows.
    for name, parameter in merged.named_parameters():
        parameter.data = cast(parameter.data, getattr(torch, dtype), f"the merged {name}")
    expected = _logits(merged, ids)
    with staged_output(out, force) as staging:
        config = source.config.with_fields(dtype=dtype)
        _save(staging, merged.state_dict(), config)
        problem = _save_companions(source, staging, config)
        # Read the directory back before it gets its final name. Same dtype, same device: the logits must be identical.
        reloaded: Any = build_model(staging, config, getattr(torch, dtype)).to(live.device).eval()
        saved_diff = (_logits(reloaded, ids) - expected).abs().max().item()
        if saved_diff != 0.0:
            raise CheckFailed(f"the saved model's logits differ from the merged model's by {saved_diff:.3g}")
        tied = _tied_as_it_should_be(reloaded, config)
        report = MergeReport(
            source.name,
            source.base.name,
            str(out),
            dtype,
            merged_diff,
            saved_diff,
            tolerance,
            tied,
            perplexity_live,
            measure(LoadedModel(reloaded, live.tokenizer, source, live.device))[0],
            of,
            round(time.monotonic() - began, 2),
            adjustment.facts,
            adjustment.rows,
            problem and warning(problem, out.name),
        )
        adjustment.draw(staging)
        _describe(staging, source, config, report, requested or {})
    return report


def _save_companions(source: ModelSource, staging: Path, config: ModelConfig) -> str | None:
    """Writes tokenizer, templates and licence. Returns how AutoTokenizer would still read other ids, or None."""
    tokenizer = settle(source.directory, config.fields)
    copy_companions(source.directory, staging, tokenizer.files)
    drop_generation_config(staging)
    return tokenizer.problem


def _tied_as_it_should_be(model: Any, config: ModelConfig) -> bool:
    # Returns whether the head is tied. Raises CheckFailed where that differs from the base's config.
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied != config.shape.tied:
        raise CheckFailed(f"the saved model is {'tied' if tied else 'untied'}, but the base is not")
    return tied


def _probe(vocabulary: int, device: torch.device) -> Tensor:
    """Returns the ids [1, T] for the comparison of logits, the same in every run."""
    return torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the model gives NaN or infinite logits")
    return logits


def _save(directory: Path, state: dict[str, Tensor], config: ModelConfig) -> None:
    """Writes exactly the weights that the config implies, in shards of 5 GiB. A tied head is not a separate tensor."""
    named = {name: state[name] for name in config.tensors}
    save_torch_state_dict(named, directory, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})


def _describe(
    directory: Path, source: ModelSource, config: ModelConfig, report: MergeReport, requested: dict[str, Any]
) -> None:
    assert source.manifest is not None and source.base is not None
    text = [f"{report.base} with {report.source} merged into it.", runtime_note(config.fields)]
    card = model_card(f"{report.source}, merged", text, report.rows(), stated_licence(source.directory))
    (directory / "README.md").write_text(card, "utf-8")
    # The merged model keeps the lengths of the bundle, and names both of its parents.
    lengths = {"name": f"{source.name}-merged"} | {
        name: source.manifest.facts.get(name) for name in ("original_length", "usable_length")
    }
    manifest = manifests.new(
        "merge",
        spec={"dtype": report.dtype, **requested},
        facts=lengths | {"merge": report.as_dict()},
        parents={"finetune": manifests.parent(source.directory), "base": manifests.parent(source.base.directory)},
    )
    manifests.write(directory, manifest)
    write_config(directory, config)
