import re

import pytest

from ctxext.config import presets
from ctxext.config.presets import ModelPreset, find, model_preset, names, shipped
from ctxext.errors import InputError, SpecError

PUBLISHED_PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
}
HYBRIDS = {
    "swa128-nope": ("SN", 128),
    "swa512-nope": ("SN", 512),
    "swa2048-nope": ("SN", 2048),
    "swa128": ("SF", 128),
    "swa512": ("SF", 512),
    "swa2048": ("SF", 2048),
    "rnope-swa4096": ("SSSN", 4096),
    "full": ("F", None),
}
SHAPE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def parameters(model: ModelPreset) -> int:
    """Counted weight by weight, as the checkpoints have them."""
    s = model.shape
    assert s is not None
    q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    attention = 2 * s.hidden_size * q + 2 * s.hidden_size * kv
    biases = q + 2 * kv if s.attention_bias else 0
    qk_norms = 2 * s.head_dim if model.family == "qwen3" else 0
    layer = attention + biases + qk_norms + 3 * s.hidden_size * s.intermediate_size + 2 * s.hidden_size
    embeddings = s.vocab_size * s.hidden_size * (1 if s.tie_word_embeddings else 2)
    return embeddings + s.num_hidden_layers * layer + s.hidden_size


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_a_hub_model_is_described_as_published(name):
    model = model_preset(find("models", name))
    assert model.shape is not None and model.hub_id is not None
    assert parameters(model) == PUBLISHED_PARAMETERS[name]
    assert model.shape.num_attention_heads % model.shape.num_key_value_heads == 0
    assert model.usable_length <= model.shape.max_position_embeddings
    assert model.revision is None or re.fullmatch("[0-9a-f]{40}", model.revision)


@pytest.mark.parametrize("name", names("models"))
def test_every_model_preset_is_one(name):
    model = model_preset(find("models", name))
    assert model.family in {"llama", "mistral", "qwen2", "qwen3"}


def test_every_model_that_is_promised_is_there():
    assert set(PUBLISHED_PARAMETERS) <= set(names("models"))


def test_llama31_supports_more_than_it_was_first_trained_at():
    model = model_preset(find("models", "llama3.1-8b"))
    assert (model.original_length, model.usable_length) == (8192, 131072)
    assert model.shape is not None and model.shape.rope_parameters["original_max_position_embeddings"] == 8192


def test_the_hybrid_presets_are_these():
    found = {name: find("hybrid", name).data for name in names("hybrid")}
    assert found == {
        name: {"layer_pattern": pattern, "sliding_window": window} for name, (pattern, window) in HYBRIDS.items()
    }


@pytest.mark.parametrize("path", sorted(shipped("presets").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_that_is_shipped_is_found_by_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = find(path.parent.name, path.stem)
    assert preset.path == path


def test_the_search_goes_path_then_here_then_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("hybrid", "swa128").path == shipped("presets") / "hybrid" / "swa128.yaml"

    here = tmp_path / "presets" / "hybrid"
    here.mkdir(parents=True)
    (here / "swa128.yaml").write_text("sliding_window: 1\n")
    (here / "mine.yaml").write_text("sliding_window: 2\n")
    assert find("hybrid", "swa128").data == {"sliding_window": 1}
    assert find("hybrid", "mine").name == "mine" and "mine" in names("hybrid")

    own = tmp_path / "own.yaml"
    own.write_text("sliding_window: 3\n")
    for given in ("own.yaml", "./own.yaml", str(own)):
        assert find("hybrid", given).data == {"sliding_window": 3}


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="no hybrid preset is named 'swa128-nop'") as caught:
        find("hybrid", "swa128-nop")
    assert caught.value.hint is not None and "swa128-nope" in caught.value.hint
    assert "rnope-swa4096" in caught.value.message
    with pytest.raises(InputError, match="no model preset is named 'zzzzzz'"):
        find("models", "zzzzzz")
    with pytest.raises(InputError, match="no file nowhere/a.yaml"):
        find("models", "nowhere/a.yaml")


@pytest.mark.parametrize("name", ["", ".", "..", "../hybrid/full", "hybrid/full", ".hidden", "a b"])
def test_a_name_does_not_leave_its_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        find("models", name)


def test_a_kind_that_does_not_exist_is_our_own_fault():
    with pytest.raises(ValueError, match="no kind 'hybrids'"):
        find("hybrids", "full")


def test_what_a_model_preset_lacks_is_told(tmp_path):
    good = {"family": "llama", "original_length": 64, "usable_length": 64, "hub_id": "a/b", "shape": SHAPE}
    path = tmp_path / "m.yaml"

    def fault(**changes: object) -> str:
        data = {key: value for key, value in (good | changes).items() if value is not ...}
        with pytest.raises(SpecError) as caught:
            model_preset(presets.Preset("models", "m", path, data))
        assert str(path) in str(caught.value)
        return " ".join(caught.value.faults)

    assert "exactly one" in fault(directory="tiny")
    assert "exactly one" in fault(hub_id=...)
    assert "shape: missing" in fault(shape=...)
    assert "below original_length" in fault(usable_length=32)
    assert "revision" in fault(revision="main")
    assert "shape.head_dim: got 0" in fault(shape=SHAPE | {"head_dim": 0})
