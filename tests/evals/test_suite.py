"""One report for many models and lengths, with rows that say what they are worth."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxext.errors import DataError, InputError
from ctxext.evals.suite import SUITES, evaluate


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat, and the dog did not. " * 60)
    return str(path)


def test_rows_flag_what_is_beyond_the_model(loaded: Any, data: str) -> None:
    report = evaluate([loaded], "perplexity", lengths=[256, 64, 128, 64], data=data, protocol="truncate")
    rows = report.rows()
    assert [(row["length"], row["extrapolated"]) for row in rows] == [(64, False), (128, False), (256, True)]
    assert {row["protocol"] for row in rows} == {"truncate"}
    assert len({result.text_tokens for result in report.models[0].results}) == 1


@pytest.mark.parametrize(("suite", "limit"), [("perplexity", 600), ("passkey", 1)])
def test_every_suite_gives_rows_and_json(loaded: Any, data: str, suite: str, limit: int) -> None:
    assert suite in SUITES
    said: list[tuple[str, int, int]] = []

    def listen(what: str, done: int, total: int) -> None:
        said.append((what, done, total))

    report = evaluate([loaded, loaded], suite, lengths=[200, 300], data=data, limit=limit, progress=listen)
    assert len(report.rows()) == 4
    back = json.loads(json.dumps(report.to_dict()))
    assert back["rows"] == report.rows()
    assert back["request"]["suite"] == suite
    assert back["data_fingerprint"]
    assert said and said[-1][1] == said[-1][2], said[-3:]


def test_a_model_is_found_by_path(loaded: Any, data: str, model_dir: Callable[..., Path]) -> None:
    path = str(model_dir(max_position_embeddings=128))
    by_path, by_hand = (
        evaluate([model], "perplexity", lengths=[64], data=data, device="cpu").rows() for model in (path, loaded)
    )
    assert by_path == by_hand


def test_passkey_hides_in_the_data_and_is_reproducible(loaded: Any, data: str) -> None:
    for source, name in [(data, data), ("grass", "grass"), ("embedded", "held-out")]:
        reports = [evaluate([loaded], "passkey", lengths=[200], data=source, limit=1, seed=7) for _ in range(2)]
        result = reports[0].models[0].results[0]
        assert (result.haystack, result.seed, result.overall.n) == (name, 7, 5)
        assert reports[0].to_dict() == reports[1].to_dict()


def test_embedded_perplexity_is_of_the_held_out_part(loaded: Any) -> None:
    from ctxext.data.documents import fingerprint

    report = evaluate([loaded], "perplexity", lengths=[64], limit=256)
    assert report.data_fingerprint == fingerprint("embedded", split="held-out")
    assert report.models[0].results[0].text_tokens >= 256


@pytest.mark.parametrize(
    ("suite", "options", "said"),
    [
        ("ruler", {}, "perplexity, passkey"),
        ("perplexity", {"lengths": []}, "at least one"),
        ("perplexity", {"lengths": [1]}, "at least 2 tokens"),
        ("perplexity", {"limit": 0}, "limit is 0"),
        ("perplexity", {"limit": 63}, "less than one window of 64"),
        ("perplexity", {"protocol": "mean"}, "hf-stride, longlora, truncate"),
        ("perplexity", {"data": "none.txt"}, "no such file"),
        ("passkey", {"data": "none.txt"}, "no such file"),
    ],
)
def test_refusals_come_before_any_model_is_looked_for(
    data: str, suite: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        evaluate(["./no-such-model"], suite, **{"lengths": [64], "data": data, **options})


def test_a_model_that_is_not_there_is_refused_before_one_that_is_runs(loaded: Any, data: str) -> None:
    with pytest.raises(InputError, match="no-such-model"):
        evaluate(
            [loaded, "./no-such-model"],
            "perplexity",
            lengths=[64],
            data=data,
            progress=lambda *call: pytest.fail(f"ran: {call}"),
        )
    with pytest.raises(InputError, match="no model"):
        evaluate([], "perplexity", lengths=[64], data=data)


def test_refusing_costs_no_torch() -> None:
    code = """
import sys
from ctxext.errors import InputError
from ctxext.evals.suite import evaluate
try:
    evaluate(["./no-such-model"], "passkey", lengths=[512], data="grass")
except InputError:
    sys.exit(3 if "torch" in sys.modules or "transformers" in sys.modules else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_too_little_text(loaded: Any, data: str) -> None:
    with pytest.raises(DataError, match="one window needs 9,000"):
        evaluate([loaded], "perplexity", lengths=[9000], data=data)
