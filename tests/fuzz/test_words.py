"""What people type and write: units, --set, YAML, presets by name and path, manifests. Never a traceback."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from ctxext.config import manifest, presets
from ctxext.config.loader import assignments, build, dump_yaml, parse_value, read_yaml, set_value
from ctxext.config.presets import ModelPreset
from ctxext.errors import CtxextError
from ctxext.evals.eval_spec import eval_spec_from_options
from ctxext.model.layout import HybridSpec, find_hybrid, layer_kinds
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.units import parse_bytes, parse_tokens

DIGITS = st.text("0123456789.,_eE+-kKmMgGtTiIbBsSdDhH \t\n²٣x", max_size=45)
WORDS = st.one_of(
    DIGITS,
    st.text(max_size=60),
    st.from_regex(r"[0-9]{1,60}[kmgs]?", fullmatch=True),
    st.integers(39, 500).map(lambda digits: "9" * digits + "s"),
)
YAML_BITS = [
    "a", "b", "-", ":", ": ", "\n", "  ", " ", "\t", "[", "]", "{", "}", ",", "&x", "*x", "<<", "!!python/a:b",
    "!", "|", ">", "'", '"', "#", "%YAML 1.1", "---", "...", "2e-5", "010", "0x1f", ".nan", ".inf", "1:30", "yes", "~",
    "null", "1" * 50, "-1", "\\", "\u2028", "\ufeff", "\0", "é", "?", "? ", "@", "`", "lora", "rank", "ctx", "100k",
]  # fmt: skip
YAML = st.one_of(st.lists(st.sampled_from(YAML_BITS), max_size=40).map("".join), st.text(max_size=80))


def test_units(fuzz: Any, survives: Any, anything: Any) -> None:
    def check(value: Any) -> None:
        for parse in (parse_tokens, parse_bytes):
            found = survives(lambda parse=parse: parse(value))
            assert isinstance(found, CtxextError) or (found >= 0 and found == found)

    fuzz(WORDS | anything, check, quick=80, slow=4000)


def test_yaml_and_set(fuzz: Any, survives: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"

    def check(text: str) -> None:
        value = survives(lambda: parse_value(text))
        if not isinstance(value, CtxextError):
            json.dumps(value, allow_nan=False)  # plain, finite data
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        data = survives(lambda: read_yaml(path))
        if isinstance(data, dict):
            assert survives(lambda: build(FinetuneSpec, data, source="file")) is not None
            again = survives(lambda: parse_value(dump_yaml(data)))
            assert again == data
        given = survives(lambda: assignments([text, f"a.{text[:10]}={text}"]))
        if isinstance(given, dict):
            for key, value in given.items():
                survives(lambda key=key, value=value: set_value({"a": 1}, key, value))
            survives(lambda: eval_spec_from_options("perplexity", given))

    fuzz(YAML, check, quick=80, slow=3000)


def test_specs(fuzz: Any, survives: Any, anything: Any) -> None:
    """Values of the wrong kind at the right keys, and the other way round."""
    for spec, quick in ((FinetuneSpec, 30), (ModelPreset, 20), (HybridSpec, 20)):
        keys = st.sampled_from([field.name for field in fields(spec)]) | st.text(max_size=5)

        def check(data: dict[str, Any], spec: Any = spec) -> None:
            found = survives(lambda: build(spec, data, source="drawn"))
            assert isinstance(found, CtxextError | spec)

        fuzz(st.dictionaries(keys, anything, max_size=6), check, quick=quick, slow=600)


def test_presets_by_name_and_path(fuzz: Any, survives: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets" / "hybrid").mkdir(parents=True)
    (tmp_path / "presets" / "hybrid" / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "presets" / "hybrid" / "here.yaml").mkdir()
    (tmp_path / "presets" / "hybrid" / "bad.yaml").write_bytes(b"\xff\xfe")
    bits = [
        "..",
        "/",
        "\\",
        "~",
        "swa128",
        "-nope",
        ".yaml",
        ".yml",
        "loop",
        "here",
        "bad",
        "\0",
        " ",
        "é",
        "x" * 300,
        "C:",
    ]
    names = st.one_of(st.lists(st.sampled_from(bits), max_size=6).map("".join), st.text(max_size=20))

    def check(name: str) -> None:
        for kind in ("hybrid", "models", "finetune"):
            found = survives(lambda kind=kind: presets.find(kind, name))
            assert isinstance(found, CtxextError | presets.Preset)
        hybrid = survives(lambda: find_hybrid(name))
        if isinstance(hybrid, HybridSpec):
            survives(lambda: layer_kinds(hybrid, 12, name))

    fuzz(names, check, quick=60, slow=1500)
    for name in ("loop", "here", "bad", "bad.yaml", "presets/hybrid/bad.yaml", "presets/hybrid/loop.yaml"):
        assert isinstance(survives(lambda name=name: presets.find("hybrid", name)), CtxextError), name


def test_layers_by_name(fuzz: Any, survives: Any) -> None:
    hybrid = find_hybrid("swa128-nope")
    texts = st.text("0123456789,-odlast e²٣_", max_size=12)
    fuzz(texts, lambda text: survives(lambda: layer_kinds(hybrid, 12, text)), quick=60, slow=1000)


def test_manifests(fuzz: Any, survives: Any, anything: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / manifest.FILE_NAME
    manifest.write(tmp_path / "run", manifest.new("conversion", spec={}, parents={}, facts={}))
    good = json.loads(path.read_text())
    keys = st.sampled_from([*good, "extra"])

    def check(drawn: Any) -> None:
        changes, raw = drawn
        path.write_bytes(json.dumps(good | changes).encode() if raw is None else raw)
        found = survives(lambda: manifest.read(tmp_path / "run"))
        assert isinstance(found, CtxextError | manifest.Manifest)
        survives(lambda: manifest.newest(tmp_path, ("conversion",)))

    junk = st.none() | st.binary(max_size=30) | st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b"1" * 5000, b"NaN"])
    fuzz(st.tuples(st.dictionaries(keys, anything, max_size=3), junk), check, quick=50, slow=1500)


BOMBS = {
    "too long": "a: 1\n" * 200_000,
    "aliases": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n",
    "merge": "a: &a {b: 1}\nc: {<<: *a}\n",
    "deep lists": "a: " + "[" * 60_000,
    "deep mappings": "".join(" " * i + "a:\n" for i in range(300)),
    "deep flow": "a: " + "{a: " * 15_000,
    "long key": "k" * 60_000 + ": 1",
    "many keys": "\n".join(f"k{i}: 1" for i in range(6_000)),
    "one key, often": "a: 1\n" * 13_000,
    "huge int": "a: " + "9" * 60_000,
    "huge float": "a: " + "9" * 60_000 + ".0",
    "big exponent": "a: 1e999999999",
    "tag": "a: !!python/object/apply:os.system [touch bomb]",
    "quotes": 'a: "' + "\\x41" * 16_000,
    "nulls": "\0" * 60_000,
    "many documents": "---\n" * 16_000,
    "block": "a: |\n" + "  x\n" * 16_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs(name: str, survives: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bomb.yaml").write_text(BOMBS[name])
    data = survives(lambda: read_yaml("bomb.yaml"))
    assert isinstance(data, CtxextError) or name not in ("too long", "aliases", "merge", "tag")
    if isinstance(data, dict):
        error = survives(lambda: build(FinetuneSpec, data, source="bomb.yaml"))
        assert isinstance(error, CtxextError) and error.message.count("\n") <= 51
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.yaml"]
