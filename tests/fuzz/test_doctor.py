"""Doctor on directories that are damaged at random: findings, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from ctxext.doctor.finding import Finding
from ctxext.doctor.model import model as examine
from ctxext.model.convert import plan_conversion, run_conversion

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
         "ctxext.json", "chat_template.jinja", "adapter_config.json", "model.safetensors.index.json")  # fmt: skip
FIELDS = {
    "config.json": ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "dtype",
                    "rope_theta", "rope_scaling", "eos_token_id", "tie_word_embeddings", "layer_types", "model_type",
                    "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "torch_dtype"),
    "generation_config.json": ("eos_token_id", "bos_token_id", "pad_token_id", "temperature"),
    "tokenizer.json": ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"),
    "tokenizer_config.json": ("chat_template", "eos_token", "tokenizer_class", "added_tokens_decoder",
                              "extra_special_tokens"),
    "ctxext.json": ("kind", "facts", "parents", "spec", "created", "versions"),
}  # fmt: skip
CONTENTS = st.sampled_from([b"", b"{", b"{}", b"[]", b"null", b"\xff\xfe", b"{{ x", b"9" * 5000, b"{% generation %}"])


@pytest.fixture(scope="module", params=["llama", "SN"])
def healthy(request: Any, write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("healthy")
    write_model(place / "source")
    if request.param == "llama":
        return place / "source"
    run_conversion(plan_conversion(str(place / "source"), "SN", sliding_window=8, out=place / "out"), gate=False)
    return place / "out"


@pytest.fixture(scope="module")
def damage(anything: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[str, str, Any]]]:
    """A few of: a file removed, replaced, cut; a field of a JSON file changed or dropped."""
    values = (
        st.sampled_from([0, 1, 3, 7, None, "x", [], {}, [0, 1], 1e30, {"rope_type": "yarn", "factor": 2.0}]) | anything
    )
    field = st.sampled_from([(file, name) for file, names in FIELDS.items() for name in names])
    return st.lists(
        st.one_of(
            st.tuples(st.sampled_from(FILES), st.just("remove"), st.none()),
            st.tuples(st.sampled_from(FILES), st.just("write"), CONTENTS),
            st.tuples(st.sampled_from(FILES), st.just("cut"), st.integers(0, 3000)),
            st.tuples(field, st.just("drop"), st.none()),
            st.tuples(field, st.just("set"), values),
        ),
        min_size=1,
        max_size=3,
    )


def apply(path: Path, where: Any, what: str, value: Any) -> None:
    name, field = where if isinstance(where, tuple) else (where, None)
    file = path / name
    if what == "write":
        file.write_bytes(value)
    if not file.is_file():
        return
    if what == "remove":
        file.unlink()
    if what == "cut":
        file.write_bytes(file.read_bytes()[:value])
    if field is not None:
        try:
            settings = json.loads(file.read_bytes())
        except ValueError:
            return
        if isinstance(settings, dict):
            kept = {k: v for k, v in settings.items() if k != field}
            file.write_text(json.dumps(kept if what == "drop" else kept | {field: value}))


def test_every_damaged_directory_gives_findings(
    fuzz: Any, survives: Any, healthy: Path, damage: Any, tmp_path: Path
) -> None:
    path, ill = tmp_path / "model", 0

    def check(drawn: list[tuple[Any, str, Any]]) -> None:
        nonlocal ill
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(healthy, path)
        for part in drawn:
            apply(path, *part)
        found = survives(lambda: examine(str(path)))
        assert isinstance(found, list) and all(isinstance(finding, Finding) for finding in found), found
        assert all(finding.found.strip() for finding in found)
        ill += any(finding.status == "failure" for finding in found)

    fuzz(damage, check, quick=25, slow=300)
    assert ill > 5
