"""Compares how stock transformers and this package read a model directory.

The comparison runs wherever a directory is opened. A field that the two read differently raises an error that names it,
before any computation uses it. transformers reads the unchanged files, without remote code.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

from ctxext.errors import ModelError
from ctxext.model.model_config import ModelConfig

# fields of a config class that do not reach the logits of a causal LM, in any supported model_type
WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "transformers_version",
        "dtype",  # of the weights in memory: every caller passes its own
        "id2label",
        "label2id",
        "problem_type",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "pretraining_tp",
        "use_cache",
        "use_sliding_window",  # no effect of its own: layer_types and the window, which follow from it, are compared
        "max_window_layers",
        "no_rope_layer_interval",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "attention_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "norm_topk_prob",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
    }
)


def stock_config(path: Path) -> Any:
    """Returns config.json as stock transformers reads it. Raises ModelError where transformers cannot read it."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config.standardize_rope_params()  # transformers' formulas do this before they read a length at the top level
        return config
    except Exception as error:  # the checks of a config class raise many types
        raise ModelError(f"{path / 'config.json'}: transformers cannot read it ({_short(error)})") from error


def built_config(config: ModelConfig) -> Any:
    """Returns the stock class's config for a config. Raises ModelError where the class rejects it."""
    try:
        built = CONFIG_MAPPING[config.family.name].from_dict(deepcopy(config.fields))  # it may change nested objects
        built.standardize_rope_params()
        return built
    except Exception as error:
        raise ModelError(f"config.json: transformers does not accept it ({_short(error)})") from error


def check_same_reading(path: Path, config: ModelConfig) -> None:
    """Raises ModelError for the fields of `path`'s config.json that transformers and this package read differently.

    `config` is what this package parsed from the same file.
    """
    theirs, ours = stock_config(path), built_config(config)
    differing = [name for name in compared_fields(ours) if _plain(theirs, name) != _plain(ours, name)]
    if differing:
        shown = "; ".join(f"{name}: {_plain(theirs, name)!r} there, {_plain(ours, name)!r} here" for name in differing)
        raise ModelError(
            f"{path / 'config.json'}: transformers reads other values than ctxext ({shown})",
            hint="write these fields into config.json, without null values",
        )


def compared_fields(config: Any) -> Iterable[str]:
    """Returns the declared fields of a config that can change the logits."""
    return sorted({field.name for field in fields(config)} - WITHOUT_EFFECT)


def _plain(config: Any, name: str) -> Any:
    """Returns a field's value; of RoPE parameters only the entries that have an effect."""
    value = getattr(config, name, None)
    if name == "rope_parameters" and isinstance(value, dict):
        return _plain_rope(value)
    return value


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    nested = {name: _plain_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if nested.get("rope_type") != "proportional":
        nested.pop("partial_rotary_factor", None)
    return {name: value for name, value in nested.items() if name != "type" and value is not None}


def generation_config(directory: Path, config: ModelConfig) -> GenerationConfig:
    """Returns a generation config with the tokens that end a text.

    They come from generation_config.json, or from config.json where transformers cannot read that file. The other
    fields are not used, because this package has its own sampling. A file with any content is accepted.
    """
    try:
        given = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    except Exception:  # no such file, not JSON, or fields that transformers' own checks reject
        given = config.fields.get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    ids = [token for token in listed if isinstance(token, int) and not isinstance(token, bool)]
    return GenerationConfig(eos_token_id=ids or None)


def drop_generation_config(directory: Path) -> str | None:
    """Removes a generation_config.json that stops transformers from opening the model.

    Returns the reason, or None where the file is kept or missing. A file that is not JSON is kept: transformers treats
    it as missing.
    """
    try:
        GenerationConfig.from_pretrained(directory, local_files_only=True)
    except OSError:  # the file is missing, or it is not JSON
        return None
    except Exception as error:
        (directory / "generation_config.json").unlink()
        return f"generation_config.json was left out: transformers cannot read it ({_short(error)})"
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
