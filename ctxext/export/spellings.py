"""Fields of a config.json that programs read differently, mainly those of RoPE. No torch.

A `ModelConfig` describes what transformers computes. An exported directory has the unchanged config.json, and
other programs read that file. Where it states one value in two places, or has a field that transformers ignores, these
programs may compute something else. The list of fields that transformers reads comes from modeling_rope_utils.py of
5.23; a test compares it. Stored copies of llama.cpp's converter (2026-11) also read extrapolation_factor, attn_factor
and mrope_section. Those of vLLM's get_rope also read apply_yarn_scaling and rope_dim. This module reports every field
that is not on transformers' list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ctxext.model.config_fields import Fields

Objection = tuple[str, str]  # what is not honoured; how to fix it
ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
READ = {  # the RoPE parameters that transformers reads, by rope_type
    "default": ANY,
    "proportional": ANY,
    "linear": ANY | {"factor"},
    "dynamic": ANY | {"factor"},
    "yarn": ANY | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
                   "mscale", "mscale_all_dim", "truncate"},
    "longrope": ANY | {"factor", "original_max_position_embeddings", "attention_factor", "short_factor",
                       "long_factor"},
    "llama3": ANY | {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip
ELSEWHERE = ("rope_theta_base", "rotary_emb_base", "global_rope_theta", "rope_ratio", "rotary_pct", "rotary_dim")
BETAS = {"beta_fast": 32, "beta_slow": 1}
LAYERS = ("full_attention", "sliding_attention")


def objections(raw: Fields, target: str) -> list[Objection]:
    """Returns what `target` reads differently from transformers in an unchanged config.json; [] for no difference."""
    # RoPE parameters are one set, or one set for each type of layer.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    sets = [one for name in LAYERS if isinstance(one := rope.get(name), dict)] or [rope]
    found = [one for part in sets for one in _everywhere(raw, part)]
    if target != "hf":
        found += [one for part in sets for one in _elsewhere(raw, part)]
        found += [
            (f"{name} {raw[name]!r} beside RoPE's parameters: transformers ignores it", _without(name))
            for name in ELSEWHERE
            if raw.get(name) is not None
        ]
    if target in ("gguf", "ollama"):
        found += [one for part in sets for one in _betas(part)]
    return found


def _everywhere(raw: Fields, rope: dict[str, Any]) -> Iterator[Objection]:
    """Yields fields that stock transformers itself misreads, although ctxext reads them as intended."""
    name = "original_max_position_embeddings"
    if _kind(rope) in ("yarn", "longrope", "llama3") and name in raw and raw[name] is None:
        yield (
            f"{name} is null at the top of config.json: transformers uses it as the length of {_kind(rope)}",
            _without(name),
        )


def _elsewhere(raw: Fields, rope: dict[str, Any]) -> Iterator[Objection]:
    kind = _kind(rope)
    for name in sorted(rope.keys() - READ.get(kind, ANY)):
        if rope[name] is not None:
            yield f"{name} among RoPE's parameters: transformers ignores it for {kind}", _without(name)
    if None not in (rope.get("type"), rope.get("rope_type")) and rope["type"] != rope["rope_type"]:
        text = f"rope_type {rope['rope_type']} and type {rope['type']}: transformers reads rope_type, others type"
        yield text, _without("type")
    # The same value in two places: programs differ in the place that they read.
    for name in ("rope_theta", "original_max_position_embeddings"):
        if name == "original_max_position_embeddings" and kind not in ("yarn", "longrope", "llama3"):
            continue
        inside, beside = rope.get(name), raw.get(name)
        if None not in (inside, beside) and inside != beside:
            first = "inside" if name == "rope_theta" else "at the top"
            text = (
                f"{name} {inside} inside RoPE's parameters and {beside} at the top: transformers reads the one {first}"
            )
            yield text, f"write the same {name} in both places of config.json"
    if kind == "yarn" and rope.get("factor") is None:
        text = "yarn without a factor: transformers uses max_position_embeddings / original length"
        yield text, "write factor into rope_parameters of config.json"


def _betas(rope: dict[str, Any]) -> Iterator[Objection]:
    for name, usual in BETAS.items():
        if _kind(rope) == "yarn" and rope.get(name) not in (None, usual):
            text = f"yarn with {name} {rope[name]}: converters before 2026 do not write it, and {usual} is used"
            yield text, f"{name} {usual}, trained again"


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _without(name: str) -> str:
    return f"remove {name} from config.json, if transformers' reading is the right one"
