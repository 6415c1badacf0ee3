"""One cache of tokens that several processes use, a disk that is full, and what decides whether tokens still hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctxext.data import store as stores
from ctxext.data.documents import Document, read_documents
from ctxext.data.files import Reading
from ctxext.data.store import TokenStore, tokenise
from ctxext.errors import EnvironmentFault

ROOT = Path(__file__).parents[2]
WORDS = 300


def words(size: int = WORDS, first: int = 0) -> PreTrainedTokenizerFast:
    """`wN` is token N, from `first` on; w<first> is EOS."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(first, first + size)}, unk_token=f"w{first + 1}"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=f"w{first}")


# A process that tokenises: it says `ready`, waits for a line, and says what it opened and how often it encoded.
PROCESS = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from ctxext.config import output
    from ctxext.data.documents import Document
    from ctxext.data.store import tokenise

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w0")
    if sys.argv[2] == "no-locks":
        def refuse(*arguments):
            raise OSError(95, "Operation not supported")
        output.fcntl.flock = refuse
    read = []

    def documents():
        for number in range(40):
            read.append(number)
            time.sleep(0.02)
            yield Document(f"w{2 + number} " * 50, f"d{number}")

    print("ready", flush=True)
    sys.stdin.readline()
    found = tokenise(documents(), tokenizer, Path(sys.argv[1]), eos_id=0, source_fingerprint="f",
                     waiting=lambda: print("waiting", flush=True))
    tokens = found.read(0, found.meta.tokens)
    print(len(read), found.reused, int(tokens.sum()), found.meta.tokens, flush=True)
    sys.stdin.readline()
    print(int(found.read(0, found.meta.tokens).sum()), flush=True)
    """
)


def started(place: Path, locks: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(place), locks],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("locks", ["locks", "no-locks"])
def test_two_processes_tokenise_into_one_cache(tmp_path: Path, locks: str) -> None:
    place = tmp_path / "tokens" / "key"
    both = [started(place, locks), started(place, locks)]
    try:
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in both:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said: list[list[str]] = []
        for process in both:
            lines = [process.stdout.readline()]
            while lines[-1] == "waiting\n":
                lines.append(process.stdout.readline())
            said.append(lines)
        total = sum(2 + number for number in range(40)) * 50
        results = [lines[-1].split() for lines in said]
        assert all(result[2:] == [str(total), str(40 * 51)] for result in results), said
        assert sorted(result[1] for result in results) == ["False", "True"], "one wrote, and the other found it"
        if locks == "locks":
            assert sorted(result[0] for result in results) == ["0", "40"], "one process read the documents"
            assert sorted(len(lines) for lines in said) == [1, 2], "the other one said that it waits"
        # Both still read what they mapped.
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{total}\n"
            assert process.wait(300) == 0
    finally:
        for process in both:
            process.kill()
    assert [path.name for path in place.parent.iterdir()] == ["key"], "nothing is left beside the tokens"


def test_a_process_that_is_killed_leaves_no_lock_behind(tmp_path: Path) -> None:
    place = tmp_path / "key"
    process = started(place, "locks")
    assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    while not list(tmp_path.glob(".key.*.partial")):
        assert process.poll() is None
    process.kill()
    process.wait()
    (tmp_path / "a.txt").write_text("w5 w6")
    store = tokenise(read_documents(str(tmp_path / "a.txt")), words(), place, eos_id=0, source_fingerprint="f")
    assert store.read(0, 3).tolist() == [5, 6, 0]
    assert not (tmp_path / ".key.lock").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_the_environment_and_leaves_nothing_half_written(tiny_disk: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("w5 " * 1_000_000)
    with pytest.raises(EnvironmentFault, match="No space left on device") as caught:
        tokenise(read_documents(str(text)), words(), tiny_disk / "tokens" / "key", eos_id=0, source_fingerprint="f")
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")
    assert list((tiny_disk / "tokens").iterdir()) == []
    # With nothing left at all, not even the directory can be made.
    filler = os.open(tiny_disk / "filler", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        while True:
            os.write(filler, b"\0" * 4096)
    os.close(filler)
    text.write_text("w5 " * 10_000)
    with pytest.raises(EnvironmentFault, match="No space left on device"):
        tokenise(read_documents(str(text)), words(), tiny_disk / "tokens" / "key", eos_id=0, source_fingerprint="f")
    (tiny_disk / "filler").unlink()
    store = tokenise(read_documents(str(text)), words(), tiny_disk / "tokens" / "key", eos_id=0, source_fingerprint="f")
    assert store.meta.tokens == 10_001
    del store


def test_the_largest_id_is_recorded_and_ids_beyond_the_count_of_entries_fit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w70005 w70010")
    # 300 entries whose ids begin at 70,000: uint16 has no room, though the entries are few.
    store = tokenise(read_documents(str(tmp_path / "a.txt")), words(300, first=70_000), tmp_path / "key", eos_id=70_000)
    assert store.read(0, 3).tolist() == [70_005, 70_010, 70_000]
    assert (store.meta.max_id, store.meta.dtype) == (70_010, "uint32")


def test_tokens_that_are_found_say_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("w5 w6")
    (tmp_path / "data" / "b.csv").write_text("x")

    def made() -> TokenStore:
        documents = read_documents(str(tmp_path / "data"))
        return tokenise(documents, words(), tmp_path / "key", eos_id=0, source_fingerprint="f")

    first, again = made(), made()
    assert (first.reused, again.reused) == (False, True)
    assert again.meta == first.meta
    reading = Reading.of(again.meta.reading)
    assert reading.line(reused=True) == (
        "found in the cache: 1 file, 1 document, 3 tokens; skipped: b.csv (suffix .csv)"
    )


def test_tokens_of_an_older_format_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w5 w6")

    def made() -> TokenStore:
        return tokenise(
            read_documents(str(tmp_path / "a.txt")), words(), tmp_path / "key", eos_id=0, source_fingerprint="f"
        )

    made()
    meta = tmp_path / "key" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": stores.FORMAT - 1}))
    assert not made().reused
    assert made().reused


def test_documents_begin_with_bos_unless_they_have_it_or_a_template_wrote_them(tmp_path: Path) -> None:
    documents = [Document("w5 w6", "text"), Document("", "empty"), Document("w7", "sampled", ids=(3, 7))]
    store = tokenise(documents, words(), tmp_path / "text", eos_id=0, begin=[3])
    assert store.read(0, store.meta.tokens).tolist() == [3, 5, 6, 0, 3, 7, 0]
    assert store.bounds.tolist() == [0, 4] and store.meta.begin == [3]

    # Of rows with answers, BOS is not scored; a template's text stays as the template wrote it.
    rows = [Document("w5 w6", "row", answers=((3, 5),)), Document("w8 w9", "chat", answers=((3, 5),), rendered=True)]
    store = tokenise(rows, words(), tmp_path / "rows", eos_id=0, begin=[3])
    assert store.read(0, store.meta.tokens).tolist() == [3, 5, 6, 0, 8, 9, 0]
    assert store.read_scored(0, store.meta.tokens).tolist() == [False, False, True, True, False, True, True]


def test_bos_is_not_counted_among_the_tokens_of_a_document(tmp_path: Path) -> None:
    documents = [Document("w5 w6", "two"), Document("w5 w6 w7", "three"), Document("w7", "sampled", ids=(3, 7, 8, 9))]
    store = tokenise(documents, words(), tmp_path / "key", eos_id=0, begin=[3], min_tokens=3, max_tokens=3)
    assert store.read(0, store.meta.tokens).tolist() == [3, 5, 6, 7, 0, 3, 7, 8, 9, 0]
    assert store.meta.left_out == 1


def test_tokens_with_and_without_bos_are_not_taken_for_each_other(tmp_path: Path) -> None:
    def made(begin: list[int]) -> TokenStore:
        documents = [Document("w5 w6", "text")]
        return tokenise(documents, words(), tmp_path / "key", eos_id=0, begin=begin, source_fingerprint="f")

    assert not made([]).reused and made([]).reused
    assert not made([3]).reused and made([3]).reused
