import json
import os
import re
import subprocess
import sys
from datetime import datetime

import pytest

from ctxext.config import manifest as manifests
from ctxext.config.manifest import FILE_NAME, Manifest, default_out, newest, read, versions, weight_hashes, write
from ctxext.errors import InputError, ModelError

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    return root / "ctxext" / "hashes.json"


def manifest(kind: str = "conversion", created: str = "2026-01-02T03:04:05.000006+00:00") -> Manifest:
    return Manifest(
        kind=kind,
        created=created,
        command=["ctxext", "convert", "tiny"],
        spec={"layer_pattern": "SN", "sliding_window": None},
        parents={"source": {"path": "/a", "weights": {"model.safetensors": ABC_SHA256}}},
        versions={"python": "3.11.0", "peft": None},
        facts={"gate": {"max_difference": 0.0}},
    )


def test_a_manifest_is_read_back_equal(tmp_path):
    assert write(tmp_path, manifest()) == tmp_path / FILE_NAME
    assert read(tmp_path) == manifest()


def test_a_new_manifest_is_of_now_and_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/ctxext", "convert", "a model"])
    first, second = (manifests.new("eval", spec={}, parents={}, facts={}) for _ in range(2))
    assert first.command == ["ctxext", "convert", "a model"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", first.created)
    assert datetime.fromisoformat(first.created) <= datetime.fromisoformat(second.created)
    assert first.versions["python"] == ".".join(map(str, sys.version_info[:3])) and "torch" in first.versions


def test_versions_import_nothing():
    code = (
        "from ctxext.config.manifest import versions; import sys; v = versions();"
        "print(v['ctxext'], {'torch', 'transformers'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(versions()["ctxext"]), "set()"]


def test_no_manifest_is_none(tmp_path):
    assert read(tmp_path) is None
    assert read(tmp_path / "nowhere") is None
    (tmp_path / "file").touch()
    assert read(tmp_path / "file") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"{}", b"\xff\xfe", b"[" * 100_000]
    + [
        json.dumps({"kind": "eval", "created": created}).encode() for created in ("yesterday", "2026-01-01T00:00:00", 3)
    ],
    ids=lambda content: content[:24].decode("latin-1"),
)
def test_a_broken_manifest_is_refused_by_its_path(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path / FILE_NAME} is broken")):
        read(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("created", "2026-01-01T00:00:00"), ("kind", 3), ("extra", 1)])
def test_one_wrong_entry_breaks_a_manifest(tmp_path, key, value):
    path = write(tmp_path, manifest())
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=key):
        read(tmp_path)


def test_weights_are_hashed_and_nothing_else(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub.safetensors").mkdir()
    assert weight_hashes(tmp_path) == {
        "model.safetensors": ABC_SHA256,
        "pytorch_model-00001-of-00002.bin": EMPTY_SHA256,
    }
    assert manifests.parent(tmp_path) == {"path": str(tmp_path), "weights": weight_hashes(tmp_path)}


def test_a_hash_is_remembered_until_size_or_time_change(tmp_path, cache):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"abc")
    stamp = weights.stat().st_mtime_ns
    assert weight_hashes(tmp_path) == {"model.safetensors": ABC_SHA256}

    weights.write_bytes(b"xyz")
    os.utime(weights, ns=(stamp, stamp))
    assert weight_hashes(tmp_path) == {"model.safetensors": ABC_SHA256}, "read again, though size and time are the same"
    os.utime(weights, ns=(stamp, stamp + 1))
    assert weight_hashes(tmp_path) != {"model.safetensors": ABC_SHA256}, "not read again, though the time changed"
    weights.write_bytes(b"")
    os.utime(weights, ns=(stamp, stamp + 1))
    assert weight_hashes(tmp_path) == {"model.safetensors": EMPTY_SHA256}, "not read again, though the size changed"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "files": 3}', '{"format": 0, "files": {}}']
)
def test_a_broken_cache_is_ignored_and_replaced(tmp_path, cache, content):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert weight_hashes(tmp_path) == {"model.safetensors": ABC_SHA256}
    assert list(json.loads(cache.read_text())["files"]) == [str((tmp_path / "model.safetensors").resolve())]
    assert os.listdir(cache.parent) == ["hashes.json"]


def test_a_cache_entry_that_is_no_hash_is_ignored(tmp_path, cache):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"abc")
    weight_hashes(tmp_path)
    cache.write_text(cache.read_text().replace(ABC_SHA256, "no hash"))
    assert weight_hashes(tmp_path) == {"model.safetensors": ABC_SHA256}


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, cache):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    cache.parent.touch()
    assert weight_hashes(tmp_path) == {"model.safetensors": ABC_SHA256}


def test_the_newest_is_by_created_not_by_file_time(tmp_path):
    for name, kind, created in (
        ("a", "conversion", "2026-03-01T00:00:00.000002+00:00"),
        ("b", "conversion", "2026-03-01T00:00:00.000001+00:00"),
        ("c", "eval", "2026-04-01T00:00:00+00:00"),
        (".d.partial-1", "conversion", "2026-05-01T00:00:00+00:00"),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name, manifest(kind, created))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE_NAME).write_text("{")
    (tmp_path / "file").touch()
    assert newest(tmp_path, ["conversion"]) == tmp_path / "a"
    assert newest(tmp_path, ["conversion", "eval"]) == tmp_path / "c"
    assert newest(tmp_path, ["conversion"], accept=lambda path, _: path.name == "b") == tmp_path / "b"
    with pytest.raises(InputError, match="no output of kind finetune or merge under"):
        newest(tmp_path, ["finetune", "merge"])
    with pytest.raises(InputError, match="no output of kind eval under"):
        newest(tmp_path / "nowhere", ["eval"])


def test_default_outputs_do_not_collide_and_sort_by_time():
    outs = [default_out("convert", "meta-llama/Llama 2") for _ in range(50)]
    assert len(set(outs)) == len(outs) and outs == sorted(outs)
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z-convert-meta-llama-Llama-2", outs[0].name), outs[0]
    assert outs[0].parent.name == "runs"
    assert default_out("eval", "../..").name.endswith("-eval-output")
