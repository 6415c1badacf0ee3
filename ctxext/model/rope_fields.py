"""RoPE in a config.json: read as transformers 5 reads it, written for transformers 4 and 5. Plain dicts; no torch.

transformers 5 has `rope_parameters`; transformers 4 has `rope_theta` and `rope_scaling`. A file may have both. Then
transformers 5 takes `rope_scaling`, so that both have to say the same.
"""

from __future__ import annotations

from typing import Any

from ctxext.errors import ModelError
from ctxext.model.config_fields import LAYER_TYPES, check_rope

Config = dict[str, Any]
ORIGINAL = "original_max_position_embeddings"
THETA = 10_000.0  # transformers' default, but for the model_types in families.DEFAULTS
NO_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.0}  # every frequency is zero: no rotation
ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # rope_type: the numbers it cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
FROM_A_LENGTH = ("yarn", "longrope", "llama3")  # their frequencies follow from the length of the first training


def read_rope(config: Config) -> Config:
    """`rope_parameters` in the spelling of transformers 5, whichever spelling the config has.

    `config` is a normalised config but for RoPE; the fields of RoPE are taken out of it. Raises ModelError for what
    transformers does not read, and where two spellings say different things.
    """
    nested = config["model_type"] == "mellum"
    if nested and "rope_scaling" in config:
        raise ModelError("config.json: rope_scaling, which a mellum does not have", hint="use rope_parameters alone")
    fifth, fourth = (config.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    theta = config.pop("rope_theta", THETA)
    for rope in (fifth, fourth):
        if not isinstance(rope, dict):
            raise ModelError(f"config.json: RoPE parameters must be an object, not {rope!r}")
    if nested:
        types = config["layer_types"]
        return {name: _mellum_rope(fifth, name, config) for name in LAYER_TYPES if name in fifth or name in types}
    read = [_complete({"rope_theta": theta} | rope, config) for rope in (fourth, fifth) if rope]
    if len(read) == 2 and read[0] != read[1]:
        names = sorted(name for name in read[0].keys() | read[1].keys() if read[0].get(name) != read[1].get(name))
        raise ModelError(
            f"config.json: rope_parameters and rope_scaling differ in {', '.join(names)}",
            hint="keep the one that the model was trained with, and remove the other",
        )
    return read[0] if read else _complete({"rope_theta": theta}, config)


def _mellum_rope(rope: Config, name: str, config: Config) -> Config:
    """What a Mellum config says of one type of layer: RoPE's parameters, or that there is none."""
    one = rope.get(name)
    if not isinstance(one, dict):
        raise ModelError(f"config.json: rope_parameters must have an object for {name}")
    if {key: value for key, value in one.items() if key != "rope_theta"} != NO_ROPE:
        return _complete(one, {key: value for key, value in config.items() if key != ORIGINAL})
    check_rope(one, config["head_dim"])
    return dict(one)


def _complete(rope: Config, config: Config) -> Config:
    """One set of RoPE parameters with every number stated. Raises ModelError for what transformers cannot compute."""
    if by_type := [name for name in LAYER_TYPES if name in rope]:
        raise ModelError(f"config.json: RoPE parameters for {by_type[0]} inside those for all layers")
    rope = dict(rope)
    kind = rope.setdefault("rope_type", rope.get("type", "default"))  # where both stand, transformers' choice
    rope.pop("type", None)
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ModelError(f"config.json: rope_type {kind!r}; supported are {', '.join(ROPE_FIELDS)}")
    for field in ("rope_theta", *ROPE_FIELDS[kind]):
        if rope.get(field) is None:
            raise ModelError(f"config.json: {kind} RoPE needs {field}")
    if kind == "yarn" and "factor" not in rope:
        raise ModelError("config.json: yarn RoPE needs factor")
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ModelError(
            "config.json, rope_parameters: partial_rotary_factor is not supported: whole heads are rotated"
        )
    check_rope(rope, config["head_dim"])
    if kind in FROM_A_LENGTH:
        # what stands beside the parameters comes before what stands inside, null included
        stated = config if ORIGINAL in config else rope
        rope[ORIGINAL] = stated.get(ORIGINAL, config["max_position_embeddings"])
        if rope[ORIGINAL] is None:
            raise ModelError(
                f"config.json: {ORIGINAL} is null, from which transformers cannot compute {kind} RoPE",
                hint="give the length that the model was first trained at, or remove the field",
            )
    return rope


def written_for_both(config: Config) -> Config:
    """A normalised config with `rope_theta` and `rope_scaling` beside `rope_parameters`, as transformers 4 reads them.

    Unchanged where layers of one model have different RoPE: transformers 4 has no spelling for that.
    """
    rope = config["rope_parameters"]
    if "rope_type" not in rope:
        return config
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    both = config | {"rope_theta": rope["rope_theta"]}
    both["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if rope["rope_type"] == "longrope":  # whose length transformers 4 reads beside the parameters only
        both[ORIGINAL] = rope[ORIGINAL]
    return both


def unlike_transformers_4(config: Config) -> str | None:
    """Why transformers 4 does not compute what transformers 5 does from a config of `written_for_both`; None where it
    does, as far as its formulas go (4.57.3's were read)."""
    rope = config["rope_parameters"]
    if config.get("model_type") in ("mellum", "granite_swa"):
        return f"it has no {config['model_type']} class"
    if rope["rope_type"] == "longrope" and rope.get("factor") and not rope.get("attention_factor"):
        ratio = config["max_position_embeddings"] / rope[ORIGINAL]
        if rope["factor"] != ratio:
            return f"it takes {ratio:g} for the factor of longrope, not {rope['factor']:g}"
    return None
