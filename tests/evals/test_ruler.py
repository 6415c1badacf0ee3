"""Matches by hand, averages over tasks, cases from their file, and lm-eval's scorer on the same answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from ctxext.data.cases import Case, prompt_ids, write_cases
from ctxext.data.ruler_tasks import QA, TASKS, Ask, Material, Questions
from ctxext.errors import DataError, InputError
from ctxext.evals.eval_spec import Ruler
from ctxext.evals.item_runner import Ledger, Outcome, batches, run_job
from ctxext.evals.ruler import RulerQuestion, job, rows, scored, suite_name
from ctxext.evals.scores import string_match_all, string_match_part
from ctxext.model.decode import generate

WORDS = tuple("".join(parts) for parts in product(("ba", "ko", "lu", "mi", "re", "sa"), repeat=3))
LENGTH = 3_000  # a token is a byte


def test_matches_by_hand() -> None:
    assert string_match_all("The values are 12 and 7.", ["12", "7", "9", "34"]) == 0.5
    assert string_match_all("ABC abd", ["abc", "ABD"]) == 1.0
    assert string_match_all("", ["a", "b"]) == 0.0
    assert string_match_part("in PARIS", ["London", "paris"]) == 1.0
    assert string_match_part("nowhere", ["London", "paris"]) == 0.0
    assert string_match_part("", ["a"]) == 0.0
    assert string_match_all("new\x07york", ["new york"]) == 0.0
    assert string_match_all("new\x07york", ["new\nyork"]) == 1.0, "control characters are line ends"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """One case of each task: what is asked matters here, not that it fits."""
    documents = tuple(f"Document {i} is about w{i}." for i in range(20))
    entries = tuple((f"What is {i} about?", (f"w{i}", f"about w{i}"), (i,), ()) for i in range(3))
    questions = Questions(documents, entries)
    material = Material(("Some", "text."), WORDS[:90], WORDS[90:120], WORDS, {"qa_1": questions, "qa_2": questions})
    made = []
    for name, task in TASKS.items():
        prompt, references, facts = task.make(Ask(name, LENGTH, 0), task.least + 5, material)
        made.append(Case(f"{name}/{LENGTH}/0", name, LENGTH, prompt, references, task.new_tokens, facts))
    return made


def right(cases: Sequence[Case]) -> list[str]:
    return [" " + ", ".join(case.references).upper() for case in cases]


def silent(cases: Sequence[Case]) -> list[str]:
    return ["" for _ in cases]


def test_an_oracle_has_100_and_silence_0(cases: list[Case]) -> None:
    questions = [RulerQuestion(case) for case in cases]
    for answers, score, effective in ((right, 100.0, LENGTH), (silent, 0.0, None)):
        outcomes = [outcome for batch in batches(questions, 4 * LENGTH) for outcome in scored(answers, batch)]
        made = rows("p", outcomes)
        assert [(row.task, row.length) for row in made] == [("", LENGTH), *((task, LENGTH) for task in TASKS)]
        assert {(row.value, row.metric, row.suite) for row in made} == {(score, "score", "ruler")}
        assert made[0].n == 13 and made[0].details["effective_length"] == effective
        assert list(outcomes[0].details) == ["answer", "references"]


def test_cases_that_generate_alike_are_answered_together(cases: list[Case]) -> None:
    requested: list[list[int]] = []

    def answers(cases: Sequence[Case]) -> list[str]:
        requested.append([case.max_new_tokens for case in cases])
        return ["x" * 700 for _ in cases]

    outcomes = scored(answers, [RulerQuestion(case) for case in cases])
    assert requested == [[128] * 8, [30], [120], [50], [32, 32]]
    assert [outcome.id for outcome in outcomes] == [case.id for case in cases]
    assert {len(outcome.details["answer"]) for outcome in outcomes} == {500}


def test_qa_needs_one_of_its_references_and_the_rest_all(cases: list[Case]) -> None:
    first = [
        outcome.score for outcome in scored(lambda cs: [c.references[0] for c in cs], list(map(RulerQuestion, cases)))
    ]
    shares = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    assert first == [1 / shares.get(case.task, 1) for case in cases]


def outcome(task: str, length: int, score: float, i: int = 0) -> Outcome:
    return Outcome(f"{task}/{length}/{i}", task, length, score)


def test_the_average_is_over_tasks_and_effective_is_the_longest_that_passes() -> None:
    outcomes = [outcome("vt", 1000, 1.0, i) for i in range(3)] + [outcome("cwe", 1000, 0.0)]
    outcomes += [outcome("vt", 2000, 1.0), outcome("cwe", 2000, 0.9)]
    outcomes += [outcome("vt", 4000, 1.0), outcome("cwe", 4000, 0.712)]
    outcomes += [outcome("vt", 8000, 1.0), outcome("cwe", 8000, 0.711)]
    made = rows("p", outcomes)
    assert [(row.length, row.task, row.n) for row in made] == [
        (1000, "", 4),
        (2000, "", 2),
        (4000, "", 2),
        (8000, "", 2),
        *(
            (length, task, 3 if (length, task) == (1000, "vt") else 1)
            for length in (1000, 2000, 4000, 8000)
            for task in ("vt", "cwe")
        ),
    ]
    assert [row.value for row in made[:4]] == pytest.approx([50.0, 95.0, 85.6, 85.55])
    assert {row.details["effective_length"] for row in made[:4]} == {4000}
    assert made[0].details["tasks"] == ["vt", "cwe"]


def test_names() -> None:
    assert suite_name(list(TASKS)) == "RULER-13"
    assert suite_name([task for task in TASKS if task not in QA]) == "RULER-11 (no QA)"
    assert suite_name([task for task in TASKS if task != "qa_2"]) == "RULER-12 (no qa_2)"
    assert suite_name(["vt", "qa_1"]) == "RULER, 2 of 13 tasks (vt, qa_1)"


def test_cases_are_made_once_and_read_again(loaded: Any, tmp_path: Path) -> None:
    spec = Ruler(lengths=(2_600, LENGTH), tasks=("fwe", "vt"), cases=2, limit=6, data="grass", seed=3)
    first = job(loaded, spec, tmp_path)
    assert [item.id for item in first.items] == [
        which.format(length) for length in (2_600, LENGTH) for which in ("vt/{}/0", "vt/{}/1", "fwe/{}/0")
    ]
    assert first.notes[0] == "ruler: RULER, 2 of 13 tasks (vt, fwe), 6 cases"
    [path] = (tmp_path / "cases").glob("ruler-????????.jsonl")
    manifest = json.loads((tmp_path / "cases" / f"{path.name}.manifest.json").read_text())
    assert (manifest["seed"], manifest["lengths"], manifest["tasks"]) == (3, [2_600, LENGTH], ["vt", "fwe"])
    before = path.stat().st_mtime_ns
    assert job(loaded, spec, tmp_path).items == first.items and path.stat().st_mtime_ns == before
    given = replace(spec, from_cases=str(path), limit=None, lengths=(LENGTH,))
    assert job(loaded, given, tmp_path / "absent").items == first.items[3:]
    assert job(loaded, replace(spec, seed=4), tmp_path).items != first.items


def test_a_model_answers(loaded: Any, stand_in: Any, tmp_path: Path) -> None:
    """Each case with its own number of tokens, batched, as one by one, and without special tokens."""
    made = [
        Case(f"{task}/60/{i}", task, 60, f"Which {task} is number {i}?" * (1 + i), ("x", "y"), count)
        for task, count in (("vt", 6), ("fwe", 4))
        for i in range(2)
    ]
    said = [
        generate(loaded.model, [prompt_ids(loaded.tokenizer, case.prompt)], case.max_new_tokens, stop=[0])[0]
        for case in made
    ]
    assert [len(ids) for ids in said] == [6, 6, 4, 4]
    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.add_tokens([AddedToken(tokenizer.convert_ids_to_tokens(said[0][0]), special=True)], special_tokens=True)
    write_cases(path := tmp_path / "cases.jsonl", made, {"haystack": "nothing", "seed": 7})
    ran = job(stand_in(loaded.model, tokenizer), Ruler(lengths=(60,), from_cases=str(path)), tmp_path)
    reported = run_job(ran, ledger := Ledger(), 1_000, lambda *_: None)
    assert {row.protocol for row in reported} == {
        "RULER, 2 of 13 tasks (vt, fwe), string match, greedy, haystack nothing, seed 7"
    }
    for case, ids in zip(made, said, strict=True):
        answer = loaded.tokenizer.decode([token for token in ids if token != said[0][0]])
        assert ledger.outcomes[case.id].details["answer"] == answer
        assert ledger.outcomes[case.id].score == string_match_all(answer, ["x", "y"])


def test_a_file_that_is_given_must_fit(loaded: Any, cases: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    write_cases(path, cases, {"tokenizer": "other"})
    spec = Ruler(lengths=(LENGTH,), from_cases=str(path))
    assert [item.case for item in job(loaded, spec, tmp_path).items] == cases
    assert "made with another tokenizer" in job(loaded, spec, tmp_path).notes[1]
    assert [item.case.task for item in job(loaded, replace(spec, tasks=("cwe", "vt")), tmp_path).items] == ["vt", "cwe"]
    with pytest.raises(InputError, match="no case of the requested lengths") as refused:
        job(loaded, replace(spec, lengths=(4096,)), tmp_path)
    assert refused.value.hint and "the lengths 3,000" in refused.value.hint
    for strange in (replace(cases[0], task="niah"), replace(cases[0], references=())):
        write_cases(path, [strange], {})
        with pytest.raises(DataError, match="is not a case of RULER"):
            job(loaded, spec, tmp_path)


def test_refusals(loaded: Any, tmp_path: Path) -> None:
    spec = Ruler(lengths=(LENGTH,), cases=1, data="grass")
    for changes, message in (
        ({"tasks": ("qa_1",)}, "`squad` is not given"),
        ({"tasks": ("vt",), "lengths": (500,)}, r"vt at 500 needs [\d,]+ tokens"),
        ({"tasks": ("passkey",)}, "no task 'passkey'"),
        ({"tasks": ("vt", "qa_1"), "squad": str(tmp_path / "absent")}, "cannot read the questions"),
    ):
        with pytest.raises(InputError, match=message):
            job(loaded, replace(spec, **changes), tmp_path)


def test_qa_is_left_out_by_name(loaded: Any, tmp_path: Path) -> None:
    pytest.importorskip("wonderwords", reason="wonderwords is not installed: RULER-11 was not made whole")
    made = job(loaded, Ruler(lengths=(3_500,), cases=1), tmp_path)
    assert len(made.items) == 11
    assert made.notes[:3] == (
        "ruler: RULER-11 (no QA), 11 cases",
        "ruler: qa_1 is left out: give `squad`, the path of its official JSON",
        "ruler: qa_2 is left out: give `hotpotqa`, the path of its official JSON",
    )


def test_lm_eval_scores_the_same(cases: list[Case]) -> None:
    """Its qa score is the share of references found, not whether one is found: for one reference that is the same."""
    theirs = pytest.importorskip(
        "lm_eval.tasks.ruler.common_utils",
        reason="lm-eval with its ruler extra is not installed: our scores were not compared with its own",
    )
    compared = 0
    for case in cases:
        half = ", ".join(case.references[: len(case.references) // 2])
        answers = [
            right([case])[0],
            half,
            "nothing of it",
            "",
            " \t\n",
            f"\x00{case.references[0]}\x07 \x1f",
            *case.references,
        ]
        answers += [case.references[-1][:2] + "\x01" + case.references[-1][2:]]
        for answer in answers:
            doc = {"max_length": 4096, "outputs": list(case.references)}
            [ours] = scored(lambda _, answer=answer: [answer], [RulerQuestion(case)])
            if case.task in QA:
                share = theirs.process_results_part(doc, [answer])["4096"]
                assert share == string_match_all(answer, case.references)
                assert ours.score == float(share > 0)
                doc["outputs"] = doc["outputs"][:1]
                alone = string_match_part(answer, doc["outputs"])
                assert theirs.process_results_part(doc, [answer])["4096"] == alone
            else:
                assert theirs.process_results(doc, [answer])["4096"] == ours.score
            compared += 1
    assert compared > 100
