"""Cases fit, carry their needle at its depth, and are answered by a model that copies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctxext.data.niah import BEFORE, NEEDLE, QUESTION, niah_case
from ctxext.errors import InputError
from ctxext.evals import niah
from ctxext.evals.engine import Ledger, run_job
from ctxext.evals.spec import Niah


def spec(**fields: Any) -> Niah:
    return Niah(**{"lengths": (700, 900), "depths": (0.0, 0.5, 1.0), "cases": 2, "data": "grass", **fields})


@pytest.mark.parametrize("data", ["grass", "embedded"])
def test_every_case_fits_and_has_its_needle_where_it_says(loaded: Any, data: str) -> None:
    questions = niah.job(loaded, spec(data=data), Path()).items
    assert len(questions) == 2 * 3 * 2 and len({question.id for question in questions}) == 12
    for question in questions:
        case = question.case
        spare = case.length - len(question.ids) - case.max_new_tokens
        assert 0 <= spare < 60, (case.id, spare)
        needle = NEEDLE.format(key=case.facts["key"], value=case.references[0])
        assert case.prompt.count(needle) == 1 and case.prompt.count(case.references[0]) == 1
        body = case.prompt.removeprefix(BEFORE).removesuffix(QUESTION.format(key=case.facts["key"]))
        before, after = (len(part.split()) for part in body.split(needle))
        assert abs(before / (before + after) - case.facts["depth"]) < 0.02, (case.id, before, after)


def test_what_copies_scores_100_and_what_does_not_0(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = niah.job(loaded, spec(), Path())
    by_prompt = {tuple(question.ids): question.case.references[0] for question in job.items}

    def copying(model: Any, prompts: Any, *_: Any, **__: Any) -> list[list[int]]:
        return [loaded.tokenizer.encode(f" {by_prompt[tuple(ids)]}.", add_special_tokens=False) for ids in prompts]

    random = run_job(job, Ledger(), 2048, lambda *_: None)
    monkeypatch.setattr(niah, "generate", copying)
    perfect = run_job(job, Ledger(), 2048, lambda *_: None)
    assert [(row.value, row.n) for row in perfect] == [(1.0, 6)] * 2
    assert [row.value for row in random] == [0.0, 0.0]
    assert perfect[0].details["by_depth"] == {"0.0": 1.0, "0.5": 1.0, "1.0": 1.0}


def test_cases_are_the_same_in_every_process_and_do_not_depend_on_each_other() -> None:
    code = "from ctxext.data.niah import niah_case; print(niah_case(list('abcdefgh'), 20, 64, 0.5, 3, 7).prompt)"
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    here = niah_case(list("abcdefgh"), 20, 64, 0.5, 3, 7).prompt
    assert [run.stdout.decode().removesuffix("\n") for run in runs] == [here, here]


def test_a_length_without_room_is_refused(loaded: Any) -> None:
    with pytest.raises(InputError, match="at least"):
        niah.job(loaded, spec(lengths=(64,)), Path())
