"""Model directories that lie: config.json, headers, indexes, manifests, adapters, tokenizers. Never a traceback."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctxext.config import manifest
from ctxext.errors import CtxextError, ModelError
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.families import SOURCES
from ctxext.model.frequencies import inverse_frequencies
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import find_hybrid, layer_kinds
from ctxext.model.load import load_model, load_tokenizer
from ctxext.model.positions import Auto, Dynamic, Linear, Ntk, Yarn, plan_positions
from ctxext.model.source import HUB_ID, ModelSource, original_config, resolve
from ctxext.model.weights import INDEX, SINGLE, TensorInfo, read_header, read_tensors

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "mellum")
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "max_window_layers",
    "no_rope_layer_interval",
)  # fmt: skip
OTHERS = (
    "model_type", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta",
    "rope_scaling", "rope_parameters", "layer_types", "no_rope_layers", "mlp_layer_types", "use_sliding_window",
    "dtype", "torch_dtype", "attention_dropout", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
    "num_labels", "id2label", "quantization_config", "auto_map", "architectures", "original_rope_theta",
    "transformers_version", "_attn_implementation", "attn_implementation", "use_cache", "pretraining_tp",
    "name_or_path", "chunk_size_feed_forward", "to_dict", "attribute_map", "use_return_dict", "validate", "__class__",
)  # fmt: skip
ROPE = ("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
        "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor", "partial_rotary_factor",
        "full_attention", "sliding_attention")  # fmt: skip
TYPES = st.lists(st.sampled_from(["full_attention", "sliding_attention", "x", 1, None]), max_size=6)
SCALINGS = (Auto(), Linear(), Ntk(), Dynamic(), Yarn(), Linear(factor=1e300))


@pytest.fixture(scope="module")
def configs(anything: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Changes to a config.json: absurd values at known keys, and some that are right, or nearly so."""
    types = st.sampled_from(
        ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "x", 3, None]
    )
    lists = st.lists(st.sampled_from([1, 0.5, 0, None, "x"]), max_size=5) | st.just([1.0] * 4)
    likely = st.sampled_from([1, 2.0, 4, 8, 10000.0, 64, 1e-6, 0.5]) | lists
    flat = st.dictionaries(st.sampled_from(ROPE), likely | anything, max_size=5)
    whole = st.dictionaries(st.sampled_from(ROPE), likely, max_size=3).map(
        {"rope_theta": 1e4, "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4,
         "short_factor": [1.0] * 4, "long_factor": [2] * 4}.__or__)  # fmt: skip
    rope = st.builds(lambda kind, rest: {"rope_type": kind} | rest, types, flat | whole) | flat
    nested = st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), rope | anything, max_size=2)
    numbers = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 1024, 9999, 10000, 10001, True, None]) | st.integers(0, 70)
    sizes = st.dictionaries(st.sampled_from(SIZES), numbers | anything, max_size=2)
    right = st.sampled_from(
        [True, False, None, 0, 0.0, 1e-5, 0.02, 3, [1, 2], "float32", "bfloat16", ["Llama"], "silu"]
    )
    others = st.dictionaries(st.sampled_from(OTHERS), right | anything, max_size=2)
    shaped = st.fixed_dictionaries(
        {},
        optional={
            "rope_parameters": rope | nested,
            "rope_scaling": rope,
            "layer_types": TYPES,
            "mlp_layer_types": st.lists(st.sampled_from(["dense", "sparse", [], 1]), max_size=5),
            "no_rope_layers": st.lists(st.sampled_from([0, 1, "x", None, 2]), max_size=6),
            "model_type": st.sampled_from(FAMILIES),
        },
    )
    return st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, sizes, others, shaped)


def described(path: Path) -> ModelSource:
    """Everything that is said of a model before torch is imported."""
    source = resolve(str(path), weights=False)
    assert source.kinds and source.shape == source.config.shape
    assert len(source.config.tensors) >= 2 + 9 * len(source.kinds)
    assert isinstance(source.usable_length, int) and source.usable_length > 0
    original_config(source)
    return source


def planned(source: ModelSource) -> None:
    if rope := source.config.rope:
        angles, scale = inverse_frequencies(
            rope, source.config.shape.head_dim, source.config.max_position_embeddings, 99
        )
        assert all(map(math.isfinite, angles)) and math.isfinite(scale)
    layers = source.config.shape.num_layers
    if source.config.family.name in SOURCES:
        hybrid_config(source.config, layer_kinds(find_hybrid("SN", 8), layers))


def positions(source: ModelSource, scaling: Any) -> Any:
    lengths = {"original_length": source.original_length, "usable_length": source.usable_length}
    return plan_positions(source.config, scaling, 4096, **lengths)


@pytest.fixture(params=["llama", "qwen2", "qwen3", "SN", "qwen3-SN"])
def model(request: Any, write_model: Any, tmp_path: Path) -> Path:
    """A model to break."""
    family = request.param.removesuffix("-SN") if request.param != "SN" else "llama"
    write_model(tmp_path / "source", family)
    if "SN" not in request.param:
        return tmp_path / "source"
    out = tmp_path / "converted"
    run_conversion(plan_conversion(str(tmp_path / "source"), "SN", sliding_window=8, out=out), gate=False)
    (out / manifest.FILE_NAME).unlink()
    return out


def everything_of(path: Path, survives: Any) -> None:
    """All that is done with a config.json before weights are looked at."""
    source = survives(lambda: described(path))
    if isinstance(source, CtxextError):
        return
    survives(lambda: planned(source))
    for scaling in SCALINGS:
        plan = survives(lambda scaling=scaling: positions(source, scaling))
        if not isinstance(plan, CtxextError):
            survives(lambda plan=plan: plan.apply(source.config).rope)
    survives(lambda: plan_conversion(str(path), "SN", sliding_window=8))


def test_configs(fuzz: Any, survives: Any, configs: Any, model: Path) -> None:
    good = json.loads((model / "config.json").read_text())

    def check(changes: dict[str, Any]) -> None:
        (model / "config.json").write_text(json.dumps(good | changes))
        everything_of(model, survives)

    fuzz(configs, check, quick=30, slow=600)


@pytest.mark.parametrize("field", SIZES)
def test_no_number_becomes_a_list_that_fills_the_memory(field: str, survives: Any, model: Path) -> None:
    """The largest number that a field may hold. A head_dim of a billion was a list of half as many frequencies."""
    good = json.loads((model / "config.json").read_text())
    for largest in (2**31, 2**30, 10_000):
        (model / "config.json").write_text(json.dumps(good | {field: largest}))
        everything_of(model, survives)


def test_models_that_open_are_whole(fuzz: Any, survives: Any, configs: Any, model: Path) -> None:
    """What passes the files' checks goes on to transformers: it opens, or is refused in our words."""
    good = json.loads((model / "config.json").read_text())

    def check(changes: dict[str, Any]) -> None:
        (model / "config.json").write_text(json.dumps(good | changes))
        loaded = survives(lambda: load_model(str(model), device="cpu"))
        if not isinstance(loaded, CtxextError):
            survives(lambda: loaded.model(torch.tensor([[1, 2, 3]])))

    fuzz(configs, check, quick=6, slow=120)


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_headers_that_lie(fuzz: Any, survives: Any, anything: Any, write_model: Any, tmp_path: Path) -> None:
    """safetensors files cut, padded, with lengths, types, shapes and offsets that are not so; nothing is converted."""
    model = write_model(tmp_path / "model")
    path, out = model / SINGLE, tmp_path / "out"
    good, data = header(path)
    names = st.sampled_from([*good, "stranger", "__metadata__"])
    numbers = st.sampled_from([0, -1, 4, 2**31, 2**62, 2**63, 2**64, 10**30, True, 1.0, "1", None])
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "F64", "I64", "F4", "", None, []]),
            "shape": st.lists(numbers, max_size=4) | anything,
            "data_offsets": st.lists(numbers, max_size=3) | anything,
            "more": anything,
        },
    )
    lengths = st.none() | st.sampled_from([0, 1, 8, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 5000)
    cut = st.none() | st.integers(0, 40) | st.integers(0, len(data))

    def check(drawn: Any) -> None:
        changes, length, cut = drawn
        entries = {
            name: (good.get(name, {}) | change if isinstance(change, dict) else change)
            for name, change in changes.items()
        }
        text = json.dumps(good | entries).encode()
        raw = struct.pack("<Q", len(text) if length is None else length) + text + data
        path.write_bytes(raw if cut is None else raw[: 8 + cut])
        found = survives(lambda: read_header(path))
        if not isinstance(found, CtxextError):
            assert all(isinstance(info, TensorInfo) for info in found.values())
        whole = survives(lambda: resolve(str(model)))
        if not isinstance(whole, CtxextError):
            assert cut is None
            survives(lambda: run_conversion(plan_conversion(str(model), "full", out=out), gate=False))
            shutil.rmtree(out, ignore_errors=True)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]

    fuzz(st.tuples(st.dictionaries(names, entry | anything, max_size=2), lengths, cut), check, quick=40, slow=1200)


def test_indexes_that_lie(fuzz: Any, survives: Any, anything: Any, write_model: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shard="20KB")
    path = model / INDEX
    good = json.loads(path.read_text())
    shards = sorted(set(good["weight_map"].values()))
    assert len(shards) > 1
    files = st.sampled_from([*shards, "../model/" + shards[0], "/etc/passwd", "absent.safetensors", "config.json", ""])
    tensors = st.sampled_from([*good["weight_map"], "stranger"])
    maps = st.dictionaries(tensors, files | anything, max_size=3)

    def check(drawn: Any) -> None:
        whole, changes = drawn
        data = {"weight_map": good["weight_map"] | changes} if whole is None else whole
        path.write_text(json.dumps(data) if not isinstance(data, str) else data)
        found = survives(lambda: read_tensors(model))
        assert isinstance(found, CtxextError | dict)
        survives(lambda: resolve(str(model)))
        survives(lambda: plan_conversion(str(model), "full"))

    fuzz(st.tuples(st.none() | anything | st.just("["), maps), check, quick=40, slow=1200)


def test_manifests_of_models(fuzz: Any, survives: Any, anything: Any, write_model: Any, tmp_path: Path) -> None:
    """ctxext.json beside a model: lengths, names and layouts of any kind, a base that is not there or is itself."""
    model = write_model(tmp_path / "model")
    manifest.write(model, manifest.new("conversion", spec={}, parents={}, facts={}))
    path, good = model / manifest.FILE_NAME, json.loads((model / manifest.FILE_NAME).read_text())
    adapter = model / "adapter_config.json"
    names = ["original_length", "usable_length", "name", "source_layout", "source_rope_parameters", "trained_tensors"]
    layouts = st.fixed_dictionaries(
        {}, optional={"layers": st.sampled_from(["SNSN", "x", "", "S" * 99]) | anything, "sliding_window": anything}
    )
    facts = st.dictionaries(st.sampled_from(names), layouts | anything | st.integers(1, 99), max_size=3)
    places = anything | st.sampled_from([str(model), str(tmp_path), "absent"])
    base = st.fixed_dictionaries({}, optional={"path": places, "weights": st.just({}) | anything})
    parents = st.fixed_dictionaries({}, optional={"base": base, "x": base})

    def check(drawn: Any) -> None:
        kind, facts, parents, adapted = drawn
        path.write_text(json.dumps(good | {"kind": kind, "facts": facts, "parents": parents}))
        adapter.unlink(missing_ok=True)
        if adapted is not None:
            adapter.write_text(adapted)
        source = survives(lambda: resolve(str(model)))
        if not isinstance(source, CtxextError):
            survives(lambda: described(model))
            survives(lambda: plan_conversion(str(model), "SN", sliding_window=8))

    kinds = st.sampled_from(["conversion", "finetune", "merge", "model", "x"])
    fuzz(st.tuples(kinds, facts, parents, st.none() | st.sampled_from(["{}", "[", ""])), check, quick=40, slow=800)


def test_models_by_name(fuzz: Any, survives: Any, write_model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "loop").symlink_to("loop")
    bits = ["..", ".", "/", "\\", "~", "model", "loop", "tiny", "config.json", "\0", " ", "é", "x" * 300, ":", "-"]

    def check(name: str) -> None:
        if not HUB_ID.fullmatch(name):  # those go to the network
            assert isinstance(survives(lambda: resolve(name)), CtxextError | ModelSource)

    fuzz(st.lists(st.sampled_from(bits), max_size=5).map("".join) | st.text(max_size=9), check, quick=60, slow=1500)


def test_sizes_that_no_config_has(survives: Any, write_model: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = model / "config.json"
    good = json.loads(config.read_text())
    for raw in (
        b" " * 100_000_000,
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b"\xff",
        b"",
        b"9" * 10_000,
        b"[]",
        b"null",
    ):
        config.write_bytes(raw)
        assert isinstance(survives(lambda: resolve(str(model))), ModelError), raw[:10]
    for name, value in (("num_hidden_layers", 10**9), ("vocab_size", 10**18), ("num_labels", 10**9)):
        config.write_text(json.dumps(good | {name: value}))
        assert isinstance(survives(lambda: resolve(str(model))), ModelError), name
    config.write_text(json.dumps(good))
    (model / SINGLE).write_bytes(struct.pack("<Q", 99_000_000) + b'{"a":' * 20_000_000)
    assert isinstance(survives(lambda: resolve(str(model))), ModelError)


def test_tokenizers_of_the_wrong_kind(
    fuzz: Any, survives: Any, anything: Any, write_model: Any, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
    good = {name: (model / name).read_bytes() for name in files if (model / name).exists()}
    data = json.loads(good["tokenizer.json"])
    parts = st.dictionaries(st.sampled_from([*data]), anything, min_size=1, max_size=2)
    settings = st.dictionaries(
        st.sampled_from(["tokenizer_class", "chat_template", "eos_token", "model_max_length", "auto_map", "backend"]),
        anything | st.sampled_from(["LlamaTokenizer", "Absent", ["x.Y", None], {"AutoTokenizer": ["x.Y", "x.Z"]}]),
        max_size=2,
    )

    def check(drawn: Any) -> None:
        name, raw, parts, settings = drawn
        for file in files:
            (model / file).unlink(missing_ok=True)
        for file, content in good.items():
            (model / file).write_bytes(content)
        (model / "tokenizer.json").write_text(json.dumps(data | parts))
        (model / "tokenizer_config.json").write_text(json.dumps(json.loads(good["tokenizer_config.json"]) | settings))
        if raw is not None:
            (model / name).write_bytes(raw)
        survives(lambda: load_tokenizer(model))

    raws = (
        st.none() | st.binary(max_size=60) | st.sampled_from([b"{}", b"[]", b"\x0a\x05", b"[" * 20_000, b"PK\x03\x04"])
    )
    fuzz(st.tuples(st.sampled_from(files), raws, parts | st.just({}), settings), check, quick=25, slow=500)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_no_pickle_runs(survives: Any, write_model: Any, tmp_path: Path) -> None:
    """pytorch_model.bin is refused; with --allow-pickle it is opened by a reader that runs nothing."""
    model, mark = write_model(tmp_path / "model"), tmp_path / "mark"
    weights = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    for content in (weights | {"model.norm.weight": Bomb(mark)}, Bomb(mark), [1], {"a": 1}):
        torch.save(content, model / "pytorch_model.bin")
        for allow in (False, True):
            found = survives(
                lambda allow=allow: run_conversion(
                    plan_conversion(str(model), "full", out=tmp_path / "out", allow_pickle=allow), gate=False
                )
            )
            assert isinstance(found, ModelError), (content, allow, found)
    for raw in (pickle.dumps(Bomb(mark)), b"", b"PK\x03\x04", b"\x80\x02."):
        (model / "pytorch_model.bin").write_bytes(raw)
        found = survives(
            lambda: run_conversion(
                plan_conversion(str(model), "full", out=tmp_path / "out", allow_pickle=True), gate=False
            )
        )
        assert isinstance(found, ModelError), raw
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_no_code_of_a_model_runs(survives: Any, write_model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """auto_map in config.json and tokenizer_config.json, answered `yes` on stdin: the code stays where it is."""
    model, mark = write_model(tmp_path / "model"), tmp_path / "mark"
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Model: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json"):
        data = json.loads((model / file).read_text())
        auto = {name: "evil.Model" if name != "AutoTokenizer" else ["evil.Model", "evil.Model"] for name in names}
        (model / file).write_text(json.dumps(data | {"auto_map": auto, "tokenizer_class": "Unheard"}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    survives(lambda: load_model(str(model), device="cpu"))
    survives(lambda: load_tokenizer(model))
    survives(lambda: run_conversion(plan_conversion(str(model), "full", out=tmp_path / "out"), gate=True))
    assert not mark.exists()
    if (tmp_path / "out").exists():
        assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_nothing_asks_for_remote_code() -> None:
    package = Path(manifest.__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        text = path.read_text("utf-8")
        assert "trust_remote_code=True" not in text and "import pickle" not in text, path
        assert "weights_only=False" not in text and "allow_pickle=True" not in text, path
