"""Reads RoPE in a config.json as transformers 5 does, and writes it for transformers 4 and 5. No torch.

transformers 5 uses `rope_parameters`; transformers 4 uses `rope_theta` and `rope_scaling`. A file may have both. Then
transformers 5 takes `rope_scaling`, so both must have the same values.
"""

from __future__ import annotations

from ctxext.errors import ModelError
from ctxext.model.config_fields import LAYER_TYPES, Fields, check_rope

ORIGINAL = "original_max_position_embeddings"
THETA = 10_000.0  # transformers' default, except where families.DEFAULTS has another one
NO_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.0}  # every frequency is zero: no rotation
ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # rope_type: its required fields
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
FROM_A_LENGTH = ("yarn", "longrope", "llama3")  # their frequencies depend on the original training length


def read_rope(config: Fields) -> Fields:
    """Returns `rope_parameters` in the form of transformers 5, from either form.

    `config` holds fields that `parse_config` has completed, except for RoPE. This function removes the RoPE fields from
    it. Raises ModelError for values that transformers does not read, and where the two forms disagree.
    """
    nested = config["model_type"] == "mellum"
    if nested and "rope_scaling" in config:
        raise ModelError("config.json: rope_scaling, which a mellum does not have", hint="use rope_parameters alone")
    fifth, fourth = (config.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    theta = config.pop("rope_theta", THETA)
    for rope in (fifth, fourth):
        if not isinstance(rope, dict):
            raise ModelError(f"config.json: RoPE parameters must be an object, not {rope!r}")
    # Mellum has one set of parameters per layer type.
    if nested:
        types = config["layer_types"]
        return {name: _mellum_rope(fifth, name, config) for name in LAYER_TYPES if name in fifth or name in types}
    # Complete both forms before the comparison: a default in one form may be written out in the other.
    read = [_complete({"rope_theta": theta} | rope, config) for rope in (fourth, fifth) if rope]
    if len(read) == 2 and read[0] != read[1]:
        names = sorted(name for name in read[0].keys() | read[1].keys() if read[0].get(name) != read[1].get(name))
        raise ModelError(
            f"config.json: rope_parameters and rope_scaling differ in {', '.join(names)}",
            hint="keep the field that the model was trained with, and remove the other",
        )
    return read[0] if read else _complete({"rope_theta": theta}, config)


def _mellum_rope(rope: Fields, name: str, config: Fields) -> Fields:
    """Returns the RoPE parameters of one layer type of a Mellum config; NO_ROPE with a theta where it has no RoPE."""
    one = rope.get(name)
    if not isinstance(one, dict):
        raise ModelError(f"config.json: rope_parameters must have an object for {name}")
    if {key: value for key, value in one.items() if key != "rope_theta"} != NO_ROPE:
        return _complete(one, {key: value for key, value in config.items() if key != ORIGINAL})
    check_rope(one, config["head_dim"])
    return dict(one)


def _complete(rope: Fields, config: Fields) -> Fields:
    """Returns one set of RoPE parameters with every number stated. Raises ModelError for a missing or invalid one."""
    if by_type := [name for name in LAYER_TYPES if name in rope]:
        raise ModelError(f"config.json: RoPE parameters for {by_type[0]} inside those for all layers")
    rope = dict(rope)
    kind = rope.setdefault("rope_type", rope.get("type", "default"))  # rope_type has priority, as in transformers
    rope.pop("type", None)
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ModelError(f"config.json: rope_type {kind!r}; supported are {', '.join(ROPE_FIELDS)}")
    for field in ("rope_theta", *ROPE_FIELDS[kind]):
        if rope.get(field) is None:
            raise ModelError(f"config.json: {kind} RoPE needs {field}")
    if kind == "yarn" and "factor" not in rope:
        raise ModelError("config.json: yarn RoPE needs factor")
    share = rope.pop("partial_rotary_factor", 1)
    # Only the formula of default RoPE does not read this field, so null has no effect there. Mellum's formula reads it.
    if share is None and (kind != "default" or config["model_type"] == "mellum"):
        raise ModelError(
            "config.json, rope_parameters: partial_rotary_factor is null, from which transformers cannot compute "
            f"{kind} RoPE",
            hint="remove the field",
        )
    if share not in (None, 1):
        raise ModelError(
            "config.json, rope_parameters: partial_rotary_factor is not supported: RoPE must rotate whole heads"
        )
    check_rope(rope, config["head_dim"])
    if kind in FROM_A_LENGTH:
        # A length at the top level of the config has priority over one inside the parameters, also when it is null.
        stated = config if ORIGINAL in config else rope
        rope[ORIGINAL] = stated.get(ORIGINAL, config["max_position_embeddings"])
        if rope[ORIGINAL] is None:
            raise ModelError(
                f"config.json: {ORIGINAL} is null, from which transformers cannot compute {kind} RoPE",
                hint="give the length that the model was first trained at, or remove the field",
            )
    return rope


def written_for_both(config: Fields) -> Fields:
    """Returns the fields of a config with `rope_theta` and `rope_scaling` added, in the form that transformers 4 reads.

    A config with RoPE per layer type (Mellum) stays unchanged: transformers 4 has no form for it.
    """
    rope = config["rope_parameters"]
    if "rope_type" not in rope:
        return config
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    both = config | {"rope_theta": rope["rope_theta"]}
    both["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if rope["rope_type"] == "longrope":  # transformers 4 reads its original length only at the top level
        both[ORIGINAL] = rope[ORIGINAL]
    return both


def unlike_transformers_4(config: Fields) -> str | None:
    """Returns why transformers 4 computes something else than transformers 5 from a config of `written_for_both`.

    None where both compute the same, by the formulas of 4.57.3.
    """
    rope = config["rope_parameters"]
    if config.get("model_type") in ("mellum", "granite_swa"):
        return f"it has no {config['model_type']} class"
    if rope["rope_type"] == "longrope" and rope.get("factor") and not rope.get("attention_factor"):
        # transformers 4 derives the factor of longrope, and with it the scale of cos and sin, from the two lengths.
        ratio = config["max_position_embeddings"] / rope[ORIGINAL]
        if rope["factor"] != ratio:
            return f"it uses {ratio:g} as the factor of longrope, not {rope['factor']:g}"
    return None
