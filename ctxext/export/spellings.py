"""Fields of a config.json that one program reads and another does not, or reads elsewhere: RoPE's above all. No torch.

A (normalised) config says what transformers computes. An exported directory has the config.json as it stands, and
other programs read that: where it says one thing in two places, or has a field that transformers passes over, they may
compute something else. What transformers reads was read in modeling_rope_utils.py of 5.23 and is held to it by a test.
Stored copies of llama.cpp's converter (2026-11) read extrapolation_factor, attn_factor and mrope_section too, those of
vLLM's get_rope also apply_yarn_scaling and rope_dim. A field that is not on transformers' list is taken for such a one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ctxext.model.families import Config

Objection = tuple[str, str]  # what is not honoured; what would help
ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
READ = {  # by transformers, of RoPE's parameters, by rope_type
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


def objections(raw: Config, target: str) -> list[Objection]:
    """What of a config.json, as it stands, `target` reads otherwise than transformers; [] where all read the same."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    sets = [one for name in LAYERS if isinstance(one := rope.get(name), dict)] or [rope]
    found = [one for part in sets for one in _everywhere(raw, part)]
    if target != "hf":
        found += [one for part in sets for one in _elsewhere(raw, part)]
        found += [
            (f"{name} {raw[name]!r} beside RoPE's parameters: transformers does not read it", _without(name))
            for name in ELSEWHERE
            if raw.get(name) is not None
        ]
    if target in ("gguf", "ollama"):
        found += [one for part in sets for one in _betas(part)]
    return found


def _everywhere(raw: Config, rope: dict[str, Any]) -> Iterator[Objection]:
    """What stock transformers itself stumbles over, though ctxext knows what is meant."""
    name = "original_max_position_embeddings"
    if _kind(rope) in ("yarn", "longrope", "llama3") and name in raw and raw[name] is None:
        yield (
            f"{name} is null at the top of config.json: transformers takes that for the length of {_kind(rope)}",
            _without(name),
        )


def _elsewhere(raw: Config, rope: dict[str, Any]) -> Iterator[Objection]:
    kind = _kind(rope)
    for name in sorted(rope.keys() - READ.get(kind, ANY)):
        if rope[name] is not None:
            yield f"{name} among RoPE's parameters: transformers does not read it for {kind}", _without(name)
    if None not in (rope.get("type"), rope.get("rope_type")) and rope["type"] != rope["rope_type"]:
        text = f"rope_type {rope['rope_type']} and type {rope['type']}: transformers reads the first, others the second"
        yield text, _without("type")
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
        text = "yarn without a factor: transformers takes max_position_embeddings over the original length"
        yield text, "write factor into rope_parameters of config.json"


def _betas(rope: dict[str, Any]) -> Iterator[Objection]:
    for name, usual in BETAS.items():
        if _kind(rope) == "yarn" and rope.get(name) not in (None, usual):
            text = f"yarn with {name} {rope[name]}: converters before 2026 write none, and {usual} is taken"
            yield text, f"{name} {usual}, trained again"


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _without(name: str) -> str:
    return f"take {name} out of config.json, if transformers' reading is meant"
