"""Every field of the config classes is read, or known to change nothing: a new release with a new field fails here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ctxext.errors import ModelError
from ctxext.model.config_fields import EFFECTS, KEPT, UNREAD
from ctxext.model.families import FAMILIES
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import find_hybrid, layer_kinds
from ctxext.model.model_config import ModelConfig, parse_config
from ctxext.model.source import read_config
from ctxext.model.stock import WITHOUT_EFFECT, built_config

IDS = torch.randint(2, 260, (1, 24), generator=torch.Generator().manual_seed(0))
SOURCE = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "llama",
    "mellum": "qwen3",
    "granite_swa": "llama",
}
OTHER: dict[str, Any] = {  # another value for a field that is said to change nothing
    "architectures": ["Nothing"],
    "transformers_version": "6.0.0",
    "dtype": "bfloat16",
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0},
    "problem_type": "regression",
    "output_hidden_states": True,
    "chunk_size_feed_forward": 3,
    "pretraining_tp": 2,
    "use_cache": False,
    "bos_token_id": 9,
    "eos_token_id": [9, 10],
    "pad_token_id": 11,
    "initializer_range": 0.5,
    "attention_dropout": 0.5,
    "router_aux_loss_coef": 0.5,
    "norm_topk_prob": False,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 7,
    "no_rope_layer_interval": 2,
    "mtp_layer_types": ["full_attention"],
    "mtp_mlp_layer_types": ["dense"],
}
FIXED = {  # with a test elsewhere, or no other value that a decoder of dense layers may have
    "is_encoder_decoder",
    "return_dict",  # false is refused (EFFECTS)
    "use_sliding_window",
    "max_window_layers",
    "output_router_logits",
    "num_experts",
    "num_local_experts",
    "num_mtp_layers",
    "num_nextn_predict_layers",
}


def normal(family: str, model_dir: Any) -> ModelConfig:
    """The config of a family; conversions for those that are no sources."""
    config = parse_config(read_config(model_dir(SOURCE[family])))
    if FAMILIES[SOURCE[family]].name == family:
        return config
    kinds = layer_kinds(find_hybrid("SN", 8), config.shape.num_layers)
    return parse_config(hybrid_config(config, kinds, family).fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_read_or_changes_nothing(family: str) -> None:
    declared = {field.name for field in fields(CONFIG_MAPPING[family])}
    read = KEPT - set(UNREAD.get(family, ()))
    assert declared <= read | WITHOUT_EFFECT, declared - read - WITHOUT_EFFECT
    assert not declared & EFFECTS.keys() - {"is_encoder_decoder", "return_dict"}


def test_what_is_said_to_change_nothing_is_a_field_of_some_class() -> None:
    every = {field.name for family in FAMILIES for field in fields(CONFIG_MAPPING[family])}
    aliases = {"num_local_experts", "num_nextn_predict_layers"}
    # Fields of the classes of transformers 5.23 that those of 5.17 lack.
    aliases |= {"mtp_layer_types", "mtp_mlp_layer_types", "num_mtp_layers"}
    assert every | aliases >= WITHOUT_EFFECT
    assert OTHER.keys() | FIXED == WITHOUT_EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_to_change_nothing_changes_no_logit(family: str, model_dir: Any) -> None:
    config = normal(family, model_dir)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(built_config(config), attn_implementation="eager").eval()
    weights = model.state_dict()
    with torch.no_grad():
        truth = model(IDS, use_cache=False).logits
    declared = {field.name for field in fields(CONFIG_MAPPING[family])} & OTHER.keys()
    for name in sorted(declared - {"dtype"}):
        other = CONFIG_MAPPING[family].from_dict(built_config(config).to_dict() | {name: OTHER[name]})
        changed = AutoModelForCausalLM.from_config(other, attn_implementation="eager", dtype=torch.float32).eval()
        changed.load_state_dict(weights)
        with torch.no_grad():
            logits = changed(IDS, use_cache=False).logits
        assert torch.equal(logits, truth), name


@pytest.mark.parametrize("name", EFFECTS)
def test_fields_that_no_class_declares_are_refused_where_they_change_something(name: str, model_dir: Any) -> None:
    config = read_config(model_dir("llama"))
    for idle in EFFECTS[name][0]:
        parse_config(config | {name: idle})
    other = {"partial_rotary_factor": 0.5, "is_causal": False, "is_encoder_decoder": True, "return_dict": False}.get(
        name, {"a": 1}
    )
    with pytest.raises(ModelError, match=name):
        parse_config(config | {name: other})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_reads_the_same_in_every_process(family: str, model_dir: Any) -> None:
    """Its text goes into hashes of caches: an address of a function would differ each time."""
    assert " at 0x" not in repr(normal(family, model_dir))
