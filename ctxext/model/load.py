"""Loads checkpoints into memory. Positions are set before a model is built, and every weight is accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ctxext.errors import EnvironmentFault, InputError, ModelError
from ctxext.machine.gpu import default_device
from ctxext.model import attention
from ctxext.model.adapters import open_adapter
from ctxext.model.frequencies import check_realised, forget_lengths
from ctxext.model.ids import guard_ids
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.model_config import ModelConfig, parse_config
from ctxext.model.shards import cast, check_finite, tensor_reader
from ctxext.model.source import ModelSource, read_config, resolve
from ctxext.model.stock import built_config, check_same_reading, generation_config
from ctxext.model.tokenizer import load_tokenizer as load_tokenizer  # re-exported: other modules import it from here
from ctxext.model.weights import HEAD, ignored


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, with ctxext's attention; for a bundle, the base with its adapter attached.

    `model` is transformers' causal LM, or PEFT's wrapper around one. Lengths are in tokens.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    device: torch.device

    @property
    def name(self) -> str:
        """Returns the name of the source."""
        return self.source.name

    @property
    def usable_length(self) -> int:
        """Returns the number of tokens that the model supports."""
        return self.source.usable_length

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Returns the kind of each layer."""
        return self.source.kinds


def load_model(
    model: str | Path | ModelSource,
    *,
    dtype: str = "float32",
    device: str | None = None,
    nope_log_scale: float | None = None,
) -> LoadedModel:
    """Loads a source model, a conversion, a bundle or a merged directory, in eval mode.

    `device` None is CUDA where it is available, otherwise the CPU. `nope_log_scale` a: N layers multiply the query at
    position t by log(t + a) / log(a) (model/attention.py). That setting exists only in memory and is never saved.
    Raises what `resolve` raises, InputError for `nope_log_scale` where the layout has no N layer, and ModelError when a
    weight is missing or left over.
    """
    # A bundle is built from its base's weights under the bundle's config: that config has the new positions.
    source = model if isinstance(model, ModelSource) else resolve(str(model))
    where = torch.device(device or default_device())
    weights = source.base.directory if source.base else source.directory
    check_source(source)
    built: Any = build_model(weights, source.config, getattr(torch, dtype))
    if source.base:
        built = open_adapter(built, source.directory)
    if nope_log_scale is not None:
        scale_queries(built, source.kinds, nope_log_scale)
    guard_ids(causal_lm(built), source.config.shape.vocab_size, source.name)
    return LoadedModel(built.to(where).eval(), load_tokenizer(source.directory), source, where)


def check_source(source: ModelSource) -> None:
    """Raises ModelError where stock transformers reads a model's config.json (of a bundle: its base's) differently.

    A length that the user stated (`with_original_length`) is not a field of the file and is not compared.
    """
    model = source.base or source
    check_same_reading(model.directory, parse_config(read_config(model.directory)))


def build_model(
    weights: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    quantize: str = "none",
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Builds the stock class of a config, loads the checkpoint in `weights`, and checks RoPE's frequencies.

    `quantize` nf4 or int8: bitsandbytes stores the weights of the linear layers quantised, on `device`, while they are
    read; the head, embeddings and norms stay in `dtype`. Raises ModelError when a weight is missing, left over, NaN or
    infinite in `dtype`, and for a tied model whose stored head differs from its embeddings. Raises CheckFailed where
    the built model has other RoPE frequencies than the config means.
    """
    name = attention.register()
    model, info = AutoModelForCausalLM.from_pretrained(
        weights,
        config=built_config(config),
        generation_config=generation_config(weights, config),
        dtype=dtype,
        attn_implementation=name,
        local_files_only=True,
        output_loading_info=True,
        **({} if quantize == "none" else quantization(quantize, dtype, device or torch.device("cpu"))),
    )
    # transformers only warns about these. A stored head that the model does not need is checked below.
    lost = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    stray = [key for key in sorted(info["unexpected_keys"]) if not ignored(key) and key != HEAD]
    if lost or stray:
        raise ModelError(
            f"{weights}: {len(lost)} weights are missing or have another shape, {len(stray)} are left over, "
            f"first {(lost + stray)[0]}"
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # transformers leaves the two untied where the stored head differs from the embeddings.
    if config.shape.tied and head.weight is not embeddings.weight:
        raise ModelError(
            f"{weights}: config.json ties the embeddings, but {HEAD} differs from them",
            hint="set tie_word_embeddings to false in config.json if the head has its own weights",
        )
    if quantize == "none":
        _check_numbers(model, weights)
    # No padding token is used here, and torch gives the padding row no gradient. That row may be the EOS, which trains.
    embeddings.padding_idx = None
    check_realised(model, config)
    forget_lengths(model, config)
    return model


def _check_numbers(model: Any, weights: Path) -> None:
    """Raises ModelError for a NaN or infinite weight. The error says where only the cast to the dtype causes it."""
    for name, parameter in model.named_parameters():
        try:
            check_finite(parameter, f"{weights}: {name}")
        except ModelError:
            # A finite stored value became infinite in memory: `cast` raises the error that names the dtype.
            stored = tensor_reader(weights)(name)
            if stored is not None and stored.isfinite().all():
                cast(stored, parameter.dtype, f"{weights}: {name}")
            raise


def quantization(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Returns arguments of from_pretrained for nf4 (QLoRA, arXiv 2305.14314: NormalFloat, double quantisation) or int8.

    Raises EnvironmentFault where bitsandbytes is missing.
    """
    if find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            f"memory.quantize: {name} needs bitsandbytes, which is not installed",
            hint="install bitsandbytes, or train with memory.quantize=none",
        )
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**four, bnb_4bit_compute_dtype=dtype) if name == "nf4" else None
    config = config or BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": device}}


def scale_queries(model: Any, kinds: Sequence[LayerKind], a: float) -> None:
    """Sets a > 1 on the attention of every N layer. Raises InputError where the layout has no N layer."""
    if not any(kind.letter == "N" for kind in kinds):
        raise InputError(
            f"nope_log_scale {a:g}: the layout {pattern_text(kinds)} has no N layer, whose queries it would scale"
        )
    for kind, layer in zip(kinds, causal_lm(model).get_decoder().layers, strict=True):
        if kind.letter == "N":
            layer.self_attn.nope_log_scale = a


def causal_lm(model: Any) -> PreTrainedModel:
    """Returns the causal LM without PEFT's wrapper, if there is one. Its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, input_ids: Tensor, **attention_arguments: Any) -> Tensor:
    """Returns the final hidden states [B, T, E] (after the last norm) of input_ids [B, T]. It computes no logits.

    `attention_arguments` go to model/attention.py: document_starts, group_size, backend.
    """
    decoder = causal_lm(model).get_decoder()
    states: Tensor = decoder(input_ids=input_ids, use_cache=False, **attention_arguments).last_hidden_state
    return states


def output_weight(model: Any) -> Tensor:
    """Returns the head's weight [V, E]: the trainable tensor itself where the head trains."""
    head = causal_lm(model).get_output_embeddings()
    weight: Tensor = active_module(head).weight
    return weight


def active_module(module: Any) -> Any:
    """Returns the active module inside PEFT's wrapper for fully trained modules; without a wrapper, `module` itself."""
    saved = getattr(module, "modules_to_save", None)
    return saved[module.active_adapters[0]] if saved is not None else module
