import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from ctxext.config.locks import hold
from ctxext.config.output import check_free, claim, environment_fault, replacing, staged_output, write_whole
from ctxext.errors import EnvironmentFault, InputError


def listing(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_an_output_appears_whole_when_the_block_ends(tmp_path):
    out = tmp_path / "runs" / "a"
    with staged_output(out) as partial:
        (partial / "config.json").write_text("{}")
        assert partial.parent == out.parent and partial.name.startswith(".a.partial-")
        assert not out.exists()
    assert listing(tmp_path) == ["runs", "runs/a", "runs/a/config.json"]


def test_an_output_is_on_the_disk_before_it_gets_its_name_and_before_the_older_one_is_removed(tmp_path, disk_acts):
    out = tmp_path / "a"
    for text in ("old", "new"):
        with staged_output(out, force=True) as partial:
            (partial / "deep").mkdir()
            (partial / "deep/config.json").write_text(text)
            (partial / "spec.yaml").touch()
            (partial / "link").symlink_to("nowhere")
    renamed = len(disk_acts) - 1 - disk_acts[::-1].index(("rename", str(out)))
    before = {path for act, path in disk_acts[:renamed] if act == "sync"}
    assert {str(partial / name) for name in ("deep/config.json", "deep", "spec.yaml", "")} <= {*before, f"{partial}/"}
    (removed,) = (i for i, (act, path) in enumerate(disk_acts) if act == "remove" and ".a.old-" in path)
    assert ("sync", str(tmp_path)) in disk_acts[renamed:removed]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, disk_acts):
    path = tmp_path / "a.json"
    write_whole(path, "{}")
    (first, partial), second, third = disk_acts
    assert first == "sync" and Path(partial).name.startswith(".a.json.partial-")
    assert (second, third) == (("rename", str(path)), ("sync", str(tmp_path)))


def test_a_directory_whose_file_system_cannot_sync_it_is_skipped(tmp_path, monkeypatch):
    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "a.json", "{}")
    assert listing(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), staged_output(tmp_path / "runs" / "deep" / "a") as partial:
        (partial / "x").touch()
        raise error
    assert listing(tmp_path) == []


def test_a_failure_leaves_the_neighbours(tmp_path):
    (tmp_path / "runs" / "b").mkdir(parents=True)
    with pytest.raises(RuntimeError), staged_output(tmp_path / "runs" / "a"):
        raise RuntimeError
    assert listing(tmp_path) == ["runs", "runs/b"]


@pytest.mark.parametrize("kind", ["directory", "empty", "file", "link"])
def test_what_exists_is_refused_without_force_and_replaced_with_it(tmp_path, kind):
    out, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    if kind in ("directory", "empty"):
        out.mkdir()
    if kind == "directory":
        (out / "ctxext.json").touch()
    if kind == "file":
        out.write_text("old")
    if kind == "link":
        elsewhere.mkdir()
        (elsewhere / "kept").touch()
        out.symlink_to(elsewhere)
    before = listing(tmp_path)

    with pytest.raises(InputError, match="exists") as caught, staged_output(out):
        pytest.fail("entered")
    assert "--force" in str(caught.value.hint) and listing(tmp_path) == before

    with pytest.raises(RuntimeError), staged_output(out, force=True):
        raise RuntimeError
    assert listing(tmp_path) == before, "the old output is gone, though the new one failed"

    with staged_output(out, force=True) as partial:
        (partial / "new").touch()
    kept = ["elsewhere", "elsewhere/kept"] if kind == "link" else []
    assert listing(tmp_path) == ["a", "a/new", *kept] and not out.is_symlink()


def test_force_replaces_only_what_was_written_here(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a book")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "ctxext.json").touch()
    before = listing(tmp_path)
    for place in ("books", "runs"):
        with pytest.raises(InputError, match="not an output of ctxext"), staged_output(tmp_path / place, force=True):
            pytest.fail("entered")
    assert listing(tmp_path) == before
    check_free(tmp_path / "runs" / "a", force=True)


def test_force_never_replaces_the_ground_it_stands_on(tmp_path, monkeypatch):
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")
    for place in (tmp_path / "work", tmp_path / "work" / "inner", os.path.expanduser("~")):
        with pytest.raises(InputError, match="which --force does not replace"):
            check_free(place, force=True)
    for place in (".", "..", "/"):
        with pytest.raises(InputError):
            check_free(place, force=True)


BIG = 2 * 1024**2  # bytes; the disk has 1 MiB


def write_tokenizer(place):
    """Of tokenizers, whose error is a plain Exception."""
    vocabulary = {f"{i:0100d}": i for i in range(20_000)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=f"{0:0100d}")).save(str(place / "tokenizer.json"))


def append(place):
    with (place / "lines").open("a") as file:
        file.write("x" * BIG)


WRITERS = {
    "bytes": lambda place: (place / "x").write_bytes(bytes(BIG)),
    "text": lambda place: (place / "x").write_text("x" * BIG),
    "append": append,
    "copy": lambda place: shutil.copyfile(place.parents[2] / "big", place / "x"),
    "safetensors": lambda place: save_file({"a": torch.zeros(BIG)}, place / "x.safetensors"),
    "tokenizers": write_tokenizer,
    "numpy": lambda place: np.save(place / "x.npy", np.zeros(BIG)),
    "write_whole": lambda place: write_whole(place / "x", bytes(BIG)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_fault_of_the_environment(small_disk, name):
    disk = small_disk(1024**2)
    (disk.path.parent / "big").write_bytes(bytes(BIG))
    out, told = disk.path / "runs" / "a", r"the disk of .* is full \(.* free\)"
    with pytest.raises(EnvironmentFault, match=told) as caught, staged_output(out) as partial:
        WRITERS[name](partial)
    assert caught.value.exit_code == 3 and f"the disk of {disk.path}" in caught.value.message
    assert ".partial" not in caught.value.message and caught.value.hint.startswith("free disk space")
    assert listing(disk.path) == []


def test_a_disk_without_inodes_is_full_though_bytes_are_free(small_disk):
    disk = small_disk(1024**2, inodes=10)
    with pytest.raises(EnvironmentFault, match="0 inodes free"), staged_output(disk.path / "a") as partial:
        for i in range(20):
            (partial / f"{i}").touch()
    assert listing(disk.path) == []


def test_a_quota_and_faults_that_are_named_already():
    quota = environment_fault(OSError(errno.EDQUOT, "Disk quota exceeded"), Path("a"))
    assert quota is not None and "quota" in quota.message
    inner = EnvironmentFault("the disk of /cache is full: No space left on device")
    assert environment_fault(inner, Path("a")) is None and environment_fault(ValueError("no"), Path("a")) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_that_is_closed_is_a_fault_of_the_environment(tmp_path, number):
    with pytest.raises(EnvironmentFault, match="cannot write") as caught, staged_output(tmp_path / "a") as partial:
        raise OSError(number, os.strerror(number), str(partial / "x"))
    assert caught.value.hint == "give another --out"


def test_a_file_that_cannot_be_read_is_not_called_one_that_cannot_be_written(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"^/etc/model: Permission denied$"), staged_output(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/model")


def test_a_parent_that_is_a_file_is_no_traceback(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a directory"), staged_output(tmp_path / "file" / "a"):
        pytest.fail("entered")


def test_a_file_is_replaced_whole_and_a_failure_leaves_the_old_one_alone(small_disk):
    disk = small_disk(1024**2)
    path = disk.path / "spec.yaml"
    write_whole(path, "größer\n")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(EnvironmentFault, match="is full"):
        write_whole(path, bytes(BIG))
    assert listing(disk.path) == ["spec.yaml"] and path.read_bytes() == b"new"


# Two processes. Where the first one only has to hold a lock, this process stands for both.


def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path):
    out = tmp_path / "runs" / "a"
    with staged_output(out) as partial:
        with pytest.raises(InputError, match="is being written by another process"), staged_output(out):
            pytest.fail("entered")
        (partial / "x").touch()
    assert listing(tmp_path) == ["runs", "runs/a", "runs/a/x"]


def test_the_one_that_ends_later_is_refused_and_the_first_result_stays(tmp_path):
    """Both of them began before either could see the other."""
    out = tmp_path / "a"
    with pytest.raises(InputError, match="was written by another process meanwhile"), staged_output(out) as partial:
        (partial / "second").touch()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "first").touch()
        (tmp_path / "other").rename(out)
    assert listing(tmp_path) == ["a", "a/first"]


def test_force_replaces_what_it_saw_and_nothing_newer(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / "ctxext.json").touch()
    with pytest.raises(InputError, match="meanwhile"), staged_output(out, force=True) as partial:
        (partial / "second").touch()
        shutil.rmtree(out)
        out.mkdir()
        (out / "newer").touch()
    assert listing(tmp_path) == ["a", "a/newer"]


@pytest.mark.parametrize("mark", [None, "request.json"])
def test_force_does_not_replace_what_another_process_is_writing(tmp_path, mark):
    out = tmp_path / "a"
    out.mkdir()
    (out / "request.json").touch()
    with (out / mark).open() if mark else nullcontext(os.open(out, os.O_RDONLY)) as file:
        hold(file, out, "evaluation")
        for room in (staged_output, replacing):
            with pytest.raises(InputError, match="is being written by another process"), room(out, force=True):
                pytest.fail("entered")
        if mark is None:
            os.close(file)
    check_free(out, force=True)


def test_a_directory_that_another_process_made_is_refused_by_name(tmp_path):
    claim(tmp_path / "runs" / "a")
    with pytest.raises(InputError, match="is being written by another process"):
        claim(tmp_path / "runs" / "a")


CHILD = """
import sys, time
from pathlib import Path
from ctxext.config.output import staged_output
with staged_output(Path(sys.argv[1])) as partial:
    (partial / "x").touch()
    print("writing", flush=True)
    time.sleep(300)
"""


def test_a_killed_process_leaves_a_partial_directory_that_the_next_one_removes(tmp_path):
    out = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(out)], stdout=subprocess.PIPE) as victim:
        assert victim.stdout.readline() == b"writing\n"
        with pytest.raises(InputError, match="is being written by another process"), staged_output(out):
            pytest.fail("entered")
        victim.kill()
    left = listing(tmp_path)
    assert len(left) == 2 and ".a.partial-" in left[0]
    other = tmp_path / ".a.partial-other_host-0123456789abcdef0123456789abcdef"
    other.mkdir()
    (tmp_path / ".ab.partial").mkdir()
    with staged_output(out) as partial:
        (partial / "y").touch()
    # Another host's locks may not be seen here: what it left stays.
    assert listing(tmp_path) == [other.name, ".ab.partial", "a", "a/y"]


RACER = """
import sys, time
from pathlib import Path
from ctxext.config.output import staged_output
from ctxext.errors import InputError
out, name, start = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
time.sleep(max(0.0, start - time.time()))
try:
    with staged_output(out, force=sys.argv[4] == "force") as partial:
        for i in [*range(19), "ctxext.json"]:
            (partial / f"{i}").write_text(name)
except InputError as error:
    print(error.message)
    sys.exit(2)
"""


@pytest.mark.parametrize("force", ["new", "force"])
def test_of_processes_that_write_one_output_at_once_one_wins_and_all_others_refuse(tmp_path, force):
    for round_ in range(3):
        out, start = tmp_path / f"{round_}" / "a", time.time() + 2
        if force == "force":
            out.mkdir(parents=True)
            (out / "ctxext.json").touch()
        words = [[sys.executable, "-c", RACER, str(out), name, str(start), force] for name in "abcd"]
        racers = [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in words]
        said = [racer.communicate(timeout=300) for racer in racers]
        codes = [racer.returncode for racer in racers]
        assert set(codes) <= {0, 2} and 0 in codes, said
        for code, (told, _) in zip(codes, said, strict=True):
            assert code == 0 or "another process" in told or "exists" in told, said
        # One that begins after the winner ended may replace it with --force.
        assert codes.count(0) == 1 or force == "force"
        assert [path.name for path in out.parent.iterdir()] == ["a"], "nothing hidden is left"
        contents = {path.read_text() for path in out.iterdir()}
        assert len(list(out.iterdir())) == 20 and len(contents) == 1 and contents <= set("abcd"), contents
