"""Converts a pretrained model into an ordinary Hugging Face hybrid: config edit, weight copy, proof.

`plan_conversion` makes every check that config.json and the safetensors headers allow, before torch is imported.
`run_conversion` writes the output into a staging directory beside its final path and renames that directory at the
end. It writes `config.json` last, after the gate has passed.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import EnvironmentFault, InputError, ModelError
from ctxext.model import source as sources
from ctxext.model.card import model_card, runtime_note
from ctxext.model.companions import companions, copy_companions, require_tokenizer, stated_licence
from ctxext.model.families import SOURCES
from ctxext.model.gguf import stored_as
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import HybridSpec, LayerKind, find_hybrid, layer_kinds, layout_facts, pattern_text
from ctxext.model.model_config import ModelConfig, initial_value, new_tensors
from ctxext.model.rope_fields import written_for_both
from ctxext.model.source import ModelSource
from ctxext.model.weights import weight_files
from ctxext.ops.cost import kv_cache_bytes, parameter_count
from ctxext.progress import CountProgress, ignore
from ctxext.units import format_bytes, format_count, format_tokens

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion as planned from files alone.

    kinds         the layer layout of the output
    config        the output's config.json
    dtype         the dtype to cast the weights to; None keeps the stored dtype
    allow_pickle  whether pickled weights (pytorch_model.bin) may be read
    target        the requested model_type of the output; None is the family's first
    sinks         whether fitting of learned sinks was requested
    """

    source: ModelSource
    hybrid: HybridSpec
    hybrid_name: str
    kinds: tuple[LayerKind, ...]
    config: ModelConfig
    out: Path
    dtype: str | None
    allow_pickle: bool
    target: str | None = None
    sinks: bool = False

    @property
    def value_bytes(self) -> int:
        """Returns the bytes of one value in the output's dtype. Without a stated dtype it counts as a 16-bit one."""
        return {"float32": 4, "float64": 8}.get(str(self.config.dtype), 2)


@dataclass(frozen=True)
class FittedSinks:
    """Learned sinks that replace the first token where a window hides it (retrofit/fitted_sinks.py).

    values  the tensors to write, by name, each one complete
    facts   entries for the manifest and the report: which layers, and what changed
    rows    the same facts as (name, value) lines for the screen
    """

    values: Mapping[str, Any]
    facts: Mapping[str, Any]
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion. Sizes are in bytes, lengths in tokens.

    gate              the numbers of the gate; None when the gate was switched off
    warning           reports a layout that is allowed but has no effect, and a file that was left out
    sinks, sink_rows  the facts and rows of FittedSinks
    planner           the planner's choice of full layers (LayerPlan), where it measured one
    """

    source: str
    out: str
    family: str
    architecture: str
    layout: str
    parameters: int
    kv_cache_length: int
    kv_cache_bytes: int
    kv_cache_bytes_source: int
    gate: dict[str, Any] | None
    seconds: float
    warning: str | None = None
    sinks: Mapping[str, Any] | None = None
    sink_rows: Sequence[tuple[str, str]] = ()
    planner: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the report for JSON, without the rows for the screen and without the planner's measurements."""
        shown = asdict(replace(self, planner=None))
        return {name: value for name, value in shown.items() if name not in ("sink_rows", "planner")}

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report as (name, value) lines for a screen or a model card."""
        rows = [
            ("source", self.source),
            ("architecture", f"{self.family} -> {self.architecture}"),
            ("layout", self.layout),
            *([] if self.warning is None else [("warning", self.warning)]),
            ("parameters", format_count(self.parameters)),
            *self.sink_rows,
            (
                f"KV cache at {format_tokens(self.kv_cache_length)} tokens",
                f"{format_bytes(self.kv_cache_bytes_source)} -> {format_bytes(self.kv_cache_bytes)}",
            ),
        ]
        if self.gate is None:
            return [*rows, ("gate", "not run (--no-gate)")]
        covered = f"{self.gate['layers']} of {self.gate['num_layers']} layers, {self.gate['tokens']} tokens, fp32"
        if (stand_in := self.gate["window_stand_in"]) is not None:
            covered += f"; larger windows compared at {stand_in:,} keys"
        return [
            *rows,
            ("gate: source layout = source", f"max logit difference {self.gate['identity_max_diff']:g} ({covered})"),
            (
                "gate: layout = hand-written walk",
                f"max difference {self.gate['hybrid_max_diff']:.2g} (allowed {self.gate['hybrid_tolerance']:.2g})",
            ),
        ]


def plan_conversion(
    model: str,
    hybrid: str,
    *,
    out: Path | None = None,
    full_layers: str | None = None,
    sliding_window: int | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    model_class: str = "auto",
    sinks: str = "none",
) -> ConversionPlan:
    """Plans and checks a conversion without torch.

    `model_class` is the model_type of the output; auto is the family's first. `sinks` auto requests fitted sinks, which
    are made only where the class has sinks and the model depends on its first token (retrofit/fitted_sinks.py). Raises
    InputError or ModelError for a conversion that is not possible.
    """
    # Check the arguments first: `resolve` may download a model from the hub.
    if sinks not in ("auto", "none"):
        raise InputError(f"--sinks {sinks}: allowed are auto, none")
    target = None if model_class == "auto" else model_class
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    layout = find_hybrid(hybrid, sliding_window)
    source = sources.resolve(model, allow_pickle=allow_pickle)
    # Only an explicit output path is checked here, and it must not replace the source. `staged_output` checks again.
    if out is not None:
        check_free(out, force, keep=[source.path])
    if source.base is not None:
        raise InputError(f"{model} is an adapter on {source.base.name}", hint="merge it first: ctxext merge")
    if source.config.family.name not in SOURCES:
        raise ModelError(
            f"{model}: model_type {source.config.family.name!r} cannot be converted; supported are {', '.join(SOURCES)}"
        )
    require_tokenizer(source.directory)
    # `hybrid_config` raises where the target class cannot express the layout.
    kinds = layer_kinds(layout, source.config.shape.num_layers, full_layers)
    config = hybrid_config(source.config, kinds, target)
    if dtype is not None:
        config = config.with_fields(dtype=dtype)
    out = out or manifests.default_out("convert", f"{source.name}-{hybrid}")
    return ConversionPlan(source, layout, hybrid, kinds, config, out, dtype, allow_pickle, target, sinks == "auto")


def may_fit_sinks(plan: ConversionPlan) -> bool:
    """Returns whether sinks are requested, the output's class has them, and a layer has a window."""
    slides = any(kind.sliding_window is not None for kind in plan.kinds)
    return plan.sinks and slides and plan.config.family.sinks


def with_kinds(plan: ConversionPlan, kinds: Sequence[LayerKind]) -> ConversionPlan:
    """Returns the same conversion with another layout. Raises ModelError when the target class cannot express it."""
    config = hybrid_config(plan.source.config, kinds, plan.target)
    config = config if plan.dtype is None else config.with_fields(dtype=plan.dtype)
    return replace(plan, kinds=tuple(kinds), config=config)


def run_conversion(
    plan: ConversionPlan,
    *,
    gate: bool = True,
    force: bool = False,
    attachments: Mapping[str, bytes] | None = None,
    facts: Mapping[str, Any] | None = None,
    sinks: FittedSinks | None = None,
    progress: CountProgress = ignore,
) -> ConversionReport:
    """Copies the weights, runs the gate and moves the result to its final path.

    With `sinks` the gate first proves the copy; the sinks are then written, and the gate proves the layout with them.
    `attachments` are further files of the output, by name. `facts` are further entries of its manifest, such as how the
    layout was chosen. Raises CheckFailed when the proof fails.
    """
    import torch

    from ctxext.model.load import check_source
    from ctxext.model.shards import copy_weights
    from ctxext.model.stock import drop_generation_config

    began = time.monotonic()
    source, directory = plan.source, plan.source.directory
    dtype = getattr(torch, plan.dtype) if plan.dtype else None
    # Both checks raise before anything is written: a config.json that transformers reads differently, and a tokenizer
    # that would give other ids in the output's class.
    check_source(source)
    tokenizer = _tokenizer_files(plan)
    # Fitted sinks also need biases on all attention projections (retrofit/fitted_sinks.py), so the config gets them.
    plan = plan if sinks is None else _with_biases(plan)
    added = new_tensors(source.config, plan.config)
    with staged_output(plan.out, force) as staging:
        _check_room(staging, plan)
        # Tensors that only the target class has get values that change no output: zero biases, sinks without weight.
        copy_weights(
            directory,
            staging,
            expected=source.config.tensors,
            dtype=dtype,
            added={name: torch.full(shape, initial_value(name)) for name, shape in added.items()},
            allow_pickle=plan.allow_pickle,
            progress=progress,
        )
        copy_companions(directory, staging, tokenizer)
        dropped = drop_generation_config(staging)
        # The gate reads the staged weights, and raises before config.json makes the directory a model.
        numbers = _prove(staging, plan, sinks, gate, dtype)
        report = _report(plan, numbers, time.monotonic() - began, dropped)
        if sinks is not None:
            report = replace(report, sinks=sinks.facts, sink_rows=sinks.rows)
        for name, data in (attachments or {}).items():
            (staging / name).write_bytes(data)
        _write_descriptions(staging, plan, report, facts or {})
    return report


def _with_biases(plan: ConversionPlan) -> ConversionPlan:
    # q, k, v and o all get a bias, also where the source has none.
    config = hybrid_config(plan.source.config, plan.kinds, plan.target, biases=True)
    return replace(plan, config=config if plan.dtype is None else config.with_fields(dtype=plan.dtype))


def _prove(
    staging: Path, plan: ConversionPlan, sinks: FittedSinks | None, gate: bool, dtype: Any
) -> dict[str, Any] | None:
    """Returns the gate's numbers, or None without a gate. Writes the sinks after the first comparison has run."""
    from ctxext.model.gate import run_gate
    from ctxext.model.shards import replace_tensors

    def write_sinks() -> None:
        if sinks is not None:
            replace_tensors(staging, sinks.values)

    if not gate:
        write_sinks()
        return None
    source = plan.source
    return run_gate(
        source.directory,
        source.config,
        staging,
        plan.kinds,
        source.kinds,
        dtype=dtype,
        target=plan.target,
        biases=sinks is not None,
        between=write_sinks,
    ).as_dict()


def write_config(directory: Path, config: ModelConfig) -> None:
    """Writes config.json. Call it last: without this file a directory is not a model.

    The file has the RoPE fields of transformers 4 and of transformers 5, and the transformers version in use.
    """
    written = written_for_both(config.fields) | {"transformers_version": importlib.metadata.version("transformers")}
    (directory / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")


def _tokenizer_files(plan: ConversionPlan) -> dict[str, bytes]:
    """Returns the files that replace the source's tokenizer files, so that the output's class gives the same ids."""
    from ctxext.model.tokenizer import settle, version

    settled = settle(plan.source.directory, plan.config.fields)
    if settled.problem is not None:
        raise ModelError(
            f"{plan.source.name}: as a {plan.config.family.name}, AutoTokenizer of {version()} would read other ids "
            f"than the source's tokenizer: {settled.problem}",
            hint="give the model a tokenizer.json: save_pretrained of a fast tokenizer writes one",
        )
    return settled.files


def _check_room(staging: Path, plan: ConversionPlan) -> None:
    """Compares the size of the output with the free space on its disk. Raises EnvironmentFault.

    The size counts the copied weight files (or their parameters in the new dtype, plus 8 KiB for a header), the tensors
    that only the target class has, and the companion files such as the tokenizer.
    """
    directory, item = plan.source.directory, plan.value_bytes
    stored = sum(path.stat().st_size for path in weight_files(directory, plan.allow_pickle) if path.is_file())
    kept = stored if plan.dtype is None else item * parameter_count(plan.source.shape) + 8192
    added = item * sum(map(math.prod, new_tensors(plan.source.config, plan.config).values()))
    needed = kept + added + sum((directory / name).stat().st_size for name in companions(directory))
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise EnvironmentFault(
            f"{plan.out}: {format_bytes(needed)} are needed, but {format_bytes(free)} are free",
            hint="give --out on a larger disk",
        )


def _report(plan: ConversionPlan, gate: dict[str, Any] | None, seconds: float, dropped: str | None) -> ConversionReport:
    # `dropped` is the reason why generation_config.json was left out, or None.
    shape, length = plan.source.shape, plan.source.usable_length
    # The KV cache at the usable length, with the new layout and with the source's own.
    cache, before = (
        kv_cache_bytes(shape, [kind.sliding_window for kind in kinds], length, plan.value_bytes)
        for kinds in (plan.kinds, plan.source.kinds)
    )
    return ConversionReport(
        source=plan.source.name,
        out=str(plan.out),
        family=plan.source.config.family.name,
        architecture=plan.config.fields["architectures"][0],
        layout=pattern_text(plan.kinds),
        parameters=parameter_count(shape),
        kv_cache_length=length,
        kv_cache_bytes=cache,
        kv_cache_bytes_source=before,
        gate=gate,
        seconds=round(seconds, 2),
        warning="; ".join(filter(None, [_warning(plan.kinds, length), dropped])) or None,
    )


def _warning(kinds: Sequence[LayerKind], length: int) -> str | None:
    """Returns a warning where the windows are too large to hide any key. `length`: tokens that the model supports."""
    windows = [kind.sliding_window for kind in kinds if kind.sliding_window is not None]
    if not windows or min(windows) < length:
        return None
    return (
        f"windows of {format_tokens(min(windows))} keys cover all {format_tokens(length)} tokens of the model: "
        "they hide nothing there, and the conversion changes nothing in the sliding layers"
    )


def _write_descriptions(staging: Path, plan: ConversionPlan, report: ConversionReport, more: Mapping[str, Any]) -> None:
    # Writes the model card, the manifest and, last, config.json. `more` are further facts of the manifest.
    source = plan.source
    weights = (
        "its weights are unchanged" if report.sinks is None else "its weights are unchanged but for sinks and biases"
    )
    text = [
        f"{source.name} with another layer layout: {weights} (S: RoPE and a sliding window, "
        "N: full attention without positional encoding, F: RoPE and full attention). Layers that lost their window or "
        "their RoPE compute something the weights were not trained for, so expect damage until it is finetuned.",
        runtime_note(plan.config.fields),
    ]
    quantised = [("weights of a GGUF file", stored)] if (stored := stored_as(source.manifest)) is not None else []
    rows = [*report.rows(), *quantised]
    card = model_card(f"{source.name} {plan.hybrid_name}", text, rows, stated_licence(source.directory))
    (staging / "README.md").write_text(card, "utf-8")
    # `spec` records the request, `facts` the results. Later commands read the source's layout and RoPE from the facts
    # (`source.original_config`).
    spec = {
        "model": source.name,
        "hybrid": plan.hybrid_name,
        "layer_pattern": plan.hybrid.layer_pattern,
        "sliding_window": plan.hybrid.sliding_window,
        "layout": pattern_text(plan.kinds),
        "dtype": plan.dtype,
        "class": plan.config.family.name,
    }
    facts = {
        "name": f"{source.name}-{Path(plan.hybrid_name).stem}",
        "original_length": source.original_length,
        "usable_length": source.usable_length,
        "source_layout": layout_facts(source.kinds),
        "source_rope_parameters": source.config.rope,
        "gate": report.gate,
        **({} if report.sinks is None else {"sinks": report.sinks}),
        **more,
    }
    manifests.write(
        staging,
        manifests.new("conversion", spec=spec, parents={"source": manifests.parent(source.directory)}, facts=facts),
    )
    write_config(staging, plan.config)
