"""Plans the trainable set: where LoRA goes, at which scale, and which modules train fully. No torch.

LongLoRA (arXiv 2309.12307, section 3.3) trains LoRA on attention plus embeddings and norms, because LoRA alone does not
extend a model to long contexts. The fully trained modules are listed by their full names, because PEFT matches a short
name such as `norm` against every name that ends in it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ctxext.config.loader import spec
from ctxext.errors import InputError
from ctxext.model.model_config import ModelConfig
from ctxext.ops.low_rank import alpha

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = "model.embed_tokens"
FITTED = ("sinks", "v_proj.bias", "o_proj.bias")  # tensors of a layer's self_attn that a conversion can fit


@spec
class LoraSpec:
    """A LoRA adapter, and the modules that train fully with it.

    alpha       sqrt: 256 sqrt(rank), second-hand from arXiv 2606.12883; curvature: sqrt(3 fan_in rank), ours; a number
    multiplier  a factor on alpha, for every rule
    embeddings  full (trained fully; with tied embeddings the head changes with them), lora, or frozen
    norms       full or frozen
    sinks       of a conversion with fitted sinks (retrofit/fitted_sinks.py): full (the sinks and the biases fitted with
                them train, at optimizer.sinks_learning_rate) or frozen. Sinks that a model had before stay frozen
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Literal["sqrt", "curvature"] | Annotated[float, Field(gt=0)] = "sqrt"
    multiplier: Annotated[float, Field(gt=0)] = 1.0
    target_modules: tuple[str, ...] = ATTENTION
    embeddings: Literal["full", "lora", "frozen"] = "full"
    norms: Literal["full", "frozen"] = "full"
    sinks: Literal["full", "frozen"] = "full"

    def __post_init__(self) -> None:
        wrong = sorted(set(self.target_modules) - {*ATTENTION, *MLP})
        if wrong or not self.target_modules:
            raise ValueError(f"target_modules {list(self.target_modules)}: allowed are {', '.join((*ATTENTION, *MLP))}")


@dataclass(frozen=True)
class LoraModules:
    """All modules of one name, such as `q_proj` of every layer. They share fan-in, alpha and scale = alpha / rank."""

    name: str
    count: int
    fan_in: int
    fan_out: int
    alpha: float
    scale: float
    parameters: int


@dataclass(frozen=True)
class Trainables:
    """The trainable set of a run.

    tuning      full or lora
    lora        the modules with LoRA, grouped by name
    whole       full names of the modules that train fully
    direct      names of the base's tensors that train in place
    parameters  this and all *_parameters are counts of scalars
    """

    tuning: str
    lora: tuple[LoraModules, ...]
    whole: tuple[str, ...]
    lora_parameters: int
    embedding_parameters: int
    norm_parameters: int
    other_parameters: int
    direct: tuple[str, ...] = ()
    sink_parameters: int = 0

    @property
    def parameters(self) -> int:
        """Returns the number of all trainable scalars."""
        adapter = self.lora_parameters + self.embedding_parameters + self.norm_parameters
        return adapter + self.sink_parameters + self.other_parameters


def plan_trainables(config: ModelConfig, tuning: str, lora: LoraSpec, fitted_layers: Sequence[int] = ()) -> Trainables:
    """Plans the trainable set for a config. Raises InputError for a combination that PEFT handles wrongly.

    `fitted_layers` are the layers in which a conversion fitted sinks and biases.
    """
    # The names that end in norm.weight are those of all norms, also of qk-norm.
    tensors = config.tensors
    sizes = {name: math.prod(shape) for name, shape in tensors.items()}
    norms = {name: size for name, size in sizes.items() if name.endswith("norm.weight")}
    embedding = sizes[f"{EMBEDDINGS}.weight"]
    if tuning == "full":
        rest = sum(sizes.values()) - sum(norms.values()) - embedding
        return Trainables("full", (), (), 0, embedding, sum(norms.values()), rest)
    if lora.embeddings == "lora" and config.shape.tied:
        raise InputError(
            "embeddings: lora is not supported for tied embeddings, because the head would not train",
            hint="use embeddings: full or frozen",
        )
    # One group for each name: modules of one name have the same shape in every layer.
    targets = list(lora.target_modules)
    groups = tuple(_lora_modules(config, name, lora) for name in targets)
    if lora.embeddings == "lora":
        groups = (*groups, _embedding_lora(config, lora))
    whole = [EMBEDDINGS] if lora.embeddings == "full" else []
    if lora.norms == "full":
        whole += [name.removesuffix(".weight") for name in norms]
    layers = fitted_layers if lora.sinks == "full" else ()
    direct = tuple(f"model.layers.{index}.self_attn.{name}" for index in layers for name in FITTED)
    return Trainables(
        tuning="lora",
        lora=groups,
        whole=tuple(whole),
        lora_parameters=sum(group.parameters for group in groups),
        embedding_parameters=embedding if lora.embeddings == "full" else 0,
        norm_parameters=sum(norms.values()) if lora.norms == "full" else 0,
        other_parameters=0,
        direct=direct,
        sink_parameters=sum(sizes[name] for name in direct),
    )


def in_adapted(name: str, targets: Container[str]) -> str:
    """Returns the name under PEFT of a tensor of the base. In a layer with LoRA the tensor is in `base_layer`."""
    module, _, own = name.rpartition(".")
    wrapped = ".base_layer" if module.rpartition(".")[2] in targets else ""
    return f"base_model.model.{module}{wrapped}.{own}"


def is_fitted(name: str) -> bool:
    """Returns whether a tensor under PEFT has the name of a sink or a bias that a conversion can fit."""
    return name.replace(".base_layer", "").endswith(FITTED)


def _lora_modules(config: ModelConfig, name: str, lora: LoraSpec) -> LoraModules:
    block = "self_attn" if name in ATTENTION else "mlp"
    rows, columns = config.tensors[f"model.layers.0.{block}.{name}.weight"]
    return _group(name, config.shape.num_layers, columns, rows, lora)


def _embedding_lora(config: ModelConfig, lora: LoraSpec) -> LoraModules:
    if lora.alpha == "curvature":
        raise InputError(
            "lora.alpha: curvature does not support LoRA on embeddings, which PEFT initialises differently",
            hint="use embeddings: full or frozen, or another alpha",
        )
    return _group("embed_tokens", 1, config.shape.vocab_size, config.shape.hidden_size, lora)


def _group(name: str, count: int, fan_in: int, fan_out: int, lora: LoraSpec) -> LoraModules:
    rule, value = (lora.alpha, None) if isinstance(lora.alpha, str) else ("fixed", lora.alpha)
    a = alpha(rule, lora.rank, fan_in, value=value, multiplier=lora.multiplier)
    parameters = count * lora.rank * (fan_in + fan_out)
    return LoraModules(name, count, fan_in, fan_out, a, a / lora.rank, parameters)
