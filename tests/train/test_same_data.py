"""A run is resumed on the same contents, wherever they lie and whenever they were written; what changed is named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from tokenizers import Tokenizer
from typer.testing import CliRunner

from ctxext.cli import finetune as command
from ctxext.config.loader import build, dump_yaml, read_yaml
from ctxext.errors import InputError, ModelError
from ctxext.model.source import resolve
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.run_directory import applied_changes, plan_repeated, plan_resumed, start_run
from ctxext.train.run_plan import plan_run

LINES = "".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(200))


@pytest.fixture
def begun(write_model, tmp_path: Path) -> Path:
    """A run that was interrupted after its second step, with its model and a directory of data beside it."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text(LINES)
    (data / "b.md").write_text(LINES)
    model = write_model(tmp_path / "model", "llama")
    fields = {"ctx": 64, "steps": 4, "global_batch_size": 2, "data": {"source": str(data)}, "seed": 5}
    run = tmp_path / "run"
    start_run(plan_run(resolve(str(model)), build(FinetuneSpec, fields, source="test")), run)

    def interrupt(metrics: Any) -> None:
        if metrics.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_finetune(plan_resumed(run), run, events=Events(on_step=interrupt))
    return run


def finetune(*arguments: object):
    """The command, in this process."""
    app = typer.Typer()
    app.command()(command.finetune)
    return CliRunner().invoke(app, [*map(str, arguments)])


def old_hash(source: Path, files: list[Path]) -> str:
    """The hash of data as the version before this one wrote it into spec.yaml (its documents.fingerprint)."""
    digest = hashlib.sha256(json.dumps([str(source), "text", None]).encode())
    for path in files:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def test_a_touched_file_is_the_same_data(begun: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "data").iterdir():
        os.utime(path, (1, 1))
    done = finetune("--resume", "--out", begun, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["finished"]
    facts = json.loads((begun / "ctxext.json").read_text())["facts"]["data"]
    assert facts["changed"] == []
    assert plan_repeated(begun)[1] == []


def test_changed_files_are_named_and_force_goes_on_and_keeps_what_changed(begun: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "a.txt").write_text(LINES.replace("cut", "put"))
    (data / "b.md").unlink()
    (data / "c.txt").write_text(LINES)
    with pytest.raises(InputError) as caught:
        plan_resumed(begun)
    assert "the data changed since this run started: " in caught.value.message
    for name, what in (("a.txt", "changed"), ("b.md", "missing"), ("c.txt", "new")):
        assert f"{data / name} ({what})" in caught.value.message
    assert "--force" in (caught.value.hint or "")
    assert finetune("--resume", "--out", begun).exit_code != 0
    before = (begun / "spec.yaml").read_text()
    done = finetune("--resume", "--out", begun, "--force", "--json")
    assert done.exit_code == 0, done.output
    assert "warning: continuing with data that changed since this run started" in done.stderr
    assert (begun / "spec.yaml").read_text() != before
    changed = json.loads((begun / "ctxext.json").read_text())["facts"]["data"]["changed"]
    assert len(changed) == 1 and changed[0].startswith("after step 1: ") and "a.txt (changed)" in changed[0]


def test_what_was_accepted_is_not_kept_where_nothing_was_trained(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "a.txt").write_text(LINES * 2)
    kept = {name: (begun / name).read_bytes() for name in ("spec.yaml", "data.json")}
    with pytest.raises(RuntimeError), applied_changes(plan_resumed(begun, accept=True), begun):
        assert (begun / "spec.yaml").read_bytes() != kept["spec.yaml"]
        raise RuntimeError
    assert {name: (begun / name).read_bytes() for name in kept} == kept


def test_a_run_of_an_older_version_resumes(begun: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (begun / "data.json").unlink()
    spec = read_yaml(begun / "spec.yaml")
    spec["data"] = old_hash(data, [data / "a.txt", data / "b.md"])
    (begun / "spec.yaml").write_text(dump_yaml(spec))
    plan = plan_resumed(begun)
    assert plan_repeated(begun)[1] == []
    # This version reads more files of the directory: other data, which is said.
    (data / "c.text").write_text(LINES)
    with pytest.raises(InputError, match=r"c.text \(the ctxext version that started this run did not read it\)"):
        plan_resumed(begun)
    (data / "c.text").unlink()
    with applied_changes(plan, begun):
        assert run_finetune(plan_resumed(begun), begun, resume=True).finished
    assert read_yaml(begun / "spec.yaml")["data"] != spec["data"], "contents are compared from here on"


def test_a_changed_file_of_an_older_run_is_refused_without_its_name(begun: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (begun / "data.json").unlink()
    spec = read_yaml(begun / "spec.yaml")
    spec["data"] = old_hash(data, [data / "a.txt", data / "b.md"])
    (begun / "spec.yaml").write_text(dump_yaml(spec))
    os.utime(data / "a.txt", (1, 1))
    with pytest.raises(InputError, match="an older version started this run and did not record which"):
        plan_resumed(begun)
    assert plan_resumed(begun, accept=True)


def test_a_directory_that_moved_is_the_same_data_and_needs_no_force(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"a.txt \(missing\)"):
        plan_resumed(begun)
    said: list[str] = []
    plan = plan_resumed(begun, {"data.source": str(tmp_path / "elsewhere")}, say=said.append)
    assert said == [f"the data is now at {tmp_path / 'elsewhere'}; its contents are the same"]
    with pytest.raises(InputError, match="was started with another spec: .*seed was 5, is 6"):
        plan_resumed(begun, {"data.source": str(tmp_path / "elsewhere"), "seed": 6})
    with applied_changes(plan, begun):
        report = run_finetune(plan_resumed(begun), begun, resume=True, events=Events(said.append))
    assert report.finished
    assert any("found in the cache: 2 files" in line for line in said), said


def test_a_run_says_and_keeps_what_it_read(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "x.csv").write_text("1,2")
    said: list[str] = []
    report = run_finetune(plan_resumed(begun), begun, resume=True, events=Events(said.append))
    tokens = 2 * (len(LINES) + 1)
    counts = f"2 files, 2 documents, {tokens:,} tokens"
    assert f"data: found in the cache: {counts}; skipped: x.csv (suffix .csv)" in said
    facts = json.loads((begun / "ctxext.json").read_text())["facts"]["data"]
    for read in (facts["read"], report.as_dict()["read"]):
        (one,) = read
        assert (one["files"], one["documents"], one["tokens"]) == (2, 2, tokens)


def test_a_token_without_a_row_is_refused_before_the_first_step(begun: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra{number}>" for number in range(10)])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    largest = tokenizer.get_vocab_size() - 1
    (tmp_path / "data" / "a.txt").write_text(LINES + "<extra9>")
    started = finetune(tmp_path / "model", "--ctx", 64, "--preset", "smoke", "--data", tmp_path / "data", "--out",
                       tmp_path / "new")  # fmt: skip
    assert isinstance(started.exception, ModelError)
    assert f"its tokenizer gives token {largest}, but the model has 260" in started.exception.message
    assert not (tmp_path / "new").exists()
