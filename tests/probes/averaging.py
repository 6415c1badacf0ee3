"""A model that predicts a token by how often it stands in what is seen: by construction one layer alone looks back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, AVERAGES = 3, 1  # the layer that looks back; the others add nothing
HALF = 264


def write_averaging(place: Path, write_model: Callable[..., Path]) -> Path:
    """A Llama with unit embeddings, whose layer 1 attends evenly to all before and writes the mean of the embeddings
    there into coordinates of its own, which are all that the head reads."""
    sizes = {"hidden_size": 2 * HALF, "intermediate_size": 8, "num_hidden_layers": LAYERS, "num_key_value_heads": 4}
    write_model(place, "llama", **sizes, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))  # not its file, which is replaced
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        vocabulary = torch.arange(model.config.vocab_size)
        model.model.embed_tokens.weight[vocabulary, vocabulary] = 1.0
        model.lm_head.weight[vocabulary, HALF + vocabulary] = 0.5
        attention = model.model.layers[AVERAGES].self_attn
        attention.v_proj.weight.copy_(torch.eye(2 * HALF))
        attention.o_proj.weight[HALF + vocabulary, vocabulary] = 1.0
    model.save_pretrained(place)
    return place
