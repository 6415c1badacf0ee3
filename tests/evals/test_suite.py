"""One report for many models, suites and lengths; rows say what they are worth; a run that was killed goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctxext.api import evaluate as evaluate_written
from ctxext.config import manifest as manifests
from ctxext.config import presets
from ctxext.errors import DataError, EnvironmentFault, InputError, SpecError
from ctxext.eval_and_merge import eval_models, plan_eval
from ctxext.evals import item_runner
from ctxext.evals.eval_spec import SUITES, EvalSpec, eval_spec_from_options
from ctxext.evals.suite import evaluate
from ctxext.evals.suites import CHECKS, PREPARED, module_of
from ctxext.model.source import resolve
from ctxext.train.measured import measured_length


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat, and the dog did not. " * 60)
    return str(path)


def spec(suite: str, data: str, **given: Any) -> EvalSpec:
    return eval_spec_from_options(suite, {"data": data, "lengths": [64], **given})


def test_every_suite_has_a_job_and_every_other_table_knows_suites_alone() -> None:
    assert all(callable(module_of(suite).job) for suite in SUITES)
    assert set(CHECKS) <= set(SUITES)
    assert {suite for suite in SUITES if hasattr(module_of(suite), "prepare")} == set(PREPARED)
    checked = {suite for suite in SUITES if hasattr(module_of(suite), "check")}
    assert checked == {"longppl", "longbench", "short"} and checked <= set(CHECKS)


def test_rows_flag_what_is_beyond_the_model(loaded: Any, data: str) -> None:
    given = spec("perplexity", data, lengths=[256, 64, 128, 64], protocol="truncate", extrapolate=True)
    report = evaluate([loaded], given)
    rows = report.rows()
    assert [(row["length"], row["extrapolated"]) for row in rows] == [(64, False), (128, False), (256, True)]
    assert {row["protocol"] for row in rows} == {f"truncate, stride {n}, on {data}" for n in (64, 128, 256)}
    assert len({row["details"]["text_tokens"] for row in rows}) == 1
    nested = report.to_dict()["models"][0]["suites"][0]["rows"]
    assert [row["extrapolated"] for row in nested] == [False, False, True]


def test_a_length_beyond_the_model_is_refused_unless_asked_for(loaded: Any, data: str) -> None:
    with pytest.raises(InputError, match="length 256 is beyond the usable length of model, 128 tokens") as caught:
        evaluate([loaded], spec("perplexity", data, lengths=[64, 256]))
    assert "--extrapolate" in str(caught.value.hint)


def test_several_suites_of_one_call_and_json(loaded: Any, data: str) -> None:
    said: list[tuple[str, int, int]] = []

    def listen(what: str, done: int, total: int) -> None:
        said.append((what, done, total))

    given = spec("perplexity,passkey", data, lengths=[110, 120], cases=1)
    given = replace(given, suites=(replace(given.suites[0], limit=600), given.suites[1]))
    report = evaluate([loaded, loaded], given, progress=listen)
    assert [suite.suite for suite in report.models[0].suites] == ["perplexity", "passkey"]
    assert len(report.rows()) == 8
    assert json.loads(json.dumps(report.to_dict()))["models"][1]["layout"] == "FFFF"
    assert said and said[-1][1] == said[-1][2], said[-3:]
    captions = [(header[0], len(rows), len(header)) for _, header, rows in report.tables()]
    assert captions == [("perplexity", 2, 3), ("passkey", 2, 3)]


def test_a_model_is_found_by_path(loaded: Any, data: str, model_dir: Callable[..., Path]) -> None:
    path = str(model_dir(max_position_embeddings=128))
    by_path, by_hand = (evaluate([model], spec("perplexity", data), device="cpu").rows() for model in (path, loaded))
    assert by_path == by_hand


def test_passkey_hides_in_the_data_and_is_reproducible(loaded: Any, data: str) -> None:
    for source, name in [(data, data), ("grass", "repeated grass"), ("embedded", "held-out embedded text")]:
        given = spec("passkey", source, lengths=[120], cases=1, seed=7)
        reports = [evaluate([loaded], given) for _ in range(2)]
        (row,) = reports[0].rows()
        assert f"hidden in {name}" in row["protocol"] and row["n"] == 5 and row["details"]["seed"] == 7
        assert reports[0].rows() == reports[1].rows()


@pytest.mark.parametrize(
    ("suite", "given", "said"),
    [
        ("perplexity", {"limit": 63}, "less than one window of 64"),
        ("perplexity", {"data": "none.txt"}, "no such file"),
        ("passkey", {"data": "none.txt"}, "no such file"),
        ("niah", {"data": "none.txt"}, "no such file"),
        ("perplexity", {"lengths": [1]}, "at least 2 tokens"),
    ],
)
def test_refusals_at_planning(model_dir: Callable[..., Path], suite: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_eval([str(model_dir())], suite, {"lengths": [64], **given})


@pytest.mark.parametrize(
    ("suite", "given", "error", "said"),
    [
        ("mmlu", {}, InputError, "perplexity, longppl, passkey, niah, ruler, longbench, short, retrieval, smoke"),
        ("perplexity", {"cases": 3}, InputError, "cases is not a field of perplexity"),
        ("perplexity,passkey", {"niah.cases": 3}, InputError, "niah.cases is not a field"),
        ("perplexity", {"lengths": []}, SpecError, "lengths"),
        ("perplexity", {"limit": 0}, SpecError, "limit"),
        ("perplexity", {"protocol": "mean"}, SpecError, "longlora"),
        ("passkey", {"depths": [1.5]}, SpecError, "depths"),
        ("passkey", {"cases": 0}, SpecError, "cases"),
    ],
)
def test_refusals_of_what_is_asked(suite: str, given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        eval_spec_from_options(suite, given)


def test_options_reach_the_suites_that_have_them() -> None:
    given = eval_spec_from_options(
        "perplexity,passkey,niah", {"seed": 3, "niah.cases": 2, "lengths": ["1k"], "dtype": "bfloat16"}
    )
    perplexity, passkey, niah = given.suites
    assert (passkey.seed, niah.seed, niah.cases, passkey.cases, given.dtype) == (3, 3, 2, 10, "bfloat16")
    assert {suite.lengths for suite in given.suites} == {(1024,)}
    assert not hasattr(perplexity, "seed")


@pytest.mark.parametrize("preset", presets.names("eval"))
def test_every_preset_loads(preset: str) -> None:
    assert eval_spec_from_options(preset, {}).suites


def test_a_model_that_is_not_there_is_refused_before_one_that_is_runs(loaded: Any, data: str) -> None:
    with pytest.raises(InputError, match="no-such-model"):
        evaluate(
            [loaded, "./no-such-model"], spec("perplexity", data), progress=lambda *call: pytest.fail(f"ran: {call}")
        )
    with pytest.raises(InputError, match="no model"):
        evaluate([], spec("perplexity", data))


def test_refusing_costs_no_torch() -> None:
    code = """
import sys
from ctxext.errors import InputError
from ctxext.eval_and_merge import plan_eval
for models, options in ((["./no-such-model"], {}), (["tiny"], {"lengths": ["64k"]}), (["tiny"], {"data": "x.txt"})):
    try:
        plan_eval(models, "perplexity", options)
        sys.exit(4)
    except InputError:
        pass
sys.exit(3 if "torch" in sys.modules or "transformers" in sys.modules else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_too_little_text(loaded: Any, data: str) -> None:
    with pytest.raises(DataError, match="one window needs 9,000"):
        evaluate([loaded], spec("perplexity", data, lengths=[9000], extrapolate=True))


def test_models_are_compared_pair_by_pair(model_dir: Callable[..., Path], data: str) -> None:
    models = [str(model_dir()), str(model_dir(seed=1)), str(model_dir(seed=0))]
    report = evaluate(models, spec("perplexity", data), against=0)
    other, same = report.differences
    assert (same.value, same.low, same.high, same.called) == (0, 0, 0, "no difference shown")
    figures = [row["details"]["nats_per_token"] for row in report.rows()]
    assert other.value == pytest.approx(figures[1] - figures[0], abs=1e-9)
    assert other.low <= other.value <= other.high and 0 < other.p <= 1
    assert len({row["model"] for row in report.rows()}) == 3, "models of one name are told apart"


def test_a_killed_evaluation_goes_on_and_runs_nothing_twice(
    model_dir: Callable[..., Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = [str(model_dir()), str(model_dir(seed=1))]
    given = {"data": data, "lengths": [64], "tokens_per_batch": 128, "limit": 640}
    ran, limit, run_job = list[str](), 20, item_runner.run_job

    def counted(job: item_runner.SuiteJob, *rest: Any) -> list[item_runner.ResultRow]:
        def run(batch: Any) -> list[item_runner.Outcome]:
            if len(ran) >= limit:
                raise KeyboardInterrupt
            ran.extend(item.id for item in batch)
            return job.run(batch)

        return run_job(replace(job, run=run), *rest)

    monkeypatch.setattr("ctxext.evals.suite.run_job", counted)
    first = plan_eval(models, "perplexity", given)
    with pytest.raises(KeyboardInterrupt):
        eval_models(first)
    assert not (first.out / "ctxext.json").exists()
    with pytest.raises(InputError, match="exists"):
        plan_eval(models, "perplexity", {**given, "lengths": [32]}, out=first.out)
    second, limit = plan_eval(models, "perplexity", given), 10**9
    assert (second.out, second.resumes) == (first.out, True)
    report = eval_models(second)
    windows = sum(row["details"]["windows"] for row in report.rows())
    assert len(ran) == windows, "a window ran twice, or never"
    assert report.rows() == evaluate(models, eval_spec_from_options("perplexity", given)).rows()
    assert (first.out / "ctxext.json").exists()
    third = plan_eval(models, "perplexity", given)
    assert third.out != first.out and not third.resumes


def test_one_that_is_running_is_left_alone(
    model_dir: Callable[..., Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, plans = {"data": data, "lengths": [64]}, []

    def meanwhile(*_: Any) -> None:
        if not plans:
            plans.append(plan_eval([str(model_dir())], "perplexity", given))

    plan = plan_eval([str(model_dir())], "perplexity", given)
    eval_models(plan, progress=meanwhile)
    assert plans[0].out != plan.out and not plans[0].resumes


def test_out_of_memory_says_what_helps_and_keeps_what_is_done(
    model_dir: Callable[..., Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: item_runner.SuiteJob, ledger: item_runner.Ledger, *_: Any) -> list[item_runner.ResultRow]:
        ledger.add(job.run(job.items[:1]))
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("ctxext.evals.suite.run_job", full)
    with pytest.raises(EnvironmentFault, match="out of memory in perplexity of model") as caught:
        evaluate([str(model_dir())], spec("perplexity", data), place=tmp_path)
    assert "tokens_per_batch=1" in str(caught.value.hint)
    assert len((tmp_path / "outcomes" / "0-perplexity-0.jsonl").read_text().splitlines()) == 1


def test_longlora_says_first_how_long_it_will_take(loaded: Any, data: str) -> None:
    told: list[str] = []
    given = spec("perplexity", data, lengths=[128], protocol="longlora", limit=600)  # windows 256 apart
    evaluate([loaded], given, progress=lambda *_: told.append("ran"), notice=told.append)
    assert "read 1 file, 1 document, 600 tokens" in told[0], told
    assert "2 windows, 256 tokens to run" in told[1] and "256 tokens apart skip text at length 128" in told[2], told
    assert "longlora computes each token" in told[3] and told[4] == "ran", told


def test_depths_are_drawn_beside_the_numbers(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    given = {"lengths": [110, 120], "data": "grass", "cases": 1, "extrapolate": True}
    eval_models(plan_eval([str(model_dir())], "passkey", given, out=tmp_path / "out"))
    picture = (tmp_path / "out" / "0-passkey-0.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_perplexity_is_not_paired_across_tokenizers(model_dir: Callable[..., Path], stories: Path, data: str) -> None:
    told: list[str] = []
    given = spec("perplexity,niah", data, lengths=[512], extrapolate=True)
    given = replace(given, suites=(given.suites[0], replace(given.suites[1], cases=1, data="grass")))
    report = evaluate([str(model_dir()), str(stories)], given, against=0, notice=told.append)
    assert {difference.suite for difference in report.differences} == {"niah"}
    assert any("different tokenizers" in line for line in told)


def test_what_a_run_goes_on_from_is_the_same_in_all_that_it_reads(
    model_dir: Callable[..., Path],
    write_model: Callable[..., Path],
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same spec and weights, another text, config or tokenizer: not the same request."""
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model")
    given = {"data": data, "lengths": [64]}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "ctxext.evals.suite.run_job", lambda job, ledger, *_: (ledger.add(job.run(job.items[:1])), killed())
        )
        with pytest.raises(KeyboardInterrupt):
            eval_models(plan_eval([str(model)], "perplexity", given))
    assert plan_eval([str(model)], "perplexity", given).resumes
    files = {Path(data): "x", model / "config.json": None, model / "tokenizer_config.json": None}
    for path, more in files.items():
        before = path.read_text()
        changed = before + more if more else json.dumps(json.loads(before) | {"rms_norm_eps": 0.5})
        path.write_text(changed)
        assert not plan_eval([str(model)], "perplexity", given).resumes, path
        path.write_text(before)


def test_force_keeps_the_old_result_until_the_new_run_has_something(
    model_dir: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    out, models = tmp_path / "out", [str(model_dir())]
    eval_models(plan_eval(models, "perplexity", {"data": data, "lengths": [64]}, out=out))
    before = (out / "results.json").read_bytes()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{')
    plan = plan_eval(models, "perplexity", {"data": str(broken), "lengths": [64]}, out=out, force=True)
    with pytest.raises(DataError, match="broken.jsonl:2"):
        eval_models(plan, force=True)
    assert (out / "results.json").read_bytes() == before


def test_force_does_not_replace_one_that_is_running(model_dir: Callable[..., Path], data: str, tmp_path: Path) -> None:
    out, models, said = tmp_path / "out", [str(model_dir())], list[str]()

    def meanwhile(*_: Any) -> None:
        with pytest.raises(InputError) as caught:
            plan_eval(models, "perplexity", {"data": data, "lengths": [32]}, out=out, force=True)
        said.append(str(caught.value))

    eval_models(plan_eval(models, "perplexity", {"data": data, "lengths": [64]}, out=out), progress=meanwhile)
    assert said and "being written by another" in said[0]


def test_two_suites_of_one_kind_are_two_tables(loaded: Any, data: str, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    protocols = "".join(f"- {{suite: perplexity, protocol: {name}}}\n" for name in ("truncate", "hf-stride"))
    path.write_text("suites:\n" + protocols)
    report = evaluate([loaded], eval_spec_from_options(str(path), {"data": data, "lengths": [64]}))
    made = report.tables()
    assert [caption.split(",")[0] for caption, _, _ in made] == ["perplexity: truncate", "perplexity: hf-stride"]
    assert made[0][2] != made[1][2]


@pytest.mark.parametrize("text", ["suites: [passkey, niah]\n", "suites:\n", "suites: 3\n", "- {suite: [x]}\n"])
def test_a_preset_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(SpecError):
        eval_spec_from_options(str(path), {"limit": 3})


def test_a_limit_below_a_case_a_length_is_refused(model_dir: Callable[..., Path]) -> None:
    given = {"lengths": [256, 400, 512], "limit": 2, "data": "grass", "extrapolate": True}
    with pytest.raises(InputError, match="less than one case for each of 3 lengths"):
        plan_eval([str(model_dir())], "passkey", given)


def test_keys_that_an_evaluator_found_outlive_a_run_that_failed(
    model_dir: Callable[..., Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    models = [str(model_dir(max_position_embeddings=128))]
    given = {"evaluator": models[0], "data": data, "lengths": [128]}
    monkeypatch.setattr("ctxext.evals.suite.run_job", killed)
    with pytest.raises(KeyboardInterrupt):
        eval_models(plan_eval(models, "longppl", given, out=tmp_path / "out"))
    assert list((tmp_path / "out" / "keys").glob("*.jsonl"))
    assert plan_eval(models, "longppl", given, out=tmp_path / "out").resumes


def test_a_plan_knows_how_far_a_model_was_measured(model_dir, tmp_path):
    """What an evaluation writes is what train/measured.py reads: once one had a name that the other did not."""
    model, text = model_dir("llama"), tmp_path / "text.txt"
    text.write_text("A text that is long enough for a few windows of it. " * 40)
    assert measured_length(resolve(str(model)), tmp_path) is None
    evaluate_written(
        str(model), suite="perplexity", lengths=[16, 48], data=str(text), limit="200", out=tmp_path / "eval"
    )
    assert measured_length(resolve(str(model)), tmp_path) == 48


def test_a_printed_plan_reads_no_weights(model_dir, tmp_path, monkeypatch):
    """Weights that are not remembered are not hashed for it, with evals beside it or without."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = resolve(str(model_dir("llama")))
    own = {"model": {"path": str(source.path), "weights": {"model.safetensors": "0" * 64}}}
    (tmp_path / "runs" / "eval").mkdir(parents=True)
    manifests.write(tmp_path / "runs" / "eval", manifests.new("eval", spec={}, parents=own, facts={"longest": 48}))
    assert measured_length(source, tmp_path / "runs") is None
    assert not (tmp_path / "cache").exists()  # where a hash that was computed would be kept
    hashes = manifests.weight_hashes(source.directory)
    measured = {"model": {"path": "elsewhere", "weights": hashes}}
    manifests.write(tmp_path / "runs" / "eval", manifests.new("eval", spec={}, parents=measured, facts={"longest": 48}))
    assert measured_length(source, tmp_path / "runs") == 48
