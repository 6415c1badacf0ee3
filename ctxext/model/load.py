"""The one way a model gets into memory: positions set before it is built, every weight accounted for."""

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
from ctxext.model import attention
from ctxext.model.adapters import open_adapter
from ctxext.model.families import Config, normalise
from ctxext.model.frequencies import check_realised, forget_lengths
from ctxext.model.ids import guard_ids
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.shards import cast, check_finite, tensor_reader
from ctxext.model.source import ModelSource, read_config, resolve
from ctxext.model.stock import built_config, check_same_reading, generation_config
from ctxext.model.tokenizer import load_tokenizer as load_tokenizer  # for those who import it from here
from ctxext.model.weights import HEAD, ignored


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with ctxext's attention; for a bundle, the base with its adapter on.

    `model` is transformers' causal LM, or PEFT's wrapper around one. Lengths are tokens.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    device: torch.device

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def usable_length(self) -> int:
        return self.source.usable_length

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return self.source.kinds


def load_model(
    model: str | Path | ModelSource,
    *,
    dtype: str = "float32",
    device: str | None = None,
    nope_log_scale: float | None = None,
) -> LoadedModel:
    """Load a source model, a conversion, a bundle or a merged directory, in eval mode.

    `nope_log_scale` a: N layers multiply the query at position t by log(t + a) / log(a) (model/attention.py).
    It lives in the modules in memory: nothing that is saved has it. Raises what `resolve` raises, InputError where
    there is no such layer, and ModelError when a weight is missing or left over.
    """
    source = model if isinstance(model, ModelSource) else resolve(str(model))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights = source.base.directory if source.base else source.directory
    check_source(source)
    built: Any = build_model(weights, source.config, getattr(torch, dtype))
    if source.base:
        built = open_adapter(built, source.directory)
    if nope_log_scale is not None:
        scale_queries(built, source.kinds, nope_log_scale)
    guard_ids(causal_lm(built), source.config["vocab_size"], source.name)
    return LoadedModel(built.to(where).eval(), load_tokenizer(source.directory), source, where)


def check_source(source: ModelSource) -> None:
    """Raises ModelError where stock transformers reads a model's config.json (of a bundle: its base's) differently.

    A length that the user stated (`with_original_length`) is no field of the file and is not compared.
    """
    model = source.base or source
    check_same_reading(model.directory, normalise(read_config(model.directory)))


def build_model(
    weights: Path, config: Config, dtype: torch.dtype, *, quantize: str = "none", device: torch.device | None = None
) -> PreTrainedModel:
    """The stock class of a normalised config, filled from the checkpoint in `weights`, RoPE checked as realised.

    `quantize` nf4 or int8 stores the linear layers' weights through bitsandbytes as they are read, on `device`; the
    head, embeddings and norms stay in `dtype`. Raises ModelError when a weight is missing, left over, NaN or infinite
    in `dtype`, and for a tied model whose stored head is another matrix than its embeddings.
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
    lost = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    stray = [key for key in sorted(info["unexpected_keys"]) if not ignored(key) and key != HEAD]
    if lost or stray:
        raise ModelError(
            f"{weights}: {len(lost)} weights missing or of another shape, {len(stray)} left over, "
            f"first {(lost + stray)[0]}"
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if config["tie_word_embeddings"] and head.weight is not embeddings.weight:  # transformers leaves such a pair untied
        raise ModelError(
            f"{weights}: config.json says tied embeddings, but {HEAD} differs from them",
            hint="set tie_word_embeddings to false in config.json if the head is its own",
        )
    if quantize == "none":
        _check_numbers(model, weights)
    embeddings.padding_idx = None  # nothing is padded here, and the row of a token that is also the EOS has to train
    check_realised(model, config)
    forget_lengths(model, config)
    return model


def _check_numbers(model: Any, weights: Path) -> None:
    """Raises ModelError for a weight that is NaN or infinite, and says where only the dtype in memory makes it so."""
    for name, parameter in model.named_parameters():
        try:
            check_finite(parameter, f"{weights}: {name}")
        except ModelError:
            stored = tensor_reader(weights)(name)
            if stored is not None and stored.isfinite().all():
                cast(stored, parameter.dtype, f"{weights}: {name}")
            raise


def quantization(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained for nf4 (QLoRA, arXiv 2305.14314: NormalFloat, double quantisation) or int8.

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
    """Tell the attention of every N layer its a > 1. Raises InputError where the layout has none."""
    if not any(kind.letter == "N" for kind in kinds):
        raise InputError(
            f"nope_log_scale {a:g}: the layout {pattern_text(kinds)} has no N layer whose queries to scale"
        )
    for kind, layer in zip(kinds, causal_lm(model).get_decoder().layers, strict=True):
        if kind.letter == "N":
            layer.self_attn.nope_log_scale = a


def causal_lm(model: Any) -> PreTrainedModel:
    """The causal LM itself, with PEFT's wrapper taken off if there is one (its layers stay adapted)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, input_ids: Tensor, **attention_arguments: Any) -> Tensor:
    """The final hidden states [B, T, E] (after the last norm) of input_ids [B, T]; no logits are made.

    `attention_arguments` go to model/attention.py: document_starts, group_size, backend.
    """
    decoder = causal_lm(model).get_decoder()
    states: Tensor = decoder(input_ids=input_ids, use_cache=False, **attention_arguments).last_hidden_state
    return states


def output_weight(model: Any) -> Tensor:
    """The head's weight [V, E], the very tensor that trains where it trains."""
    head = causal_lm(model).get_output_embeddings()
    weight: Tensor = active_module(head).weight
    return weight


def active_module(module: Any) -> Any:
    """The module in use behind PEFT's wrapper for modules trained whole; the module itself where there is none."""
    saved = getattr(module, "modules_to_save", None)
    return saved[module.active_adapters[0]] if saved is not None else module
