"""Which files of a directory are read, what a run says about the others, and that damaged files are named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pytest

from ctxext.data.chat import chat_rows
from ctxext.data.documents import Documents, fingerprint, read_documents
from ctxext.data.files import KEPT, NAMED, Reading, recorded
from ctxext.errors import CtxextError, DataError, InputError

ROW = json.dumps({"text": "one row"}) + "\n"


def read(source: Path, **options) -> tuple[list[str], Reading]:
    documents: Documents = read_documents(str(source), **options)
    return [document.text for document in documents], documents.reading


def fault(kind: type[CtxextError], source: Path) -> str:
    with pytest.raises(kind) as caught:
        list(read_documents(str(source)))
    assert caught.value.hint, f"no hint beside: {caught.value.message}"
    return caught.value.message


def write_zst(path: Path, data: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(data)


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    """The directory of ../shared/cases/data-directory-silent, with its link as a link, and files that are no data."""
    place, elsewhere = tmp_path / "mix", tmp_path / "elsewhere"
    (place / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (place / "B.TXT").write_text("B")
    (place / "a.txt").write_text("a")
    (place / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d"}\n'))
    (place / "e.json").write_text('[{"text": "e1"}, {"text": "e2"}]')
    (place / "g.text").write_text("g")
    (place / "sub" / "c.md").write_text("c")
    (elsewhere / "f.txt").write_text("f")
    (place / "linked").symlink_to(elsewhere)
    return place


def test_a_directory_is_read_whole_and_what_is_no_data_is_named(mix: Path) -> None:
    texts, reading = read(mix)
    assert texts == ["B", "a", "d", "e1", "e2", "g", "f", "c"]
    assert reading.line() == "read 7 files, 8 documents"
    (mix / "paper.pdf").write_bytes(b"%PDF")
    (mix / "README").write_text("x")
    (mix / "tables.parquet.gz").write_bytes(b"x")
    (mix / "empty.txt").write_text(" \n")
    (mix / "none.jsonl").write_text("\n")
    (mix / "config.json").write_text('{"width": 3}')
    (mix / ".git").mkdir()
    (mix / ".git" / "x.txt").write_text("hidden")
    (mix / "sub" / ".y.txt").write_text("hidden")
    (mix / "gone.txt").symlink_to("nowhere")
    again, reading = read(mix)
    assert again == texts
    assert reading.beside == [
        ("README", "no suffix"),
        ("gone.txt", "a broken link"),
        ("paper.pdf", "suffix .pdf"),
        ("tables.parquet.gz", "suffix .gz"),
    ]
    assert reading.passed_over == [("config.json", "no field 'text'"), ("empty.txt", "empty"), ("none.jsonl", "empty")]
    assert reading.line() == (
        "read 7 files, 8 documents; skipped: README (no suffix), gone.txt (a broken link), "
        "paper.pdf (suffix .pdf), tables.parquet.gz (suffix .gz), config.json (no field 'text'), 2 more, 2 hidden"
    )
    assert Reading.of(json.loads(json.dumps(reading.as_dict()))) == reading


def test_the_line_names_a_few_files_and_counts_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for number in range(150):
        (tmp_path / f"{number:03d}.csv").write_text("x")
    reading = read(tmp_path)[1]
    assert f", {150 - NAMED} more" in reading.line()
    assert len(reading.beside) == 100 and reading.more == 50


@pytest.mark.parametrize("name", ["B.TXT", "d.jsonl.gz", "e.json", "g.text"])
def test_each_of_these_is_read_alone(mix: Path, name: str) -> None:
    assert read(mix / name)[0][0][0] == name[0]


@pytest.mark.parametrize("suffix", [".txt", ".text", ".md", ".TXT", ".jsonl", ".JSONL", ".json"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".GZ"])
def test_every_format_is_read_compressed_too_and_is_other_data_when_its_text_is(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    path = tmp_path / f"a{suffix}{compression}"

    def write(text: str) -> None:
        data = ("\ufeff" + text).encode() if "j" not in suffix.lower() else json.dumps({"text": text}).encode()
        write_zst(path, data) if compression == ".zst" else path.write_bytes(
            gzip.compress(data) if compression else data
        )

    write("Zeile größer.\r\n" * 3000)
    text = read(path)[0]
    line = "Zeile größer.\r\n" if "j" in suffix.lower() else "Zeile größer.\n"
    assert text == [line * 3000] == read(tmp_path)[0]
    before = fingerprint(str(path))
    write("Zeile größer.\r\n" * 2999 + "Zeile kleiner\r\n")
    assert fingerprint(str(path)) != before


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
        ('{"text": "a",\n "id": 1}\n', ["a"]),
        ('{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
        ('\ufeff[{"text": "a"}]', ["a"]),
    ],
)
def test_json_holds_a_list_an_object_or_lines(tmp_path: Path, content: str, texts: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    assert read(path)[0] == texts


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('["a", "b"]', "no list of objects"),
        ("7", "no list of objects"),
        ('{"version": "1", "data": [{"text": "a"}]}', "no field 'text'"),
        ('[{"body": "a"}]', "its first row has no field 'text'"),
        ('[{"text": "a"},', "not JSON: Expecting value"),
        ("[" * 100_000, "not JSON"),
        ("[]", "empty"),
    ],
)
def test_json_without_rows_is_refused_alone_and_passed_over_in_a_directory(
    tmp_path: Path, content: str, why: str
) -> None:
    path = tmp_path / "e.json"
    path.write_text(content)
    assert why in fault(DataError, path) and str(path) in fault(DataError, path)
    assert why in fault(DataError, tmp_path), "a directory without other data"
    (tmp_path / "a.txt").write_text("a")
    texts, reading = read(tmp_path)
    assert texts == ["a"]
    assert len(reading.passed_over) == 1 and why in reading.passed_over[0][1]
    assert reading.files == 1 and "read 1 file," in reading.line()


def test_skipped_files_beyond_those_listed_are_counted(tmp_path: Path) -> None:
    (tmp_path / "z.txt").write_text("text")
    for number in range(KEPT + 3):
        (tmp_path / f"{number:03}.txt").write_text("")
    _, reading = read(tmp_path)
    assert len(reading.passed_over) == KEPT and reading.more_passed_over == 3
    assert reading.line().startswith("read 1 file, 1 document; skipped: 000.txt (empty), ")
    assert reading.line().endswith(f", {KEPT + 3 - NAMED} more")
    assert Reading.of(json.loads(json.dumps(reading.as_dict()))) == reading


def test_a_later_row_of_json_that_is_bad_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text('[{"text": "a"}, {"text": 7}]')
    assert f"{path}: row 2: field 'text' holds int" in fault(DataError, tmp_path)
    path.write_text('[{"text": "a"}, 7]')
    assert f"{path}: row 2: expected an object, got int" in fault(DataError, tmp_path)
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    assert f"{path}:2: this line is not JSON" in fault(DataError, tmp_path)


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "real").mkdir(parents=True)
    other.mkdir()
    (root / "real" / "x.txt").write_text("x")
    (other / "y.txt").write_text("y")
    (other / "round").symlink_to(other)
    (root / "a-link").symlink_to(root / "real")
    (root / "back").symlink_to(root)
    (root / "real" / "up").symlink_to(tmp_path)
    (root / "itself").symlink_to("itself")
    (root / "one").symlink_to(other)
    (root / "two").symlink_to(other)
    (root / "same.txt").symlink_to(root / "real" / "x.txt")
    texts, reading = read(root)
    assert texts == ["y", "x"]
    again = "a link to a directory that is read already"
    assert dict(reading.beside) == {
        "a-link/": again,
        "back/": again,
        "itself": "no suffix",
        "one/round/": again,
        "real/up/": again,
        "same.txt": "the same file as real/x.txt",
        "two/": again,
    }
    # The same tree, reached through a link.
    (tmp_path / "door").symlink_to(root)
    assert read(tmp_path / "door")[0] == texts
    assert fingerprint(str(tmp_path / "door")) == fingerprint(str(root))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every directory")
def test_a_directory_that_may_not_be_listed_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir(mode=0)
    assert read(tmp_path)[1].beside == [("closed/", "cannot be listed: Permission denied")]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_damaged_compressed_text_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = os.urandom(40_000).hex().encode() if ".txt" in name else ROW.encode() * 4000
    path.write_bytes(gzip.compress(data)) if name.endswith(".gz") else write_zst(path, data)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive at all", whole[:20] + b"\0" * 20 + whole[40:]):
        path.write_bytes(damaged)
        assert f"{path} cannot be read: " in fault(DataError, path)
    path.write_bytes(whole)
    assert read(path)[1].documents


def test_bytes_that_are_no_utf8_are_placed_in_the_unpacked_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(ROW.encode() + b'{"text": "caf\xe9"}\n'))
    assert f"{path}:2: invalid UTF-8 at byte {len(ROW) + 13}" in fault(DataError, path)


def test_conversations_leave_files_of_text_out_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    texts, reading = read(tmp_path, rows=chat_rows("prompt", None))
    assert texts == ["pc"]
    assert reading.beside == [("a.txt", "text, but only rows are read")]


def test_a_directory_without_data_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no file to read in the directory .*; skipped: a.pdf \(suffix .pdf\)"):
        read_documents(str(tmp_path))


def test_reading_that_ends_early_says_so_and_is_recorded(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    with recorded() as outer, recorded() as found:
        documents = read_documents(str(tmp_path))
        next(documents)
    assert found == [documents.reading] and outer == []
    assert documents.reading.line() == "read 1 of 3 files, 1 document"


def test_the_fingerprint_is_of_contents_in_order(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        (place / "a.txt").write_text("a" * 100_000)
        (place / "b.txt").write_text("b")
    os.utime(there / "a.txt", (1, 1))
    first = fingerprint(str(here))
    assert first == fingerprint(str(there)), "a copy is the same data"
    assert first != fingerprint(str(here), most=10), "beyond `most` bytes: by time"
    (there / "a.txt").rename(there / "c.txt")
    assert first != fingerprint(str(there)), "another order"
    # The same size and time, other bytes: a small file is hashed each time.
    status = (here / "b.txt").stat()
    (here / "b.txt").write_text("x")
    os.utime(here / "b.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert first != fingerprint(str(here))
