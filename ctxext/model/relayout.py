"""Another layout over the same weights: a second model of stock classes that shares every weight with the first.

`relayout` builds the class of a config without weights and puts the first model's own linear layers, embeddings and
norms into it, the very modules, with adapters and what was trained whole beside them left off. So a model can be its
own teacher (train/distill.py) and a layout can be measured before it is written (retrofit/), at the memory of the RoPE
frequencies alone. Quantised weights are shared as well: what is shared is the module that knows how to use them.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ctxext.errors import ModelError
from ctxext.model import attention
from ctxext.model.families import Config
from ctxext.model.frequencies import check_realised, forget_lengths, rotaries
from ctxext.model.load import causal_lm


def relayout(model: Any, config: Config) -> PreTrainedModel:
    """The frozen weights of `model` under another normalised config of the same shapes, in eval mode.

    `model` is a causal LM or PEFT's wrapper around one; what its adapter and its modules trained whole hold is not part
    of the result, whose logits are those of the base checkpoint. Do not move or cast the result: its modules are the
    model's. It is meant for forward passes; a gradient would reach nothing that trains. Raises ModelError where a
    weight of `config` is not among the model's.
    """
    base = causal_lm(model)
    hf_config = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config))
    hf_config._attn_implementation = attention.register()
    with init_empty_weights(include_buffers=False):
        other: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)](hf_config)
    for name, module in list(other.named_modules()):
        if not list(module.parameters(recurse=False)):
            continue
        try:
            own = frozen_module(base.get_submodule(name))
        except AttributeError as error:
            raise ModelError(f"{name} of a {config['model_type']} layout is not among the model's modules") from error
        if list(own.parameters(recurse=False)) == []:
            raise ModelError(f"{name} holds no weight of its own in the model")
        if list(module.children()):
            # A part with weights of its own around others, such as attention with sinks: it keeps its layout.
            for own_name, weight in own.named_parameters(recurse=False):
                setattr(module, own_name, weight)
            continue
        parent, _, child = name.rpartition(".")
        setattr(other.get_submodule(parent), child, _without_bias(own, module, name))
    if config["tie_word_embeddings"]:
        _tie(other)
    left = [name for name, parameter in other.named_parameters() if parameter.is_meta]
    if left:
        raise ModelError(f"{len(left)} weights of the layout were not found in the model, first {left[0]}")
    device = other.get_input_embeddings().weight.device
    for module in other.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    check_realised(other, config)
    forget_lengths(other, config)
    result: PreTrainedModel = other.eval()
    return result


def _without_bias(own: Any, wanted: Any, name: str) -> Any:
    """The model's module; where it has a bias that the layout has not, a linear layer of the same weight without."""
    if getattr(own, "bias", None) is None or getattr(wanted, "bias", None) is not None:
        return own
    if type(own) is not nn.Linear:
        raise ModelError(
            f"{name} has a bias that the layout has not, and is a {type(own).__name__}",
            hint="name the source as the teacher: --set distill.teacher=SOURCE",
        )
    with torch.device("meta"):
        bare = nn.Linear(own.in_features, own.out_features, bias=False)
    bare.weight = own.weight
    return bare


def frozen_module(module: Any) -> Any:
    """The module as it came from the checkpoint, behind PEFT's wrapper if there is one."""
    while True:
        inner = getattr(module, "original_module", None)
        inner = inner if inner is not None else getattr(module, "base_layer", None)
        if inner is None:
            return module
        module = inner


def _tie(model: Any) -> None:
    """A head that is the frozen embedding: under PEFT the model's own head may be the one that trains."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        return
    with torch.device("meta"):
        tied = nn.Linear(embedding.weight.shape[1], embedding.weight.shape[0], bias=False)
    tied.weight = embedding.weight
    model.set_output_embeddings(tied)


def rotations(decoder: Any, x: Tensor) -> Callable[[int], tuple[Tensor, Tensor] | None]:
    """RoPE's cos and sin [1,T,D] for rows x [B,T,E] as the decoder gives them to a layer, by the layer's index.

    A layer without RoPE is given some as well and does not use them, or None where its class rotates whatever it gets.
    """
    positions = torch.arange(x.shape[1], device=x.device)[None]
    if (thetas := getattr(decoder.config, "layer_rope_theta", None)) is not None:
        made = {rotary.config.rope_parameters["rope_theta"]: rotary(x, positions) for rotary in rotaries(decoder)}
        return lambda index: made[thetas[index]] if thetas[index] else None
    if "rope_type" in decoder.config.rope_parameters:
        shared = decoder.rotary_emb(x, positions)
        return lambda index: shared
    return lambda index: decoder.rotary_emb(x, positions, decoder.config.layer_types[index])
