"""Model directories drawn at random, through eval and convert: what stock transformers computes, or a refusal.

Files are removed, renamed, doubled, linked, cut and joined by stale ones; fields of config.json are dropped, nulled and
given other values; tensors are stored under other names and in other dtypes. stock transformers opens each directory
too. What it opens with weights of its own invention (missing tensors) has to be refused here.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from ctxext.config import manifest
from ctxext.errors import CtxextError
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.model.weights import EMBEDDING, HEAD, INDEX, PICKLE, SINGLE

IDS = torch.randint(2, 260, (1, 24), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"
VALUES: dict[str, list[Any]] = {  # beside dropping a field and making it null
    "tie_word_embeddings": [True, False],
    "rope_theta": [500.0, 10000],
    "rope_scaling": [YARN, {"type": "linear", "factor": 2.0}, {"rope_type": "default"}, {}],
    "rope_parameters": [
        YARN | {"rope_theta": 500.0},
        LLAMA3 | {"rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0},
        {"type": "linear", "factor": 3},
        {"rope_type": "yarn", "factor": None},
        {"rope_type": "default", "rope_theta": None},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {FULL: {"rope_type": "default"}},
        {},
        [],
    ],
    "original_max_position_embeddings": [16, 32],
    "head_dim": [8, 16],
    "num_key_value_heads": [2, 4],
    "pad_token_id": [-1, 0, 259, 260, 10**6],
    "eos_token_id": [[0, 1], 300],
    "dtype": ["bfloat16", "float16", "torch.float32"],
    "torch_dtype": ["float32", "bfloat16", "auto"],
    "layer_types": [[FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2, [FULL] * 3, []],
    "sliding_window": [8, 4096],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2],
    "no_rope_layers": [[1, 0, 1, 0], [0] * 4, []],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "partial_rotary_factor": [1.0, 0.5],
    "rms_norm_eps": [1e-5, 1e-2],
    "hidden_act": ["silu", "gelu"],
    "vocab_size": [256, 320],
    "num_hidden_layers": [3, 5],
    "is_causal": [True, False],
    "quantization_config": [{}, {"quant_method": "gptq", "bits": 4}],
    "transformers_weights": ["model.safetensors", "consolidated.safetensors"],
    "configuration_files": [["config.4.0.0.json"]],
    "per_layer_config": [{}, {"0": {"head_dim": 16}}],
    "auto_map": [{"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}],
    "num_labels": [1, 3],
    "id2label": [{"0": "a"}],
    "return_dict": [False],
    "output_hidden_states": [True],
    "is_encoder_decoder": [True, False],
    "pretraining_tp": [2],
    "logits_scaling": [8.0],
    "final_logit_softcapping": [30.0],
    "attention_multiplier": [0.1],
    "unheard_of": [1, None],
    "use_return_dict": [True],
    "transformers_version": ["6.0.0", "4.31.0"],
    "model_type": ["llama", "mistral", "smollm3"],
    "attn_implementation": ["eager"],
    "architectures": [["LlamaForSequenceClassification"], []],
}
DEFAULTS = ["{}", "[", "[]", "null", '{"temperature": 0.5}', '{"eos_token_id": "x"}', '{"max_length": -1}', ""]


def whole_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where an earlier change has removed, emptied or cut it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def change_fields(model: Path, name: str, value: Any) -> None:
    """`value` "absent" drops a field."""
    path = model / "config.json"
    if (config := whole_json(path)) is not None:
        config.pop(name, None)
        path.write_text(json.dumps(config if value == "absent" else config | {name: value}))


def remove(model: Path, name: str) -> None:
    if (model / name).is_dir() and not (model / name).is_symlink():
        (model / name).rmdir()
    (model / name).unlink(missing_ok=True)


def rename(model: Path, name: str) -> None:
    if (model / name).is_file():
        (model / name).rename(model / f"old-{name}")


def double(model: Path, name: str) -> None:
    """The same file again, under names that are found beside weights."""
    if (model / name).is_file():
        for other in ("consolidated.safetensors", f"{Path(name).stem} (1){Path(name).suffix}"):
            shutil.copyfile(model / name, model / other)


def link(model: Path, name: str) -> None:
    """As the hub's cache has it: a link to a blob elsewhere."""
    if (model / name).is_file() and not (model / name).is_symlink():
        blobs = model.parent / "blobs"
        blobs.mkdir(exist_ok=True)
        (model / name).rename(blobs / name)
        (model / name).symlink_to(f"../blobs/{name}")


def break_link(model: Path, name: str) -> None:
    remove(model, name)
    (model / name).symlink_to("../blobs/absent")


def cut(model: Path, name: str) -> None:
    if (model / name).is_file():
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: len(data) // 2])


def empty(model: Path, name: str) -> None:
    remove(model, name)
    (model / name).touch()


def directory(model: Path, name: str) -> None:
    remove(model, name)
    (model / name).mkdir(exist_ok=True)


def stale(model: Path, name: str) -> None:
    """Weights of another training beside the true ones: one file, shards with their index, shards alone, pickles."""
    other = model.parent / "stale"
    if name == PICKLE:
        remove(model, PICKLE)
        torch.save(load_file(other / SINGLE), model / PICKLE)
        return
    for path in other.glob({"one": SINGLE, "shards": "model*", "shards alone": "model-*"}[name]):
        if name == "one" or path.name != SINGLE:
            remove(model, path.name)
            shutil.copyfile(path, model / path.name)


def adapter(model: Path, content: str) -> None:
    (model / "adapter_config.json").write_text(content)


def generation(model: Path, content: str) -> None:
    remove(model, "generation_config.json")
    (model / "generation_config.json").write_text(content)


def index(model: Path, change: str) -> None:
    path = model / INDEX
    if (data := whole_json(path)) is None:
        return
    shards = sorted(set(data["weight_map"].values()))
    first = min(data["weight_map"])
    if change == "no metadata":
        data.pop("metadata", None)
    elif change == "moved":
        data["weight_map"][first] = shards[-1] if data["weight_map"][first] != shards[-1] else shards[0]
    elif change == "absent shard":
        data["weight_map"][first] = "model-00009-of-00009.safetensors"
    elif change == "forgotten":
        del data["weight_map"][first]
    elif change == "stranger":
        data["weight_map"]["stranger.weight"] = shards[0]
    path.write_text(json.dumps(data))


def tensors(model: Path, change: str) -> None:
    """The same numbers under other names, some of them changed, dropped or in another dtype."""
    for path in sorted(model.glob("model*.safetensors")):
        if not path.is_file():
            continue
        try:
            stored = load_file(path)
        except Exception:  # an earlier change has cut it
            continue
        if change == "without prefix":
            stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
        elif change == "twice the prefix":
            stored = {f"model.{name}": tensor for name, tensor in stored.items()}
        elif change == "head alone" and EMBEDDING in stored:
            stored[HEAD] = stored.pop(EMBEDDING)
        elif change == "head too" and EMBEDDING in stored:
            stored[HEAD] = stored[EMBEDDING].clone()
        elif change == "frequencies":
            stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        elif change == "stranger":
            stored["model.layers.0.stranger.weight"] = torch.ones(4)
        elif change == "no norm":
            stored.pop("model.norm.weight", None)
        elif change == "NaN":
            stored[min(stored)].view(-1)[0] = float("nan")
        elif change == "integers":
            stored[max(stored)] = stored[max(stored)].to(torch.int32)
        elif change in ("float16", "bfloat16", "float64"):
            stored = {name: tensor.to(getattr(torch, change)) for name, tensor in stored.items()}
        save_file(stored, path, metadata={"format": "pt"})
        data = whole_json(model / INDEX)
        if data is not None and path.name != SINGLE:
            data["weight_map"] = {n: s for n, s in data["weight_map"].items() if s != path.name}
            data["weight_map"] |= dict.fromkeys(stored, path.name)
            (model / INDEX).write_text(json.dumps(data))


FILES = ["config.json", SINGLE, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors", "special_tokens_map.json"]  # fmt: skip
RENAMED = ["without prefix", "twice the prefix", "head alone", "head too", "frequencies", "stranger", "no norm", "NaN",
           "integers", "float16", "bfloat16", "float64"]  # fmt: skip
SPOILING = [remove, rename, break_link, cut, empty, directory]  # what leaves little to open: drawn less often

Change = tuple[Callable[..., None], tuple[Any, ...]]


def changes() -> st.SearchStrategy[list[Change]]:
    files = st.sampled_from(FILES)
    fields = st.sampled_from(
        [(name, value) for name, values in VALUES.items() for value in [*values, None, "absent"]]
    ).map(lambda pair: (change_fields, pair))
    harmless = st.tuples(st.sampled_from([double, link]), st.tuples(files))
    spoiling = st.tuples(st.sampled_from(SPOILING), st.tuples(files))
    extras = st.one_of(
        st.tuples(st.just(stale), st.tuples(st.sampled_from(["one", "shards", "shards alone", PICKLE]))),
        st.tuples(st.just(generation), st.tuples(st.sampled_from(DEFAULTS))),
        st.tuples(st.just(index), st.tuples(st.sampled_from(["no metadata", "moved", "absent shard", "forgotten"]))),
        st.tuples(st.just(tensors), st.tuples(st.sampled_from(RENAMED))),
        st.tuples(st.just(adapter), st.tuples(st.sampled_from(["{}", "["]))),
    )
    return st.lists(st.one_of(fields, fields, harmless, extras, extras, spoiling), min_size=1, max_size=3)


def by_stock(model: Path, **more: Any) -> torch.Tensor | str:
    """Logits of stock transformers, or why there are none: it opens nothing, or invents weights that are not stored."""
    how = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
    try:
        stock, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **how, **more)
        if info["missing_keys"] or info["mismatched_keys"]:
            return f"missing {sorted(info['missing_keys'])[:2]}"
        with torch.no_grad():
            return stock.eval()(IDS, use_cache=False, return_dict=True).logits
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def check_eval(model: Path, truth: torch.Tensor | str, survives: Any) -> str:
    loaded = survives(lambda: load_model(str(model), device="cpu"))
    if isinstance(loaded, CtxextError):
        return "refused"
    assert not isinstance(truth, str), truth
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, truth, atol=1e-3, rtol=0)
    return "opened"


def check_convert(model: Path, truth: torch.Tensor | str, survives: Any, gate: bool) -> str:
    """What is converted opens in stock transformers; where no layer had a window, it computes what the source does."""
    out = model.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    report = survives(lambda: run_conversion(plan_conversion(str(model), "full", out=out), gate=gate))
    if isinstance(report, CtxextError):
        assert not out.exists()
        return "not converted"
    made = by_stock(out)
    assert not isinstance(truth, str) and not isinstance(made, str), (truth, made)
    windows = {kind.sliding_window for kind in resolve(str(model)).kinds} - {None}
    if not any(window < IDS.shape[1] for window in windows):
        torch.testing.assert_close(made, truth, atol=1e-3, rtol=0)
    return "converted"


BASES = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-sharded": ("llama", {"shard": "40KB"}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "SN": ("llama", {}),
}


@pytest.mark.parametrize("base", BASES)
def test_drawn_directories(base: str, fuzz: Any, survives: Any, write_model: Any, tmp_path: Path, capsys: Any) -> None:
    family, options = BASES[base]
    source = write_model(tmp_path / "source", family, seed=1, **options)
    if base == "SN":
        source = tmp_path / "converted"
        run_conversion(plan_conversion(str(tmp_path / "source"), "SN", sliding_window=8, out=source), gate=False)
        (source / manifest.FILE_NAME).unlink()
    write_model(tmp_path / "drawn" / "stale", family, seed=2, **{**options, "shard": "40KB"})
    shutil.copyfile(
        write_model(tmp_path / "one", family, seed=3, **{**options, "shard": "5GB"}) / SINGLE,
        tmp_path / "drawn" / "stale" / SINGLE,
    )
    seen: Counter[str] = Counter()
    model = tmp_path / "drawn" / "model"

    def check(drawn: tuple[list[Change], int]) -> None:
        made, number = drawn
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(model.parent / "blobs", ignore_errors=True)
        shutil.copytree(source, model)
        for change, arguments in made:
            change(model, *arguments)
        # sampling defaults of any content are set aside here, and a broken file of them is left out of a conversion
        truth = by_stock(model, generation_config=GenerationConfig())
        seen.update([check_eval(model, truth, survives), "stock fails" if isinstance(truth, str) else "stock opens"])
        seen.update([check_convert(model, truth, survives, gate=number == 0)])

    fuzz(st.tuples(changes(), st.integers(0, 3)), check, quick=8, slow=300)  # a gate, which takes longest, in a quarter
    with capsys.disabled():
        print(f"\n{base}: {dict(seen)}")
    assert seen["opened"] > seen["refused"] // 8
