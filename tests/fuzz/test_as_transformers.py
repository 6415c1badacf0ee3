"""What a config.json says of layers and positions, drawn at random: refused, or read as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ctxext.config import manifest
from ctxext.errors import CtxextError
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model

FULL, SLIDING = "full_attention", "sliding_attention"
LAYERS: dict[str, list[Any]] = {
    "sliding_window": [None, 1, 8, 1024],
    "use_sliding_window": [True, False, None],
    "max_window_layers": [0, 1, 64],
    "layer_types": [None, [FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2],
    "no_rope_layers": [None, [0] * 4, [1] * 4, [0, 1, 0, 1]],
    "no_rope_layer_interval": [0, 1, 2],
    "model_type": ["llama", "mistral", "smollm3"],
    "partial_rotary_factor": [0.5, 1.0],
    "max_position_embeddings": [16, 256],
    "rope_theta": [500.0],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    ],
}


@pytest.mark.parametrize("base", ["llama-SN", "mistral", "qwen2", "qwen3", "qwen3-SN"])
def test_what_opens_computes_what_transformers_computes(base: str, fuzz: Any, write_model: Any, tmp_path: Path) -> None:
    """A Mistral with layer_types, which transformers opens as a Ministral, was read with windows everywhere, and
    windows that use_sliding_window denied were none here and some there."""
    model, opened = write_model(tmp_path / "source", base.removesuffix("-SN")), 0
    if base.endswith("-SN"):
        model = tmp_path / "converted"
        run_conversion(plan_conversion(str(tmp_path / "source"), "SN", sliding_window=8, out=model), gate=False)
        (model / manifest.FILE_NAME).unlink()
    good = json.loads((model / "config.json").read_text())
    ids = torch.randint(2, 260, (1, 100), generator=torch.Generator().manual_seed(0))

    def check(changes: dict[str, Any]) -> None:
        nonlocal opened
        plain = {name: value for name, value in good.items() if name != "layer_types" or "model_type" not in changes}
        (model / "config.json").write_text(json.dumps(plain | changes))
        try:
            loaded = load_model(str(model), device="cpu")
        except CtxextError:
            return
        stock = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(ids).logits, stock(ids, use_cache=False).logits, atol=1e-3, rtol=0)
        opened += 1

    names = [name for name in LAYERS if name != "model_type" or base == "llama-SN"]
    pairs = [(name, value) for name in names for value in LAYERS[name]]
    fuzz(st.lists(st.sampled_from(pairs), max_size=4).map(dict), check, quick=50, slow=600)
    assert opened > 10
