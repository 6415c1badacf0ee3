"""The spec of each probe, with its fields. No torch.

`length` is in tokens; None is the shortest usable length of the models, at most LONGEST. `samples` counts texts or
questions. `data` is a source of data/documents.py; for the embedded corpus its held-out files.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from ctxext.config import presets
from ctxext.config.loader import Tokens, build, spec
from ctxext.config.parts import spread
from ctxext.data.documents import EMBEDDED
from ctxext.errors import InputError

SHORTEST, LONGEST = 64, 8192  # tokens: a shorter text holds no question; a longer one must be requested
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


@spec
class ReceptiveField:
    """Layers that see fewer tokens (probes/receptive_field.py).

    restrict        the layers that see less: all full ones, all sliding ones, or each alone
    visible         the values of R; None is powers of 2 from 16 to below the length
    layer_visible   R where each layer is restricted alone; None is the smallest
    tokens          of text for the loss, at least one length
    samples         passkeys
    evaluator       finds LongPPL's keys; None leaves LongPPL out
    """

    probe: Literal["receptive-field"] = "receptive-field"
    restrict: Annotated[tuple[Literal["full", "sliding", "layers"], ...], Field(min_length=1)] = (
        "full",
        "sliding",
        "layers",
    )
    visible: Annotated[tuple[Tokens, ...], Field(min_length=1)] | None = None
    layer_visible: Tokens | None = None
    length: Tokens | None = None
    tokens: Tokens = 16_384
    samples: Count = 20
    data: str = EMBEDDED
    evaluator: str | None = None
    seed: int = 0


@spec
class LayerNiah:
    """A classifier on the residual stream after each layer (probes/layer_niah.py).

    samples                  questions, each with one of `classes` near-identical numbers
    test                     share of the questions that the classifier is judged on
    inverse_regularisation   the classifier's C
    at                       the token whose residual is read: the last before the answers differ (`parting`), or the
                             question's last (`question`)
    """

    probe: Literal["layer-niah"] = "layer-niah"
    length: Tokens | None = None
    samples: Annotated[int, Field(ge=40)] = 400
    classes: Annotated[int, Field(ge=2, le=10)] = 8
    at: Literal["parting", "question"] = "parting"
    test: Share = 0.2
    inverse_regularisation: Annotated[float, Field(gt=0)] = 0.1
    data: str = "grass"
    seed: int = 0

    def __post_init__(self) -> None:
        judged = math.ceil(self.test * self.samples)
        if min(judged, self.samples - judged) < self.classes:
            raise ValueError(
                f"{self.samples} samples, {judged} of them for the test: training and test need one of each of "
                f"{self.classes} classes"
            )


@spec
class GradientInfluence:
    """The gradient by distance (probes/gradient_influence.py). `last`: final positions whose logits are averaged."""

    probe: Literal["gradient-influence"] = "gradient-influence"
    length: Tokens | None = None
    samples: Count = 16
    last: Count = 20
    data: str = EMBEDDED
    seed: int = 0


@spec
class RetrievalHeads:
    """The heads that retrieve a passkey (probes/retrieval_heads.py).

    definitions   attention mass (arXiv 2606.15378), copying while decoding (2404.15574)
    ablate        K masks the top K heads, then `draws` times as many random ones; None masks nothing
    """

    probe: Literal["retrieval-heads"] = "retrieval-heads"
    length: Tokens | None = None
    samples: Count = 40
    definitions: Annotated[tuple[Literal["mass", "copy"], ...], Field(min_length=1)] = ("mass", "copy")
    ablate: Count | None = None
    draws: Count = 3
    data: str = EMBEDDED
    seed: int = 0


@spec
class RetrievalTrace:
    """Retrieval heads over a run (probes/retrieval_trace.py). `heads`: how many of the result's best are followed."""

    probe: Literal["retrieval-trace"] = "retrieval-trace"
    length: Tokens | None = None
    samples: Count = 20
    heads: Count = 4
    data: str = EMBEDDED
    seed: int = 0


@spec
class QkDistance:
    """The distance of Wq and Wk (probes/qk_distance.py). `to`: the reference weights, the run's end or its base."""

    probe: Literal["qk-distance"] = "qk-distance"
    to: Literal["final", "base"] = "base"


@spec
class AttentionDistance:
    """How far each head looks (probes/attention_distance.py).

    rows      queries of each text whose attention is measured, evenly spread over its second half
    lengths   lengths at which full layers are measured again; None is `length` halved up to three times
    sinks     first tokens whose mass is measured
    """

    probe: Literal["attention-distance"] = "attention-distance"
    length: Tokens | None = None
    lengths: tuple[Tokens, ...] | None = None
    samples: Count = 8
    rows: Count = 32
    sinks: Count = 4
    data: str = EMBEDDED
    seed: int = 0


@spec
class Positions:
    """The RoPE doctor (probes/positions.py). It reads everything from the model's files and its rotations."""

    probe: Literal["positions"] = "positions"


Probe = Annotated[
    ReceptiveField
    | LayerNiah
    | GradientInfluence
    | RetrievalHeads
    | RetrievalTrace
    | QkDistance
    | AttentionDistance
    | Positions,
    Field(discriminator="probe"),
]
PROBES: dict[str, type] = {
    "receptive-field": ReceptiveField,
    "layer-niah": LayerNiah,
    "gradient-influence": GradientInfluence,
    "retrieval-heads": RetrievalHeads,
    "retrieval-trace": RetrievalTrace,
    "qk-distance": QkDistance,
    "attention-distance": AttentionDistance,
    "positions": Positions,
}
RUN_PROBES = ("retrieval-trace", "qk-distance")  # these need a training run; `all` leaves them out for other models
KEEP_CHECKPOINTS = (
    "train with --set faults.keep_at_end=true, and with faults.keep of at least the number of checkpoints to keep"
)


@spec
class ProbeSpec:
    """The probes, in order.

    dtype         of weights and activations
    extrapolate   also runs lengths beyond what a model supports
    """

    probes: Annotated[tuple[Probe, ...], Field(min_length=1)]
    dtype: Literal["float32", "bfloat16"] = "float32"
    extrapolate: bool = False


def probe_spec_from_options(names: list[str], given: dict[str, Any], *, preset: str | None = None) -> ProbeSpec:
    """Returns the spec of a command line: fields of a preset, by probe or of ProbeSpec; options override them.

    Raises InputError (an unknown name or field, a probe twice), SpecError (a value that is not allowed).
    """
    for name in names:
        if name not in PROBES:
            raise InputError(f"probe {name!r} is unknown; allowed are {', '.join(PROBES)}, or all")
    if len(set(names)) < len(names):
        raise InputError(f"a probe is named twice: {' '.join(names)}")
    from_preset = dict(presets.find("probe", preset).data) if preset else {}
    unknown = [key for key in from_preset if key not in PROBES and key not in _WHOLE]
    if unknown:
        raise InputError(
            f"probe preset {preset}: {unknown[0]!r} is neither a probe nor a field; probes: {', '.join(PROBES)}"
        )
    for name, section in from_preset.items():
        if name in PROBES:
            _check_section(f"probe preset {preset}, {name}", name, section)
    data = {key: value for key, value in from_preset.items() if key in _WHOLE}
    probes = [{**(from_preset.get(name) or {}), "probe": name} for name in names]
    spread(given, data, probes, names=_WHOLE, tag="probe", classes=PROBES, of=" ".join(names))
    return build(ProbeSpec, {**data, "probes": probes}, source="probe spec")


def _check_section(place: str, name: str, section: Any) -> None:
    """Checks a preset's section, also of a probe that was not requested, so that a misspelt field is found at once."""
    if not isinstance(section, dict):
        raise InputError(f"{place}: got {section!r}; allowed: fields and their values, such as {{samples: 20}}")
    known = {field.name for field in fields(PROBES[name])} - {"probe"}
    if wrong := sorted(set(section) - known):
        raise InputError(f"{place}: {wrong[0]!r} is not a field; allowed: {', '.join(sorted(known))}")


_WHOLE = {field.name for field in fields(ProbeSpec)} - {"probes"}
