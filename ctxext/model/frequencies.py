"""What RoPE's frequencies come out as: the papers' formulas once more, in plain Python, and what was built beside them.

transformers makes a model's frequencies from `rope_parameters`; here they are stated again, so that what was built can
be compared with what was meant. Sources: linear (position interpolation) arXiv 2306.15595; YaRN 2309.00071; LongRoPE
2402.13753; dynamic (NTK) scaling as in transformers; llama3 as released with Llama 3.1.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

from ctxext.errors import CheckFailed, ModelError
from ctxext.model.families import Config, family_of, rope_of


def inverse_frequencies(rope: Config, head_dim: int, max_positions: int, length: int = 0) -> tuple[list[float], float]:
    """(the head_dim / 2 angles per token of position, the factor on cos and sin), by the papers' formulas.

    `length` is the running length in tokens, which dynamic and longrope depend on; 0 is a freshly built model.
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
    if kind == "dynamic":
        ratio = factor * max(length, max_positions) / max_positions - (factor - 1)
        theta *= ratio ** (head_dim / (head_dim - 2))
        return [theta**-step for step in steps], 1.0
    if kind == "llama3":
        return [_llama3_frequency(f, rope, original) for f in plain], 1.0
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


def _llama3_frequency(frequency: float, rope: Config, original: int) -> float:
    turns = original * frequency / (2 * math.pi)  # rotations within the original length
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    ramp = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (ramp + (1 - ramp) / rope["factor"])


def _yarn_frequencies(
    plain: list[float], rope: Config, theta: float, dim: int, factor: float, original: int
) -> list[float]:
    def index(rotations: float) -> float:  # the frequency index that turns so often within the original length
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(rope.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(index(rope.get("beta_slow") or 1.0)), dim - 1)
    span = high - low or 0.001
    ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)]
    return [f * (1 - r) + f / factor * r for f, r in zip(plain, ramp, strict=True)]


def check_realised(model: Any, config: Config) -> float:
    """Compare the frequencies a built model holds with the intended ones; returns the largest relative difference.

    Raises CheckFailed when they differ by more than 1e-5: then a config edit did nothing, or did something else.
    """
    rope = rope_of(config)
    if not rope:
        return 0.0
    intended, scale = inverse_frequencies(rope, config["head_dim"], config["max_position_embeddings"])
    worst = 0.0
    for prefix, rotary in product(_rope_prefixes(config), rotaries(model.get_decoder())):
        realised = getattr(rotary, f"{prefix}inv_freq").tolist()
        if len(realised) != len(intended):
            raise CheckFailed(f"the built model has {len(realised)} RoPE frequencies, {len(intended)} were meant")
        pairs = [*zip(realised, intended, strict=True), (getattr(rotary, f"{prefix}attention_scaling"), scale)]
        worst = max(worst, *(abs(got - meant) / abs(meant) for got, meant in pairs))
    if worst > 1e-5:
        raise CheckFailed(
            f"the built model's RoPE frequencies differ from the intended by {worst:.1e} (relative), for {rope}",
            hint="please report this with your transformers version",
        )
    return worst


def forget_lengths(model: Any, config: Config) -> None:
    """Let dynamic frequencies follow from the running length alone: a text that begins at position 0 begins anew.

    transformers keeps those of the longest text a model has seen until one is shorter than the original length, so that
    what a model computes would hang on what it was given before. Other scalings are left as they are.
    """
    if rope_of(config).get("rope_type") != "dynamic":
        return
    prefixes = _rope_prefixes(config)

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
    """The modules that make the rotations of a decoder's layers: one, or none where no layer of a class that has one
    for each theta uses RoPE."""
    return list(decoder.rotary_embs) if hasattr(decoder, "rotary_embs") else [decoder.rotary_emb]


def switch_length(config: Any) -> int | None:
    """The length in tokens beyond which RoPE's frequencies follow the length of the text; None where they never do.

    `config` is a built model's, of transformers. The frequencies of dynamic RoPE change with every token beyond it,
    those of longrope once.
    """
    found = [int(config.max_position_embeddings) for rope in _rope_sets(config) if rope["rope_type"] == "dynamic"]
    found += [
        int(rope["original_max_position_embeddings"]) for rope in _rope_sets(config) if rope["rope_type"] == "longrope"
    ]
    return min(found, default=None)


def same_frequencies_from(config: Any, length: int) -> int:
    """The shortest text, in tokens, that has the RoPE frequencies of a text of `length` tokens.

    1 where nothing has changed up to `length`. A cache of n tokens serves a text of `length` if n is at least this.
    `config` is a built model's, of transformers.
    """
    switch = switch_length(config)
    if switch is None or length <= switch:
        return 1
    dynamic = any(rope["rope_type"] == "dynamic" for rope in _rope_sets(config))
    return length if dynamic else switch + 1


def _rope_sets(config: Any) -> list[Config]:
    """The RoPE parameters of a built model's config: one set, or one for each type of layer that has any."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]


def _rope_prefixes(config: Config) -> list[str]:
    if "rope_type" in config["rope_parameters"]:
        return [""]
    kinds = family_of(config).kinds(config)
    return sorted({f"{name}_" for kind, name in zip(kinds, config["layer_types"], strict=True) if kind.use_rope})
