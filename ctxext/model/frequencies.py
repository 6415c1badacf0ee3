"""Computes RoPE's frequencies from the papers' formulas, in plain Python, and checks those of a built model.

transformers makes a model's frequencies from `rope_parameters`. This module has the formulas a second time, so that the
built frequencies can be compared with the intended ones.

Sources: linear (position interpolation) arXiv 2306.15595; YaRN 2309.00071; LongRoPE 2402.13753; dynamic (NTK) scaling
as in transformers; llama3 as released with Llama 3.1.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

from ctxext.errors import CheckFailed, ModelError
from ctxext.model.config_fields import Fields
from ctxext.model.model_config import ModelConfig


def inverse_frequencies(rope: Fields, head_dim: int, max_positions: int, length: int = 0) -> tuple[list[float], float]:
    """Returns (the head_dim / 2 angles per position in radians, the factor on cos and sin), by the papers' formulas.

    `length` is the running length in tokens, which dynamic and longrope depend on; 0 is that of a newly built model.
    Raises ModelError for an unknown rope_type.
    """
    theta, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    steps = [2 * i / head_dim for i in range(head_dim // 2)]
    plain = [theta**-step for step in steps]
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings", max_positions)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    # NTK with the growing factor: theta rises with the running length beyond max_positions.
    if kind == "dynamic":
        ratio = factor * max(length, max_positions) / max_positions - (factor - 1)
        theta *= ratio ** (head_dim / (head_dim - 2))
        return [theta**-step for step in steps], 1.0
    if kind == "llama3":
        return [_llama3_frequency(f, rope, original) for f in plain], 1.0
    # Two sets of factors: the short one up to the original length, the long one beyond it.
    if kind == "longrope":
        factor = factor or max_positions / original
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        stretch = rope["long_factor"] if length > original else rope["short_factor"]
        return [f / s for f, s in zip(plain, stretch, strict=True)], rope.get("attention_factor") or scale
    if kind == "yarn":
        factor = factor or max_positions / original
        return _yarn_frequencies(plain, rope, theta, head_dim, factor, original), (
            rope.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        )
    raise ModelError(
        f"rope_type {kind!r} is not supported; supported are default, linear, dynamic, yarn, longrope, llama3"
    )


def _llama3_frequency(frequency: float, rope: Fields, original: int) -> float:
    # Many turns within the original length keep the frequency, few turns divide it by the factor, with a ramp between.
    turns = original * frequency / (2 * math.pi)  # rotations within the original length
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    ramp = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (ramp + (1 - ramp) / rope["factor"])


def _yarn_frequencies(
    plain: list[float], rope: Fields, theta: float, dim: int, factor: float, original: int
) -> list[float]:
    # Indices below `low` keep their frequency, those above `high` are divided by the factor, with a ramp between.
    def index(rotations: float) -> float:  # the index of the frequency with so many turns within the original length
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(rope.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(index(rope.get("beta_slow") or 1.0)), dim - 1)
    span = high - low or 0.001
    ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)]
    return [f * (1 - r) + f / factor * r for f, r in zip(plain, ramp, strict=True)]


def check_realised(model: Any, config: ModelConfig) -> float:
    """Compares the frequencies of a built model with the intended ones. Returns the largest relative difference.

    Raises CheckFailed if their number differs, or one by more than 1e-5: the config did not act as intended.
    """
    rope = config.rope
    if not rope:
        return 0.0
    intended, scale = inverse_frequencies(rope, config.shape.head_dim, config.max_position_embeddings)
    worst = 0.0
    # A class with RoPE per layer type has one set of buffers per type, told apart by a prefix of the name.
    for prefix, rotary in product(_rope_prefixes(config), rotaries(model.get_decoder())):
        realised = getattr(rotary, f"{prefix}inv_freq").tolist()
        if len(realised) != len(intended):
            raise CheckFailed(f"the built model has {len(realised)} RoPE frequencies, {len(intended)} are expected")
        pairs = [*zip(realised, intended, strict=True), (getattr(rotary, f"{prefix}attention_scaling"), scale)]
        worst = max(worst, *(abs(got - meant) / abs(meant) for got, meant in pairs))
    if worst > 1e-5:
        raise CheckFailed(
            f"the built model's RoPE frequencies differ from the expected ones by {worst:.1e} (relative), for {rope}",
            hint="please report this with your transformers version",
        )
    return worst


def forget_lengths(model: Any, config: ModelConfig) -> None:
    """Makes dynamic frequencies depend on the running length alone. A text that starts at position 0 resets them.

    transformers keeps the frequencies of the longest text so far, until a text is shorter than the original length. The
    output of a model would therefore depend on its earlier inputs. Other scalings do not change.
    """
    if config.rope.get("rope_type") != "dynamic":
        return
    prefixes = _rope_prefixes(config)

    # The hook runs before each rotary forward. A pass that continues a cache starts beyond 0 and resets nothing.
    def begin(rotary: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        positions = named["position_ids"] if "position_ids" in named else given[1]
        if positions.min() > 0:
            return
        for prefix in prefixes:
            setattr(rotary, f"{prefix}inv_freq", getattr(rotary, f"{prefix}original_inv_freq").to(positions.device))
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)

    for rotary in rotaries(model.get_decoder()):
        rotary.register_forward_pre_hook(begin, with_kwargs=True)


def rotaries(decoder: Any) -> list[Any]:
    """Returns the modules that compute the rotations of a decoder's layers.

    Most classes have one. GraniteSWA has one for each theta, so none where no layer uses RoPE.
    """
    return list(decoder.rotary_embs) if hasattr(decoder, "rotary_embs") else [decoder.rotary_emb]


def switch_length(config: Any) -> int | None:
    """Returns the length in tokens beyond which RoPE's frequencies depend on the text length; None where they never do.

    `config` is the transformers config of a built model. Beyond that length the frequencies of dynamic RoPE change with
    every token; those of longrope change once.
    """
    found = [int(config.max_position_embeddings) for rope in _rope_sets(config) if rope["rope_type"] == "dynamic"]
    found += [
        int(rope["original_max_position_embeddings"]) for rope in _rope_sets(config) if rope["rope_type"] == "longrope"
    ]
    return min(found, default=None)


def same_frequencies_from(config: Any, length: int) -> int:
    """Returns the length in tokens of the shortest text with the same RoPE frequencies as a text of `length` tokens.

    This is 1 where the frequencies do not change up to `length`. A cache of n tokens is valid for a text of `length`
    tokens if n is at least this value. `config` is the transformers config of a built model.
    """
    switch = switch_length(config)
    if switch is None or length <= switch:
        return 1
    dynamic = any(rope["rope_type"] == "dynamic" for rope in _rope_sets(config))
    return length if dynamic else switch + 1


def _rope_sets(config: Any) -> list[Fields]:
    """Returns the RoPE parameters of a built model's config: one set, or one for each layer type that has RoPE."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]


def _rope_prefixes(config: ModelConfig) -> list[str]:
    if "rope_type" in config.fields["rope_parameters"]:
        return [""]
    types = config.fields["layer_types"]
    return sorted({f"{name}_" for kind, name in zip(config.kinds, types, strict=True) if kind.use_rope})
