"""What is written is also read by transformers 4: its two fields of RoPE beside the one of transformers 5.

The logits are compared in a process of transformers 4.57.3, where CTXEXT_TRANSFORMERS_4 names a directory made by
`pip install --target DIR --no-deps transformers==4.57.3 'huggingface-hub<1.0' 'tokenizers>=0.22,<=0.23'`; torch is this
environment's. Without it, its formulas are applied by hand to the two fields.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ctxext.export.export_card import write_card
from ctxext.export.matrix import verdict
from ctxext.model.card import runtime_note
from ctxext.model.convert import plan_conversion, run_conversion, write_config
from ctxext.model.frequencies import inverse_frequencies
from ctxext.model.model_config import parse_config
from ctxext.model.rope_fields import unlike_transformers_4
from ctxext.model.source import read_config, resolve

THETA = {"rope_theta": 500.0}
ORIGINAL = {"original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 2.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, **THETA},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, **THETA},
    "yarn, all stated": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5, "beta_fast": 16.0,
                         "beta_slow": 2.0, **ORIGINAL, **THETA},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL,
               **THETA},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], **ORIGINAL,
                 **THETA},
}  # fmt: skip
CODE = (
    "import sys, torch, transformers\n"
    "from transformers import AutoModelForCausalLM\n"
    "assert transformers.__version__.startswith('4.57'), transformers.__version__\n"
    "saved = torch.load(sys.argv[1])\n"
    "for directory, truth in saved['truth'].items():\n"
    "    how = {'dtype': torch.float32, 'attn_implementation': 'eager'}\n"
    "    model = AutoModelForCausalLM.from_pretrained(directory, **how).eval()\n"
    "    with torch.no_grad(): logits = model(saved['ids'], use_cache=False).logits\n"
    "    print((logits - truth).abs().max().item(), directory)\n"
)


def by_the_fields_of_4(config: dict[str, Any]) -> tuple[list[float], float]:
    """Frequencies and their factor as 4.57.3 makes them from `rope_theta` and `rope_scaling`."""
    rope = {"rope_type": "default", **(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}
    if rope["rope_type"] == "longrope":  # read beside the parameters only, and the factor is their ratio
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        rope["factor"] = config["max_position_embeddings"] / config["original_max_position_embeddings"]
    return inverse_frequencies(rope, config["head_dim"], config["max_position_embeddings"])


def outputs(family: str, rope: str, write_model: Any, place: Path) -> list[Path]:
    """A conversion with windows and NoPE layers, and the model with its config written as `merge` writes it."""
    source = write_model(place / "source", family, rope_parameters=dict(ROPES[rope]))
    run_conversion(plan_conversion(str(source), "SN", sliding_window=8, out=place / "converted"), gate=False)
    write_config(source, parse_config(read_config(source)))
    return [source, place / "converted"]


@pytest.mark.parametrize("rope", ROPES)
def test_the_fields_of_4_say_what_those_of_5_say(rope: str, write_model: Any, tmp_path: Path) -> None:
    for path in outputs("llama", rope, write_model, tmp_path):
        config, written = resolve(str(path)).config, json.loads((path / "config.json").read_text())
        meant = inverse_frequencies(config.rope, config.shape.head_dim, config.max_position_embeddings)
        assert by_the_fields_of_4(written) == meant
        assert (written["rope_scaling"] is None) == (rope == "default")
        assert unlike_transformers_4(config.fields) is None
        stock = AutoModelForCausalLM.from_pretrained(path)
        realised = stock.model.rotary_emb.inv_freq.tolist()
        assert realised == pytest.approx(meant[0], rel=1e-5)


def test_what_4_reads_otherwise_is_said(write_model: Any, tmp_path: Path) -> None:
    longrope = {"rope_parameters": ROPES["longrope"] | {"factor": 3.0}, "max_position_embeddings": 64}
    assert "longrope" in str(unlike_transformers_4(longrope))
    assert "does not compute the same" in runtime_note(longrope)
    longrope["rope_parameters"] |= {"attention_factor": 1.2}
    assert unlike_transformers_4(longrope) is None
    write_model(tmp_path / "qwen3", "qwen3")
    run_conversion(plan_conversion(str(tmp_path / "qwen3"), "SN", sliding_window=8, out=tmp_path / "out"), gate=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "transformers 4 does not compute the same from it: it has no mellum class" in card
    assert "rope_scaling" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_config_and_cards_name_versions(write_model: Any, tmp_path: Path) -> None:
    import transformers

    _, out = outputs("llama", "yarn", write_model, tmp_path)
    assert json.loads((out / "config.json").read_text())["transformers_version"] == transformers.__version__
    needs = rf"needs transformers 5\.\d+ or newer \(written with {re.escape(transformers.__version__)}\)"
    model = resolve(str(out))
    for card in ((out / "README.md").read_text(), write_card(model, verdict("hf", model.config), ())):
        assert re.search(needs, card) and "4.57.3" in card and "were not checked" in card


@pytest.mark.slow
def test_logits_under_transformers_4(write_model: Any, tmp_path: Path) -> None:
    """YaRN was gone, and theta was the class's default, without a word."""
    place = os.environ.get("CTXEXT_TRANSFORMERS_4", "")
    if not Path(place, "transformers").is_dir():
        pytest.skip("CTXEXT_TRANSFORMERS_4 names no directory with transformers 4.57.3 (see the top of this file)")
    ids = torch.randint(2, 260, (1, 60), generator=torch.Generator().manual_seed(0))
    truth: dict[str, torch.Tensor] = {}
    drawn = [("llama", rope) for rope in ROPES] + [("mistral", "default"), ("mistral", "yarn"), ("qwen2", "yarn")]
    for family, rope in drawn:
        for path in outputs(family, rope, write_model, tmp_path / f"{family} {rope}"):
            stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
            with torch.no_grad():
                truth[str(path)] = stock(ids, use_cache=False).logits
    torch.save({"ids": ids, "truth": truth}, tmp_path / "truth.pt")
    environment = os.environ | {"PYTHONPATH": place}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "truth.pt")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    differences = {line.split(" ", 1)[1]: float(line.split()[0]) for line in done.stdout.splitlines()}
    assert len(differences) == 2 * len(drawn)
    assert max(differences.values()) < 1e-3, differences
