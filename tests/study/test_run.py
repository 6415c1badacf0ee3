"""Pipelines carried out: skipped, gone on with after a kill, refused where the inputs changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctxext.cli.app import app
from ctxext.config import manifest as manifests
from ctxext.config import presets
from ctxext.errors import InputError, ModelError, SpecError
from ctxext.evals.item_runner import STAR
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import resolve
from ctxext.study import state, steps
from ctxext.study.pipeline import read_pipeline
from ctxext.study.run_pipeline import plan_pipeline, run_pipeline

PIPELINE = """
values: {model: MODEL, text: text.txt, rate: 1e-3, held_out: text.txt}
over: {hybrid: [SN, NS]}
steps:
  convert: {command: convert, model: "${model}", hybrid: "${hybrid}", sliding_window: 8}
  train:
    command: finetune
    model: "${convert}"
    ctx: 64
    preset: smoke
    data: "${text}"
    settings: {optimizer.learning_rate: "${rate}", data.min_tokens: null}
  merged: {command: merge, run: "${train}"}
  measure: {command: eval, models: ["${convert}", "${merged}"], lengths: [32], data: "${held_out}", limit: 256}
  page: {command: report, runs: ["${train[*]}", "${measure[*]}"], title: "loss ${train.final_loss}"}
"""


@pytest.fixture
def place(tmp_path, monkeypatch, model_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a sentence of some words, and another one. " * 200)
    text = PIPELINE.replace("MODEL", str(model_dir())).replace(', title: "loss ${train.final_loss}"', "")
    (tmp_path / "p.yaml").write_text(text)
    return tmp_path


def run(force=False, begin=None, **changes):
    said: list[str] = []
    plan = plan_pipeline(read_pipeline("p.yaml", changes), None, begin=begin, force=force)
    found = run_pipeline(plan, say=said.append)
    return {job.id: job.outcome for job in found.jobs} if found else None, found, said


def test_a_matrix_runs_is_skipped_and_runs_again_where_its_inputs_change(place):
    outcomes, found, _ = run()
    assert outcomes == dict.fromkeys(outcomes, "ran") and len(outcomes) == 9
    assert found.header[:2] == ("hybrid", "model") and [row[0] for row in found.rows] == ["SN", "SN", "NS", "NS"]
    assert all(float(row[2].rstrip("*")) > 1 for row in found.rows)
    root = place / "runs" / "p"
    assert manifests.read(root).kind == "pipeline" and (root / "page" / "report.html").is_file()
    assert found.markdown() == (root / "results.md").read_text()
    assert found.note is None and STAR not in found.markdown()
    starred = replace(found, rows=(("SN", "a", "12.000*"), *found.rows[1:]))
    assert starred.note == STAR and starred.markdown().endswith(f"|\n\n\\{STAR}\n")

    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    outcomes, again, _ = run()
    assert set(outcomes.values()) == {"skipped"} and again.rows == found.rows
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

    with pytest.raises(
        InputError, match=r"train.SN exists and was made from another request: .*learning_rate was 0.001, is 0"
    ):
        run(rate=2e-3)
    outcomes, _, _ = run(force=True, rate=2e-3)
    ran = {job for job, outcome in outcomes.items() if outcome == "ran"}
    assert ran == {job for job in outcomes if not job.startswith("convert")}

    outcomes, _, _ = run(begin="measure", rate=2e-3)
    assert {job: outcome for job, outcome in outcomes.items() if outcome == "ran"} == {
        "measure.SN": "ran", "measure.NS": "ran", "page": "ran",
    }  # fmt: skip
    assert outcomes["train.SN"] == "taken"


def test_the_progress_of_a_training_has_the_total_of_its_steps(place):
    plan, seen = plan_pipeline(read_pipeline("p.yaml", {"over.hybrid": ["SN"]})), []
    run_pipeline(plan, progress=lambda *progress: seen.append(progress))
    steps_seen = [counts for what, *counts in seen if what == "training"]
    assert steps_seen == [[step, len(steps_seen)] for step in range(1, len(steps_seen) + 1)] and steps_seen


def test_a_kill_while_the_output_is_hashed_costs_no_training(place, monkeypatch):
    real = state.stamp

    def killed(name, **but):
        if name.endswith("train.SN"):
            raise KeyboardInterrupt
        return real(name, **but)

    monkeypatch.setattr(state, "stamp", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    shown = CliRunner().invoke(app, ["run", "p.yaml", "--dry-run"])
    assert shown.exit_code == 0 and "train.SN  (finetune; resumes)" in shown.stdout
    assert "settings={optimizer.learning_rate: 0.001, data.min_tokens: null}" in shown.stdout
    assert "lengths=[32]" in shown.stdout and "None" not in shown.stdout and "=null" not in shown.stdout
    trained = {path: path.stat().st_mtime_ns for path in (place / "runs" / "p" / "train.SN").rglob("*.safetensors")}
    outcomes, _, _ = run()
    assert outcomes["convert.SN"] == "skipped" and outcomes["train.SN"] == "resumed" and outcomes["train.NS"] == "ran"
    assert trained and {path: path.stat().st_mtime_ns for path in trained} == trained
    outcomes, _, _ = run()
    assert set(outcomes.values()) == {"skipped"}


def test_what_changed_under_the_pipeline_is_noticed(place):
    run(**{"over.hybrid": ["SN"]})
    config = place / "runs" / "p" / "convert.SN" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(InputError, match="its files changed since"):
        run(**{"over.hybrid": ["SN"]})
    with pytest.raises(InputError, match="--from: the earlier job convert.NS is not done"):
        run(begin="train", **{"over.hybrid": ["NS"]})
    with pytest.raises(InputError, match="no step has this name; allowed: convert, train, merged"):
        run(begin="trian")
    (place / "runs" / "p" / "state" / "convert.SN.json").write_text("{")
    with pytest.raises(ModelError, match="broken.*"):
        run(**{"over.hybrid": ["SN"]})


def test_text_that_is_not_there_is_missed_before_the_first_step_runs(place):
    text = (place / "p.yaml").read_text().replace("sliding_window: 8}", "sliding_window: 8, calibration: calm.txt}")
    (place / "p.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        run(text="nobooks/", held_out="none.txt")
    assert caught.value.faults == (
        "steps.convert.calibration: no such file or directory: calm.txt",
        "steps.train.data: no such file or directory: nobooks",
        "steps.measure.data: no such file or directory: none.txt",
    )
    assert "hub:NAME for a data set" in caught.value.hint and not (place / "runs").exists()
    shown = CliRunner().invoke(app, ["run", "p.yaml", "--dry-run"])
    assert shown.exception.faults == caught.value.faults[:1]


@pytest.mark.parametrize("data", ["hub:owner/set", "owner/set", "${convert}", "runs/p/convert/README.md", "self"])
def test_what_a_step_makes_and_what_the_hub_may_have_is_not_missed(place, data):
    (place / "p.yaml").write_text(f"""
steps:
  convert: {{command: convert, model: tiny, hybrid: swa128-nope}}
  train: {{command: finetune, model: "${{convert}}", ctx: 64, data: "{data}"}}
""")
    assert plan_pipeline(read_pipeline("p.yaml")).standings == {"convert": "new", "train": "waits"}


def test_a_finished_step_is_not_replaced_because_one_before_it_was_made_again(place):
    one = {"over.hybrid": ["SN"]}
    run(**one)
    shutil.rmtree(place / "runs" / "p" / "convert.SN")
    outcomes, _, _ = run(**one)  # the very same conversion again, so that what was made from it holds
    assert outcomes.pop("convert.SN") == "ran" and set(outcomes.values()) == {"skipped"}
    weights = place / "runs" / "p" / "train.SN" / "adapter_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(place / "runs" / "p" / "convert.SN")
    text = (place / "p.yaml").read_text().replace("sliding_window: 8", "sliding_window: 16")
    (place / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=r"step train.SN: .*train.SN exists and was made from another request"):
        run(**one)
    assert weights.read_bytes() == before


def begun(place, **changes):
    """As a run leaves it that was stopped while the finetune step trained: its record not done, its directory there."""
    one = {"over.hybrid": ["SN"]} | changes
    run(**one)
    job = next(job for job in read_pipeline("p.yaml", one).jobs if job.step == "train")
    root, out = place / "runs" / "p", place / "runs" / "p" / "train.SN"
    record = state.read(root, job)
    state.write(root, job, record | {"done": False, "report": None, "output": None})
    (out / "ctxext.json").unlink()
    return one, root, out, job, record


def test_what_was_begun_with_other_settings_is_neither_gone_on_with_nor_replaced(place):
    one, root, out, _, record = begun(place)
    with pytest.raises(InputError, match=r"train.SN exists and was made from another request: .*learning_rate"):
        run(rate=2e-3, **one)
    other = next(job for job in read_pipeline("p.yaml", one | {"rate": 2e-3}).jobs if job.step == "train")
    requested = json.loads(
        json.dumps(record["request"]).replace("0.001", "0.002")
    )  # the record of another, its files old
    state.write(root, other, record | {"request": requested, "done": False})
    with pytest.raises(InputError, match=r"started with another model, data or settings"):
        run(rate=2e-3, **one)
    assert (out / "spec.yaml").is_file()


def test_changed_text_runs_what_reads_it_again(place):
    run(**{"over.hybrid": ["SN"]})
    time.sleep(0.01)
    (place / "text.txt").write_text("other words altogether, and more of them. " * 200)
    outcomes, _, _ = run(force=True, **{"over.hybrid": ["SN"]})
    assert outcomes["convert.SN"] == "skipped" and outcomes["train.SN"] == outcomes["page"] == "ran"


def test_a_model_of_the_hub_is_stamped_by_its_commit_and_read_without_its_weights(place, model_dir, monkeypatch):
    requested = []

    def downloaded(hub_id, *, allow_patterns, **_):
        requested.append(allow_patterns)
        shutil.copytree(model_dir(), place / "snapshots" / f"commit-{len(requested)}")
        return str(place / "snapshots" / f"commit-{len(requested)}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    first, second = (state.stamp("a/model") for _ in range(2))
    assert first == {"name": "a/model", "commit": "commit-1"} != second
    assert "*.safetensors" not in requested[0] and "*.json" in requested[0]
    assert resolve("a/model").usable_length and "*.safetensors" in requested[-1]


def test_a_preset_of_the_hub_is_stamped_by_what_it_says_and_a_model_by_its_lengths(place, model_dir, monkeypatch):
    (place / "presets" / "models").mkdir(parents=True)
    shipped = presets.find("models", "llama2-7b").path.read_text()
    (place / "presets" / "models" / "mine.yaml").write_text(shipped)
    before = state.stamp("mine")
    (place / "presets" / "models" / "mine.yaml").write_text(shipped.replace("revision: 0", "revision: 1"))
    assert state.stamp("mine") != before
    out = str(place / "hybrid")
    run_conversion(plan_conversion(str(model_dir()), "SN", out=Path(out), sliding_window=16), gate=False)
    before, manifest = (
        state.stamp(out, but=state.NOT_COMPARED),
        json.loads((place / "hybrid" / "ctxext.json").read_text()),
    )
    manifest["created"] = "2020-01-01T00:00:00.000000+00:00"
    (place / "hybrid" / "ctxext.json").write_text(json.dumps(manifest))
    assert state.stamp(out, but=state.NOT_COMPARED) == before
    manifest["facts"]["original_length"] = 8
    (place / "hybrid" / "ctxext.json").write_text(json.dumps(manifest))
    assert state.stamp(out, but=state.NOT_COMPARED) != before


def test_the_text_of_a_configuration_of_zero_is_part_of_what_is_asked(place, model_dir):
    (place / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    pipeline = (
        "steps: {train: {command: finetune, model: MODEL, ctx: 64, preset: smoke, data: text.txt, zero: mine.json}}"
    )
    (place / "z.yaml").write_text(pipeline.replace("MODEL", str(model_dir())))
    job = read_pipeline("z.yaml", {}).jobs[0]
    before = state.request(job, steps.read(job.command, job.arguments, source="test"))
    (place / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert state.request(job, steps.read(job.command, job.arguments, source="test")) != before


def test_a_place_that_is_not_a_pipelines_is_left_alone(place):
    (place / "runs" / "p").mkdir(parents=True)
    (place / "runs" / "p" / "precious").write_text("")
    with pytest.raises(InputError, match="not the output of a pipeline"):
        run()


def test_a_step_that_fails_is_named_and_what_was_done_stays(place):
    text = (place / "p.yaml").read_text().replace('run: "${train}"', 'run: "${convert}"')
    (place / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=r"step merged.SN: .*has no adapter to merge"):
        run(**{"over.hybrid": ["SN"]})
    pipeline = read_pipeline("p.yaml", {"over.hybrid": ["SN"]})
    assert plan_pipeline(pipeline).standings["train.SN"] == "done"


def test_numbers_flow_into_later_steps_and_missing_ones_are_named(place):
    text = (place / "p.yaml").read_text()
    title = '"after ${train.steps_done} steps"'
    with_title = text.replace('["${train[*]}", "${measure[*]}"]', f'"${{measure}}", title: {title}')
    (place / "p.yaml").write_text(with_title)
    run(**{"over.hybrid": ["SN"]})
    assert "after 2 steps" in (place / "runs" / "p" / "page.SN" / "report.html").read_text()
    (place / "p.yaml").write_text(with_title.replace("steps_done", "step_done"))
    with pytest.raises(InputError, match=r"step page.SN: .*'step_done' is unknown; allowed: out, finished"):
        run(force=True, **{"over.hybrid": ["SN"]})


@pytest.mark.slow
def test_a_kill_in_the_middle_of_training_is_gone_on_with(place):
    """The run is killed after a checkpoint, and the pipeline ends with the same loss as one that was not killed."""
    text = (place / "p.yaml").read_text().replace("over: {hybrid: [SN, NS]}\n", "over: {hybrid: [SN]}\n")
    settings = "steps: 40, faults.save_steps: 5, data.min_tokens: null"
    (place / "p.yaml").write_text(text.replace("data.min_tokens: null", settings))
    command = [sys.executable, "-c", "from ctxext.cli import main; main()", "run", "p.yaml"]
    process = subprocess.Popen(command, cwd=place, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoints = place / "runs" / "p" / "train.SN" / "checkpoints"
    until = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    job = next(job for job in read_pipeline("p.yaml").jobs if job.step == "train")
    assert state.read(place / "runs" / "p", job)["done"] is False
    done = subprocess.run([*command, "--json"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = {job["id"]: job["outcome"] for job in json.loads(done.stdout)["jobs"]}
    assert outcomes["convert.SN"] == "skipped" and outcomes["train.SN"] == "resumed"
    assert "resuming after step" in done.stderr
    loss = state.read(place / "runs" / "p", job)["report"]["final_loss"]
    subprocess.run([*command, "--out", "unbroken"], cwd=place, capture_output=True, check=True)
    assert state.read(place / "unbroken", job)["report"]["final_loss"] == loss


@pytest.mark.parametrize("name", ["extend-32k", "extend-100k", "retrofit-100k", "longlora-reproduction", "ablation"])
def test_a_pipeline_that_ships_runs_on_the_embedded_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = (
        "{steps: 2, global_batch_size: 1, micro_batch_size: 1, optimizer.warmup_steps: 0, validation.every_steps: null}"
    )
    given = {"model": "tiny", "data": "null", "limit": "2k", "ctx": "1k", "training": small, "lengths": "[512, 1k]",
             "suite": "perplexity", "held_out": "null", "short": "512", "preset": "smoke", "over.ctx": "[512, 1k]",
             "full_layers": "odd"}  # fmt: skip
    pipeline = presets.find("pipelines", name).data
    known = {*pipeline["values"], *(f"over.{axis}" for axis in pipeline.get("over", {}))}
    wanted = {key: value for key, value in given.items() if key in known}
    if name != "ablation" and "preset" in wanted:
        wanted["preset"] = "lora-alpha"
    sets = [part for key, value in wanted.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", "from ctxext.cli import main; main()", "run", name, *sets, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] and all(job["outcome"] == "ran" for job in found["jobs"])
