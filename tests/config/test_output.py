import errno
import os

import pytest

from ctxext.config.output import check_free, staged_output, write_whole
from ctxext.errors import EnvironmentFault, InputError


def listing(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_an_output_appears_whole_when_the_block_ends(tmp_path):
    out = tmp_path / "runs" / "a"
    with staged_output(out) as partial:
        (partial / "config.json").write_text("{}")
        assert partial.parent == out.parent and partial.name == f".a.partial-{os.getpid()}"
        assert not out.exists()
    assert listing(tmp_path) == ["runs", "runs/a", "runs/a/config.json"]


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
        with pytest.raises(InputError, match="nothing that ctxext wrote"), staged_output(tmp_path / place, force=True):
            pytest.fail("entered")
    assert listing(tmp_path) == before
    check_free(tmp_path / "runs" / "a", force=True)


def test_force_never_replaces_the_ground_it_stands_on(tmp_path, monkeypatch):
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")
    for place in (tmp_path / "work", tmp_path / "work" / "inner", os.path.expanduser("~")):
        with pytest.raises(InputError, match="even --force"):
            check_free(place, force=True)
    for place in (".", "..", "/"):
        with pytest.raises(InputError):
            check_free(place, force=True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_fault_of_the_environment(tmp_path, error):
    out, told = tmp_path / "runs" / "a", r"the disk of .* is full \(.* free\)"
    with pytest.raises(EnvironmentFault, match=told) as caught, staged_output(out) as partial:
        (partial / "x").touch()
        raise error
    assert caught.value.exit_code == 3 and str(tmp_path) in caught.value.message and caught.value.hint
    assert listing(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_that_is_closed_is_a_fault_of_the_environment(tmp_path, number):
    with pytest.raises(EnvironmentFault, match="cannot write"), staged_output(tmp_path / "a"):
        raise OSError(number, os.strerror(number), "somewhere")


def test_a_parent_that_is_a_file_is_no_traceback(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is no directory"), staged_output(tmp_path / "file" / "a"):
        pytest.fail("entered")


def test_a_file_is_replaced_whole_and_a_failure_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "spec.yaml"
    write_whole(path, "größer\n")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "newer")
    assert listing(tmp_path) == ["spec.yaml"] and path.read_bytes() == b"new"
