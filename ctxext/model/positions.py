"""Plans RoPE for a longer context: which scaling, and from which original length.

Every scaling is derived from the ORIGINAL trained length, no matter how often a model was extended before. It is
written as transformers' own `rope_parameters`. transformers builds the model from them, and frequencies.py checks the
result.

Sources: linear (position interpolation) arXiv 2306.15595; YaRN 2309.00071; LongRoPE 2402.13753; NTK-aware and dynamic
scaling as in transformers; llama3 as released with Llama 3.1. `ntk` and `abf` only change theta; transformers has no
type with these names. Not done: the search for LongRoPE's factors (the user gives them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ctxext.config.loader import spec
from ctxext.errors import InputError
from ctxext.model.config_fields import Fields
from ctxext.model.layout import LayerKind
from ctxext.model.model_config import ModelConfig
from ctxext.units import format_tokens

Factor = Annotated[float, Field(ge=1.0)]


@spec
class Auto:
    """Linear when RoPE layers look farther than the original length, else no scaling. Scaled models keep their type."""

    type: Literal["auto"] = "auto"


@spec
class NoScaling:
    """Leaves the positions unchanged, also beyond the trained length."""

    type: Literal["none"] = "none"


@spec
class Linear:
    """Position interpolation: position m becomes m / factor. `factor` None is ceil(ctx / original length)."""

    type: Literal["linear"] = "linear"
    factor: Factor | None = None


@spec
class Ntk:
    """NTK-aware scaling: theta becomes theta * s^(d / (d - 2)) with s = factor and d = head dimension."""

    type: Literal["ntk"] = "ntk"
    factor: Factor | None = None


@spec
class Abf:
    """Adjusted base frequency: theta gets the given value."""

    type: Literal["abf"] = "abf"
    theta: Annotated[float, Field(gt=1.0)]


@spec
class Dynamic:
    """NTK with a factor that grows with the running length. max_position_embeddings stays at the original length."""

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
    """Llama 3.1's scaling: long wavelengths are interpolated, short ones are kept, with a ramp between."""

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
    """The planned positions of a model.

    rope_parameters          the new RoPE; None: RoPE does not change
    max_position_embeddings  the value in the saved config, in tokens
    usable_length            tokens that the model supports after training with these positions
    original_length          tokens of the first training; None when it is not known
    reach                    the largest distance that a layer with RoPE looks back at this ctx, in tokens
    factor                   the scaling factor; by default reach or ctx over original_length, rounded up; 1.0 without
                             scaling
    summary                  one line for the screen
    """

    rope_parameters: Fields | None
    max_position_embeddings: int
    usable_length: int
    original_length: int | None
    reach: int
    factor: float
    summary: str

    def apply(self, config: ModelConfig) -> ModelConfig:
        """Returns the config with these positions."""
        # Record the original length and theta, so that a later extension starts from them.
        known: Fields = {"max_position_embeddings": self.max_position_embeddings}
        if self.original_length is not None:
            known["original_max_position_embeddings"] = self.original_length
        if self.rope_parameters is not None:
            known["original_rope_theta"] = original_theta(config)
            config = config.with_rope(self.rope_parameters)
        return config.with_fields(**known)


def original_theta(config: ModelConfig) -> float:
    """Returns theta of the first training. ntk and abf change `rope_theta`; a later extension needs the original."""
    return float(config.fields.get("original_rope_theta") or config.rope["rope_theta"])


def reach_of(kinds: Sequence[LayerKind], ctx: int) -> int:
    """Returns the largest distance in tokens that a layer with RoPE looks back.

    This is the maximum of min(W, ctx) over the layers with RoPE; 0 where no layer has RoPE.
    """
    return max((min(kind.sliding_window or ctx, ctx) for kind in kinds if kind.use_rope), default=0)


def plan_positions(
    config: ModelConfig, scaling: Any, ctx: int, *, original_length: int | None, usable_length: int
) -> PositionPlan:
    """Plans the positions for training and running at `ctx` tokens.

    `scaling` is one of the RopeScaling specs. With `auto`, a model whose usable length covers ctx keeps its positions.
    A ctx up to the original length is allowed with auto or none (healing needs it). Raises InputError for an explicit
    scaling there, for a scaling of a model without RoPE, for an unknown original length where one is needed, and where
    `auto` would scale a longrope model further.
    """
    # The checks are in this order, so that a model that needs no scaling needs no original length.
    rope, kinds = config.rope, config.kinds
    reach = reach_of(kinds, ctx)
    keep = partial(_kept, config, ctx, original_length, usable_length, reach)
    automatic = scaling.type == "auto"
    if scaling.type == "none":
        return keep("positions unchanged, as requested")
    if automatic and ctx <= usable_length:
        return keep(f"positions unchanged: usable to {format_tokens(usable_length)} tokens already")
    if not automatic and not reach:
        raise InputError(f"rope_scaling {scaling.type}: no layer of this model uses RoPE", hint="use rope_scaling auto")
    # Every scaling below is derived from the original length.
    if original_length is None:
        raise InputError(
            f"RoPE is scaled already ({rope.get('rope_type')}, factor {rope.get('factor')}) from an "
            "original length that is not known",
            hint="give the model's original training length with --original-length",
        )
    # Sliding windows may keep every RoPE layer within trained distances. Then `auto` scales nothing.
    if automatic and reach <= original_length:
        far = f"layers with RoPE see {format_tokens(reach)} tokens back" if reach else "no layer has RoPE"
        return keep(f"no interpolation needed: {far}, trained at {format_tokens(original_length)}")
    if automatic:
        scaling = _same_type(rope, original_theta(config))
    elif ctx <= original_length:
        raise InputError(
            f"rope_scaling {scaling.type} at ctx {format_tokens(ctx)}: the model was trained at "
            f"{format_tokens(original_length)}, no scaling is needed",
            hint="use rope_scaling none or auto",
        )
    return _scaled(config, scaling, ctx, original_length, reach, automatic)


def _kept(
    config: ModelConfig, ctx: int, original_length: int | None, usable_length: int, reach: int, summary: str
) -> PositionPlan:
    """Returns a plan that keeps RoPE, for a ctx that may be longer than any length before.

    Raises InputError where the kept RoPE is scaled from another original length than `original_length`.
    """
    rope, limit = config.rope, max(ctx, config.max_position_embeddings)
    # Dynamic scaling starts beyond max_position_embeddings: a higher value would turn it off.
    if rope.get("rope_type") == "dynamic":
        limit = config.max_position_embeddings
    stated = rope.get("original_max_position_embeddings")
    if None not in (stated, original_length) and stated != original_length:
        raise InputError(
            f"--original-length {format_tokens(original_length or 0)}: this model keeps its RoPE, "
            f"{rope['rope_type']} from {format_tokens(stated)} tokens",
            hint="leave it out, or give rope_scaling, which is derived from it",
        )
    return PositionPlan(None, limit, max(ctx, usable_length), original_length, reach, 1.0, summary)


def _scaled(
    config: ModelConfig, scaling: Any, ctx: int, original_length: int, reach: int, automatic: bool
) -> PositionPlan:
    """Returns a plan with a scaling. If `automatic`, the factor (ntk: theta) is at least the model's own."""
    # An automatic factor covers the reach of the RoPE layers; an explicit scaling covers the whole ctx.
    rope = config.rope
    default = float(math.ceil((reach if automatic else ctx) / original_length))
    if automatic and rope.get("rope_type") == scaling.type:
        default = max(default, rope.get("factor") or 1.0)
    factor = getattr(scaling, "factor", None) or default
    theta = original_theta(config)
    parameters = _rope_parameters(scaling, theta, config.shape.head_dim, factor, original_length)
    if automatic and scaling.type == "ntk":
        parameters["rope_theta"] = max(parameters["rope_theta"], rope["rope_theta"])
    change = f"theta {parameters['rope_theta']:g}" if scaling.type in ("ntk", "abf") else f"factor {factor:g}"
    summary = (
        f"{scaling.type}, {change}, from the original {format_tokens(original_length)} "
        f"(layers with RoPE reach {format_tokens(reach)})"
    )
    # Warn where an explicit factor is too small: some layers then see rotations that training never used.
    if scaling.type in ("linear", "yarn") and factor * original_length < reach:
        summary += f"; beyond {format_tokens(int(factor * original_length))} positions are untrained"
    longest = original_length if scaling.type == "dynamic" else ctx
    return PositionPlan(parameters, longest, ctx, original_length, reach, factor, summary)


def _same_type(rope: Fields, theta: float) -> Any:
    """Returns the scaling for `auto`: a scaled model keeps its type, every other model gets linear.

    Raises InputError for longrope.
    """
    old = rope.get("rope_type", "default")
    if old == "llama3":
        return Llama3(low_freq_factor=rope["low_freq_factor"], high_freq_factor=rope["high_freq_factor"])
    if old == "yarn":
        betas = {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
        return Yarn(**betas, attention_factor=rope.get("attention_factor"))
    if old == "longrope":
        raise InputError(
            "this model uses longrope, whose factors are for one length",
            hint="give rope_scaling {type: longrope, short_factor: [...], long_factor: [...]}",
        )
    # A changed theta without a scaling type comes from an earlier ntk or abf.
    if old == "default" and rope["rope_theta"] != theta:
        return Ntk()
    return Dynamic() if old == "dynamic" else Linear()


def _rope_parameters(scaling: Any, theta: float, head_dim: int, factor: float, original: int) -> Fields:
    # The scaling in transformers' form. `theta` and `original` are those of the first training.
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
