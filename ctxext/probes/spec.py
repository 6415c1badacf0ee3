"""What a probe is asked, each with its fields. No torch.

`length` is in tokens; None is the shortest usable length of the models, at most LONGEST. `samples` are texts or
questions. `data` is text of data/documents.py; of the embedded corpus its held-out files.
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

SHORTEST, LONGEST = 64, 8192  # tokens: less holds no question; more is for who asks for it
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


@spec
class ReceptiveField:
    """probes/receptive_field.py. `restrict`: the layers that see less, all full ones, all sliding ones, or each by
    itself. `visible`: the R's; None is powers of 2 from 16 to below the length. `layer_visible`: R where each layer is
    restricted by itself; None is the smallest. `tokens` of text for the loss, at least one length; `samples` passkeys;
    LongPPL is measured where an `evaluator` is named."""

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
    """probes/layer_niah.py. `samples` questions with one of `classes` near-identical numbers; `test` is the share of
    them that the classifier is judged on, `inverse_regularisation` its C. `at`: the token whose residual is read, the
    last before the answers part ways (`parting`), or the question's last (`question`)."""

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
                f"{self.samples} samples, {judged} of them to judge by: {self.classes} classes need one each in both"
            )


@spec
class GradientInfluence:
    """probes/gradient_influence.py. `last`: positions at the end whose logits are averaged."""

    probe: Literal["gradient-influence"] = "gradient-influence"
    length: Tokens | None = None
    samples: Count = 16
    last: Count = 20
    data: str = EMBEDDED
    seed: int = 0


@spec
class RetrievalHeads:
    """probes/retrieval_heads.py. `definitions`: attention mass (arXiv 2606.15378), copying while decoding (2404.15574).
    `ablate` K masks the top K heads, and as many random ones `draws` times; None masks nothing."""

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
    """probes/retrieval_trace.py. `heads`: how many of the final checkpoint's best are followed."""

    probe: Literal["retrieval-trace"] = "retrieval-trace"
    length: Tokens | None = None
    samples: Count = 20
    heads: Count = 4
    data: str = EMBEDDED
    seed: int = 0


@spec
class QkDistance:
    """probes/qk_distance.py. `to`: the weights that distance is measured to, those of the run's end or of its base."""

    probe: Literal["qk-distance"] = "qk-distance"
    to: Literal["final", "base"] = "base"


@spec
class AttentionDistance:
    """probes/attention_distance.py. `rows`: queries of each text whose attention is looked at, evenly spread over its
    second half. `lengths`: at which NoPE layers are looked at again; None is halves of `length`, four of them."""

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
    """probes/positions.py. Everything is read from the model's files and its rotations."""

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
OF_A_RUN = ("retrieval-trace", "qk-distance")  # these follow a training run; `all` leaves them out of other models
KEEP_THEM = "train with --set faults.keep_at_end=true, and faults.keep as large as there are steps to follow"


@spec
class ProbeSpec:
    """Probes, in order. `dtype` of weights and activations; `extrapolate`: also beyond what a model bears."""

    probes: Annotated[tuple[Probe, ...], Field(min_length=1)]
    dtype: Literal["float32", "bfloat16"] = "float32"
    extrapolate: bool = False


def asked(names: list[str], given: dict[str, Any], *, preset: str | None = None) -> ProbeSpec:
    """The spec of a command line. A preset has fields by probe, and those of ProbeSpec; options go before it.

    Raises InputError (a name or a field that is not known, a probe twice), SpecError (a value that is not allowed).
    """
    for name in names:
        if name not in PROBES:
            raise InputError(f"probe {name!r} is unknown; allowed are {', '.join(PROBES)}, or all")
    if len(set(names)) < len(names):
        raise InputError(f"a probe is named twice: {' '.join(names)}")
    given = dict(presets.find("probe", preset).data) if preset else {}
    unknown = [key for key in given if key not in PROBES and key not in _WHOLE]
    if unknown:
        raise InputError(f"probe preset {preset}: {unknown[0]!r} is no probe and no field; probes: {', '.join(PROBES)}")
    for name, section in given.items():
        if name in PROBES:
            _check_section(f"probe preset {preset}, {name}", name, section)
    data = {key: value for key, value in given.items() if key in _WHOLE}
    probes = [{**(given.get(name) or {}), "probe": name} for name in names]
    spread(given, data, probes, names=_WHOLE, tag="probe", classes=PROBES, of=" ".join(names))
    return build(ProbeSpec, {**data, "probes": probes}, source="probe spec")


def _check_section(place: str, name: str, section: Any) -> None:
    """Also of a probe that was not asked for: a misspelt field is found at once."""
    if not isinstance(section, dict):
        raise InputError(f"{place}: got {section!r}; allowed: fields and their values, such as {{samples: 20}}")
    known = {field.name for field in fields(PROBES[name])} - {"probe"}
    if wrong := sorted(set(section) - known):
        raise InputError(f"{place}: {wrong[0]!r} is no field; allowed: {', '.join(sorted(known))}")


_WHOLE = {field.name for field in fields(ProbeSpec)} - {"probes"}
