"""Another layout over the same weights: a second model of stock classes that shares every weight with the first.

`relayout` builds the class of a config without weights and inserts the linear layers, embeddings and norms of the first
model. It inserts the same module objects, without adapters and without the modules that training replaced. A model can
therefore be its own teacher (train/distill.py), and a layout can be measured before it is written (retrofit/). The only
extra memory is that of the RoPE frequencies. Quantised weights are shared as well, because the shared module contains
the code that uses them.
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
from ctxext.model.frequencies import check_realised, forget_lengths, rotaries
from ctxext.model.load import causal_lm
from ctxext.model.model_config import ModelConfig


def relayout(model: Any, config: ModelConfig) -> PreTrainedModel:
    """Returns the frozen weights of `model` under another config of the same shapes, in eval mode.

    `model` is a causal LM or PEFT's wrapper around one. The result leaves out the adapter and the fully trained
    modules, so it uses the weights of the base checkpoint. Do not move or cast the result: it shares its modules with
    `model`. Use it for forward passes only; a gradient reaches no trainable parameter. Raises ModelError where `model`
    lacks a weight of `config`.
    """
    # Build the class on the meta device: its parameters take no memory. Its buffers, the RoPE frequencies, are real.
    base = causal_lm(model)
    hf_config = CONFIG_MAPPING[config.family.name].from_dict(deepcopy(config.fields))
    hf_config._attn_implementation = attention.register()
    with init_empty_weights(include_buffers=False):
        other: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)](hf_config)
    # Replace every module that holds parameters with the model's module of the same name.
    for name, module in list(other.named_modules()):
        if not list(module.parameters(recurse=False)):
            continue
        try:
            own = frozen_module(base.get_submodule(name))
        except AttributeError as error:
            raise ModelError(f"{name} of a {config.family.name} layout is not among the model's modules") from error
        if list(own.parameters(recurse=False)) == []:
            raise ModelError(f"{name} holds no weight of its own in the model")
        if list(module.children()):
            # A module with parameters and with submodules, such as attention with sinks: take over its parameters only,
            # so that it keeps the layout of `config`.
            for own_name, weight in own.named_parameters(recurse=False):
                setattr(module, own_name, weight)
            continue
        parent, _, child = name.rpartition(".")
        setattr(other.get_submodule(parent), child, _without_bias(own, module, name))
    if config.shape.tied:
        _tie(other)
    # A parameter that is still on the meta device has no weight.
    left = [name for name, parameter in other.named_parameters() if parameter.is_meta]
    if left:
        raise ModelError(f"{len(left)} weights of the layout were not found in the model, first {left[0]}")
    device = other.get_input_embeddings().weight.device
    # The new buffers were made on the CPU; the shared weights may be on an accelerator.
    for module in other.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    check_realised(other, config)
    forget_lengths(other, config)
    result: PreTrainedModel = other.eval()
    return result


def _without_bias(own: Any, wanted: Any, name: str) -> Any:
    """Returns the model's module; where only that has a bias, a linear layer with the same weight and no bias."""
    if getattr(own, "bias", None) is None or getattr(wanted, "bias", None) is not None:
        return own
    if type(own) is not nn.Linear:
        raise ModelError(
            f"{name} has a bias that the layout does not have, and is a {type(own).__name__}",
            hint="name the source as the teacher: --set distill.teacher=SOURCE",
        )
    with torch.device("meta"):
        bare = nn.Linear(own.in_features, own.out_features, bias=False)
    bare.weight = own.weight
    return bare


def frozen_module(module: Any) -> Any:
    """Returns the module that came from the checkpoint, without PEFT's wrappers if there are any."""
    # `modules_to_save` keeps the module in `original_module`, LoRA in `base_layer`; both wrappers can be nested.
    while True:
        inner = getattr(module, "original_module", None)
        inner = inner if inner is not None else getattr(module, "base_layer", None)
        if inner is None:
            return module
        module = inner


def _tie(model: Any) -> None:
    """Sets the frozen embedding as the head. Under PEFT the model's own head may be the trained copy."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        return
    with torch.device("meta"):
        tied = nn.Linear(embedding.weight.shape[1], embedding.weight.shape[0], bias=False)
    tied.weight = embedding.weight
    model.set_output_embeddings(tied)


def rotations(decoder: Any, x: Tensor) -> Callable[[int], tuple[Tensor, Tensor] | None]:
    """Returns a function from a layer's index to RoPE's cos and sin [1,T,D] for rows x [B,T,E], as the decoder does.

    A layer without RoPE also gets values and ignores them. It gets None in a class whose layers rotate whenever they
    get values.
    """
    # Three forms of decoder: one rotary module per theta (GraniteSWA), one for all layers, one per layer type (Mellum).
    positions = torch.arange(x.shape[1], device=x.device)[None]
    if (thetas := getattr(decoder.config, "layer_rope_theta", None)) is not None:
        made = {rotary.config.rope_parameters["rope_theta"]: rotary(x, positions) for rotary in rotaries(decoder)}
        return lambda index: made[thetas[index]] if thetas[index] else None
    if "rope_type" in decoder.config.rope_parameters:
        shared = decoder.rotary_emb(x, positions)
        return lambda index: shared
    return lambda index: decoder.rotary_emb(x, positions, decoder.config.layer_types[index])
