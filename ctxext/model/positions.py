"""RoPE for a longer context: which scaling, from which original length, and what the frequencies come out as.

Every scaling is derived from the ORIGINAL trained length, however often a model was extended before, and written as
transformers' own `rope_parameters`; transformers builds the model from them. `inverse_frequencies` states the same
formulas once more, in plain Python, so that what was built can be compared with what was meant.

Sources: linear (position interpolation) arXiv 2306.15595; YaRN 2309.00071; LongRoPE 2402.13753; NTK-aware and dynamic
scaling as in transformers; llama3 as released with Llama 3.1. `ntk` and `abf` only change theta; transformers has no
type of those names. Not done: searching LongRoPE's factors (the user gives them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ctxext.config.loader import spec
from ctxext.errors import CheckFailed, InputError, ModelError
from ctxext.model.families import Config, family_of, rope_of, with_rope
from ctxext.model.layout import LayerKind
from ctxext.units import format_tokens

Factor = Annotated[float, Field(ge=1.0)]


@spec
class Auto:
    """Linear when RoPE layers must look past the original length, else nothing; scaled models keep their type."""

    type: Literal["auto"] = "auto"


@spec
class NoScaling:
    """Leave the positions as they are, also beyond the trained length."""

    type: Literal["none"] = "none"


@spec
class Linear:
    """Position interpolation: position m becomes m / factor. `factor` None: ceil(ctx / original length)."""

    type: Literal["linear"] = "linear"
    factor: Factor | None = None


@spec
class Ntk:
    """theta becomes theta * s^(d / (d - 2)), s = factor, d = head dimension."""

    type: Literal["ntk"] = "ntk"
    factor: Factor | None = None


@spec
class Abf:
    """Adjusted base frequency: theta as given."""

    type: Literal["abf"] = "abf"
    theta: Annotated[float, Field(gt=1.0)]


@spec
class Dynamic:
    """NTK with a factor that grows with the running length; max_position_embeddings stays the original."""

    type: Literal["dynamic"] = "dynamic"
    factor: Factor | None = None


@spec
class Yarn:
    """YaRN; `attention_factor` None is the paper's 0.1 ln(factor) + 1."""

    type: Literal["yarn"] = "yarn"
    factor: Factor | None = None
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    attention_factor: Annotated[float, Field(gt=0)] | None = None


@spec
class LongRope:
    """LongRoPE with the user's factors, one for each of the head_dim / 2 frequencies."""

    type: Literal["longrope"] = "longrope"
    short_factor: list[Annotated[float, Field(gt=0)]]
    long_factor: list[Annotated[float, Field(gt=0)]]
    factor: Factor | None = None


@spec
class Llama3:
    """Llama 3.1's scaling: long wavelengths interpolated, short ones kept, a ramp between."""

    type: Literal["llama3"] = "llama3"
    factor: Factor | None = None
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")


RopeScaling = Annotated[
    Annotated[Auto | NoScaling | Linear | Ntk | Abf | Dynamic | Yarn | LongRope | Llama3, Field(discriminator="type")],
    BeforeValidator(lambda value: {"type": value} if isinstance(value, str) else value),
]


@dataclass(frozen=True)
class PositionPlan:
    """What the positions of a model become. `rope_parameters` None: they stay as they are.

    reach                    the farthest any layer with RoPE looks at this ctx, in tokens
    factor                   reach (or ctx) over original_length, as used; 1.0 when nothing is scaled
    max_position_embeddings  tokens; what the saved config says
    summary                  one line for the screen
    """

    rope_parameters: Config | None
    max_position_embeddings: int
    original_length: int | None
    reach: int
    factor: float
    summary: str

    def apply(self, config: Config) -> Config:
        """A copy of a normalised config with these positions."""
        known: Config = {"max_position_embeddings": self.max_position_embeddings}
        if self.original_length is not None:
            known["original_max_position_embeddings"] = self.original_length
        if self.rope_parameters is not None:
            known["original_rope_theta"] = original_theta(config)
            config = with_rope(config, self.rope_parameters)
        return config | known


def original_theta(config: Config) -> float:
    """theta as first trained: ntk and abf rewrite `rope_theta`, and a later extension must not start from that."""
    return float(config.get("original_rope_theta") or rope_of(config)["rope_theta"])


def reach_of(kinds: Sequence[LayerKind], ctx: int) -> int:
    """The farthest a layer with RoPE looks: max over those layers of min(W, ctx), in tokens; 0 without RoPE."""
    return max((min(kind.sliding_window or ctx, ctx) for kind in kinds if kind.use_rope), default=0)


def plan_positions(
    config: Config, scaling: Any, ctx: int, *, original_length: int | None, usable_length: int
) -> PositionPlan:
    """Decide the positions for training and running at `ctx` tokens. Raises InputError when asked for the senseless.

    `scaling` is one of the RopeScaling specs. A model whose usable length covers ctx keeps the positions it has under
    `auto`. ctx below the original length is allowed with auto or none (healing needs it), refused with a scaling.
    """
    rope, kinds = rope_of(config), family_of(config).kinds(config)
    reach = reach_of(kinds, ctx)
    longest = max(ctx, config["max_position_embeddings"])

    def keep(summary: str) -> PositionPlan:
        # a raised max_position_embeddings would keep dynamic scaling from ever starting
        limit = config["max_position_embeddings"] if rope.get("rope_type") == "dynamic" else longest
        return PositionPlan(None, limit, original_length, reach, 1.0, summary)

    automatic = scaling.type == "auto"
    if scaling.type == "none":
        return keep("positions untouched, as asked")
    if automatic and ctx <= usable_length:
        return keep(f"positions untouched: usable to {format_tokens(usable_length)} tokens already")
    if not automatic and not reach:
        raise InputError(f"rope_scaling {scaling.type}: no layer of this model uses RoPE", hint="use rope_scaling auto")
    if original_length is None:
        raise InputError(
            f"RoPE is scaled already ({rope.get('rope_type')}, factor {rope.get('factor')}) and nothing says from "
            "which original length",
            hint="add --original-length, the context the model was first trained at",
        )
    if automatic and reach <= original_length:
        far = f"look {format_tokens(reach)} tokens back" if reach else "are none"
        return keep(f"no interpolation needed: layers with RoPE {far}, trained at {format_tokens(original_length)}")
    if automatic:
        scaling = _same_type(rope, original_theta(config))
    elif ctx <= original_length:
        raise InputError(
            f"rope_scaling {scaling.type} at ctx {format_tokens(ctx)}: the model was trained at "
            f"{format_tokens(original_length)}, nothing needs scaling",
            hint="use rope_scaling none or auto",
        )
    default = float(math.ceil((reach if automatic else ctx) / original_length))
    factor = getattr(scaling, "factor", None) or default
    theta = original_theta(config)
    parameters = _rope_parameters(scaling, theta, config["head_dim"], factor, original_length)
    if scaling.type == "dynamic":
        longest = original_length
    change = f"theta {parameters['rope_theta']:g}" if scaling.type in ("ntk", "abf") else f"factor {factor:g}"
    summary = (
        f"{scaling.type}, {change}, from the original {format_tokens(original_length)} "
        f"(layers with RoPE reach {format_tokens(reach)})"
    )
    return PositionPlan(parameters, longest, original_length, reach, factor, summary)


def _same_type(rope: Config, theta: float) -> Any:
    """The scaling `auto` uses: a model that was trained under a scaling keeps its type, any other gets linear."""
    old = rope.get("rope_type", "default")
    if old == "llama3":
        return Llama3(low_freq_factor=rope["low_freq_factor"], high_freq_factor=rope["high_freq_factor"])
    if old == "yarn":
        return Yarn(beta_fast=rope.get("beta_fast") or 32.0, beta_slow=rope.get("beta_slow") or 1.0)
    if old == "longrope":
        raise InputError(
            "this model uses longrope: its factors hold for one length",
            hint="give rope_scaling {type: longrope, short_factor: [...], long_factor: [...]}",
        )
    if old == "default" and rope["rope_theta"] != theta:
        return Ntk()
    return Dynamic() if old == "dynamic" else Linear()


def _rope_parameters(scaling: Any, theta: float, head_dim: int, factor: float, original: int) -> Config:
    match scaling.type:
        case "linear" | "dynamic":
            return {"rope_type": scaling.type, "rope_theta": theta, "factor": factor}
        case "ntk":
            return {"rope_type": "default", "rope_theta": theta * factor ** (head_dim / (head_dim - 2))}
        case "abf":
            return {"rope_type": "default", "rope_theta": scaling.theta}
        case "yarn":
            parameters = {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "original_max_position_embeddings": original,
            }
            return parameters | ({"attention_factor": scaling.attention_factor} if scaling.attention_factor else {})
        case "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(scaling, name)) != head_dim // 2:
                    raise InputError(
                        f"rope_scaling.{name}: {len(getattr(scaling, name))} factors for a head dimension "
                        f"of {head_dim}: {head_dim // 2} are needed"
                    )
            return {
                "rope_type": "longrope",
                "rope_theta": theta,
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
                "factor": factor,
                "original_max_position_embeddings": original,
            }
        case "llama3":
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": original,
            }
    raise AssertionError(scaling)


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
    for prefix in _rope_prefixes(config):
        rotary = model.get_decoder().rotary_emb
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


def _rope_prefixes(config: Config) -> list[str]:
    if "rope_type" in config["rope_parameters"]:
        return [""]
    kinds = family_of(config).kinds(config)
    return sorted({f"{name}_" for kind, name in zip(kinds, config["layer_types"], strict=True) if kind.use_rope})
