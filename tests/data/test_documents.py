"""What is read, in which order, and where exactly bad input is bad."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ctxext.data.documents import Document, fingerprint, read_documents
from ctxext.errors import CtxextError, DataError, EnvironmentFault, InputError


def texts(source: Path | str, **options: str) -> list[str]:
    return [document.text for document in read_documents(str(source), **options)]


def fault(kind: type[CtxextError], source: Path | str, **options: str) -> str:
    with pytest.raises(kind) as caught:
        list(read_documents(str(source), **options))
    assert caught.value.hint, f"no hint beside: {caught.value.message}"
    return caught.value.message


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes("\ufeffErste Zeile.\r\nZweite, größere.\n".encode())
    assert list(read_documents(str(path))) == [Document("Erste Zeile.\nZweite, größere.\n", str(path))]


def test_a_directory_is_read_in_path_order_and_hidden_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "second"}\n')
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    assert texts(tmp_path) == ["first", "second", "third"]


def test_jsonl_and_parquet_read_the_field_that_is_named(tmp_path: Path) -> None:
    rows = [{"id": i, "body": f"text {i} é"} for i in range(200)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    expected = [row["body"] for row in rows]
    assert texts(lines, text_field="body") == expected
    assert texts(table, text_field="body") == expected
    assert next(read_documents(str(lines), text_field="body")).name == f"{lines}:1"


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\nnot JSON\n')
    documents = read_documents(str(path))
    assert next(documents).text == "good"
    with pytest.raises(DataError):
        next(documents)


def test_invalid_utf8_is_refused_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    assert f"{path}: invalid UTF-8 at byte 3 of the file (0xe9)" == fault(DataError, path)
    rows = tmp_path / "latin.jsonl"
    rows.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert f"{rows}:2: invalid UTF-8 at byte 27" in fault(DataError, rows)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "not JSON"),
        ('["text"]', "expected an object, got list"),
        ('{"body": "x", "id": 1}', "no field 'text'; the fields there are body, id"),
        ('{"text": 7}', "field 'text' holds int"),
        ('{"text": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = fault(DataError, path)
    assert f"{path}:3: " in message
    assert said in message


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    assert "not a readable Parquet file" in fault(DataError, path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "id": [1, 2]}), path)
    assert f"{path}:2: field 'text' holds NoneType" in fault(DataError, path)
    assert "the fields there are text, id" in fault(DataError, path, text_field="body")
    raw = pyarrow.array([b"ok", b"caf\xe9"]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert f"{path}:2: invalid UTF-8 at byte 3" in fault(DataError, path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md"])
def test_empty_data_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n")
    assert "no text" in fault(DataError, path)


def test_refusals_come_at_the_call_and_not_at_the_first_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for source, said in [
        (tmp_path / "a.csv", "suffix '.csv'"),
        (tmp_path / "none.txt", "no such file"),
        (tmp_path, "no file to read"),
        ("./nowhere/at/all", "no such file"),
        ("hub:a/b/c", "not a data set id"),
    ]:
        with pytest.raises(InputError, match=said):
            read_documents(str(source))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no splits"):
        read_documents(str(tmp_path / "a.txt"), split="train")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    documents = read_documents(str(path))
    path.unlink()
    with pytest.raises(DataError, match="a.txt cannot be read: No such file"):
        next(documents)


def test_a_data_set_id_without_network_says_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault) as caught:
        next(read_documents("hub:owner/no-such-data"))
    assert "owner/no-such-data" in caught.value.message
    assert "local" in (caught.value.hint or "")
    assert caught.value.exit_code == 3


def test_the_fingerprint_follows_content_place_and_field(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    first = fingerprint(str(path))
    assert first == fingerprint(str(path))
    assert first != fingerprint(str(path), text_field="body")
    path.write_text("xy")
    assert first != fingerprint(str(path))


def test_the_embedded_corpus_has_disjoint_splits() -> None:
    train = {document.name for document in read_documents("embedded")}
    held_out = {document.name for document in read_documents("embedded", split="held-out")}
    assert train and held_out
    assert not train & held_out, f"in both splits: {sorted(train & held_out)[:3]}"
    assert fingerprint("embedded") != fingerprint("embedded", split="held-out")
    with pytest.raises(DataError, match="split 'test' is unknown"):
        list(read_documents("embedded", split="test"))
