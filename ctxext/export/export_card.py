"""The model card of an exported directory: its layers and how the model was made. It has no path and no user's name.

The steps that made the model are read from the manifests of the model and its parents, as far back as they still exist.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext import __version__
from ctxext.config import presets
from ctxext.config.manifest import Manifest
from ctxext.errors import CtxextError
from ctxext.export.matrix import Verdict
from ctxext.model.card import front_matter, runtime_note
from ctxext.model.companions import stated_licence
from ctxext.model.gguf import stored_as
from ctxext.model.layout import LayerKind
from ctxext.model.model_config import ModelConfig
from ctxext.model.source import ModelSource, manifest_of
from ctxext.units import format_tokens

HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
PARENTS = ("finetune", "base", "source", "model")  # roles of a parent model in a manifest


@dataclass(frozen=True)
class Step:
    """One output of the chain: its directory (None where it no longer exists), its name, and its manifest."""

    path: Path | None
    name: str
    manifest: Manifest | None


def history(path: Path) -> list[Step]:
    """Returns the chain of models, the oldest first and the one in `path` last."""
    steps: list[Step] = []
    path = path.absolute()
    while len(steps) < 100:  # a chain may contain a cycle
        # A parent path may be only a name, or a directory that no longer exists: the chain starts there.
        there = path.is_absolute() and path.is_dir()
        found = manifest_of(path) if there else None
        name = (found.facts.get("name") if found else None) or hub_id(path) or path.name
        steps.append(Step(path if there else None, str(name), found))
        parent = next((found.parents[role] for role in PARENTS if role in found.parents), None) if found else None
        if parent is None:
            break
        path = Path(parent["path"])
    return steps[::-1]


def first_model(path: Path) -> str:
    """Returns the command-line argument for the oldest model of the chain: its hub id, else its path, else its name."""
    first = history(path)[0]
    return shlex.quote(first.name if first.path is None else hub_id(first.path) or str(first.path))


def hub_id(path: Path) -> str | None:
    """Returns the hub id of a model in the hub's cache; None for other paths."""
    found = HUB_CACHE.search(f"{path.absolute()}/")
    return f"{found[1]}/{found[2]}" if found else None


def write_card(
    source: ModelSource, verdict: Verdict, commands: Sequence[str], *, tokenizer_problem: str | None = None
) -> str:
    """Returns the card of a model that is not a bundle; `commands` run it with the verdict's target.

    `tokenizer_problem` describes how AutoTokenizer and tokenizer.json give different ids (model/tokenizer.py), None
    where they agree.
    """
    steps = history(source.directory)
    base, licence = _base_id(steps[0]), _licence(steps)
    # The hub reads this front matter. A model that is itself the base has no base_model.
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= licence
    front |= {"base_model": base} if base and len(steps) > 1 else {}
    front["tags"] = ["ctxext", "long-context"]
    first = (
        "an unstated length" if source.original_length is None else f"{format_tokens(source.original_length)} tokens"
    )
    parts = [
        front_matter(front),
        f"# {steps[-1].name}",
        f"Up to {format_tokens(source.usable_length)} tokens; first trained at {first}.",
        "## Layers",
        _layers(source),
        "## How it was made",
        "\n".join(f"{number}. {_step_text(step)}" for number, step in enumerate(steps, start=1)),
        *_measured(steps),
        "## Use",
        _use(source.config, commands, tokenizer_problem),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(source, verdict, base, bool(licence))),
        f"Written by ctxext {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _base_id(root: Step) -> str | None:
    if root.path is not None and hub_id(root.path):
        return hub_id(root.path)
    try:
        return presets.model_preset(presets.find("models", root.name)).hub_id
    except CtxextError:
        return None


def _licence(steps: Sequence[Step]) -> dict[str, str]:
    """Returns the licence fields of the oldest card of the chain that names a licence."""
    found = (stated_licence(step.path) for step in steps if step.path is not None)
    return next((stated for stated in found if "license" in stated), {})


def _layers(source: ModelSource) -> str:
    # One row of the table for each kind of layer.
    of: dict[LayerKind, list[str]] = {}
    for number, kind in enumerate(source.kinds):
        of.setdefault(kind, []).append(str(number))
    lines = ["| layers, from 0 | attention | positions |", "|---|---|---|"]
    for kind, layers in of.items():
        seen = "full" if kind.sliding_window is None else f"the last {format_tokens(kind.sliding_window)} tokens"
        lines.append(f"| {', '.join(layers)} | {seen} | {'RoPE' if kind.use_rope else 'none (NoPE)'} |")
    rope = {name: value for name, value in source.config.rope.items() if not isinstance(value, list)}
    stated = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in rope.items()
    )
    return "\n".join(lines) + (f"\n\nRoPE: {stated}." if rope else "")


def _step_text(step: Step) -> str:
    # One line of "How it was made". A model without a manifest is not an output of ctxext.
    found = step.manifest
    if (stored := stored_as(found)) is not None:
        return f"**{step.name}**, the weights of a quantised GGUF file ({stored})"
    if found is None:
        return f"**{step.name}**, as its authors released it" if step.path else f"**{step.name}**"
    spec, facts, by = found.spec, found.facts, f"(ctxext {found.versions.get('ctxext')}, {found.created[:10]})"
    if found.kind == "conversion":
        origin = (
            f"converted to {spec.get('layout')} (`--hybrid {Path(str(spec.get('hybrid'))).stem}`), weights unchanged"
        )
    elif found.kind == "merge":
        origin = f"adapter, embeddings and norms merged in fp32, stored in {spec.get('dtype')}"
    elif found.parents and "ctx" in spec:
        what = "all weights" if found.kind == "model" else "LoRA with embeddings and norms"
        origin = f"trained ({what}) at {format_tokens(spec['ctx'])} tokens"
        origin += f", {facts['tokens']:,} of them in {facts.get('steps')} steps; {facts.get('positions')}"
        origin += "; distilled from a teacher" if facts.get("teacher") else ""
    else:
        origin = "pretrained" if found.kind == "model" else found.kind
    return f"**{step.name}**: {origin} {by}"


def _measured(steps: Sequence[Step]) -> list[str]:
    rows = []
    for step in steps:
        facts = step.manifest.facts if step.manifest else {}
        gate, merge = facts.get("gate") or {}, facts.get("merge") or {}
        unit = "of the distillation objective" if facts.get("teacher") else "nats a token"
        of = f" ({merge['perplexity_of']})" if "perplexity_of" in merge else ""  # older manifests lack it
        # Each manifest has only the values that its command measures; the others are None and give no row.
        found = {
            "source layout against the source, max logit difference": gate.get("identity_max_diff"),
            "this layout against a hand-written walk, max difference": gate.get("hybrid_max_diff"),
            f"first training loss, {unit}": facts.get("first_loss"),
            f"final training loss, {unit}": facts.get("final_loss"),
            "merged against live, max logit difference": merge.get("merged_max_diff"),
            f"perplexity before the merge, fp32{of}": merge.get("perplexity_live"),
            f"perplexity as stored, {merge.get('dtype')}{of}": merge.get("perplexity_saved"),
        }
        rows += [f"| {step.name} | {name} | {value:.4g} |" for name, value in found.items() if value is not None]
    return ["## Measured", "\n".join(["| model | what | value |", "|---|---|---|", *rows])] if rows else []


def _use(config: ModelConfig, commands: Sequence[str], tokenizer_problem: str | None) -> str:
    tokenizer = "AutoTokenizer" if tokenizer_problem is None else "PreTrainedTokenizerFast"
    code = (
        f"from transformers import AutoModelForCausalLM, {tokenizer}\n\n"
        'where = "."  # this directory, or the name it has on the hub\n'
        f"tokenizer = {tokenizer}.from_pretrained(where)\n"
        "model = AutoModelForCausalLM.from_pretrained(where)"
    )
    needs = runtime_note(config.fields)
    if tokenizer_problem is not None:
        needs += f" Do not use AutoTokenizer: it gives other ids than tokenizer.json ({tokenizer_problem})."
    more = "\n".join(commands)
    return f"{needs}\n\n```python\n{code}\n```" + (f"\n\nNot run by ctxext:\n\n```\n{more}\n```" if commands else "")


def _limits(source: ModelSource, verdict: Verdict, base: str | None, licensed: bool) -> list[str]:
    lines = [f"The model was not trained beyond {format_tokens(source.usable_length)} tokens."]
    if source.kind == "conversion":
        lines.append(
            "Some layers lost their window or RoPE and were not trained since: expect damage until it is healed."
        )
    if verdict.target != "hf":
        lines.append(f"{verdict.target}: {verdict.how}; {verdict.not_checked} ({verdict.checked}).")
    else:
        lines.append(
            "`ctxext export --check-only --target ...` shows which other programs support the windows and NoPE layers."
        )
    if not licensed:
        lines.append("The licence of the base is not known here: find it, and add `license:` above before publishing.")
    if base is None:
        lines.append("The base has no name on the hub that is known here; add `base_model:` above if it has one.")
    return lines
