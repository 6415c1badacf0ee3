"""Every task fits its length, a case is the same wherever it is made, files are read and kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ctxext.data import ruler
from ctxext.data.cases import Case, prompt_ids
from ctxext.data.ruler_tasks import QA, TASKS, Ask, Material
from ctxext.errors import DataError, EnvironmentFault, InputError

SHORT, LONG = 3_000, 9_000  # on both sides of the length from where cwe repeats more; a token is a byte
SYLLABLES = ("ba", "ko", "lu", "mi", "re", "sa", "to", "vu")
WORDS = tuple("".join(parts) for parts in product(SYLLABLES, repeat=3))
HAY = (
    "The ferry left at noon. Nobody on the quay had seen it go! Was it early, or were the clocks late? An old man said "
    "that it was neither. (He had been wrong before.) The gulls came back, one by one, and sat on the rail."
)
ARTICLES = [[f"Paragraph {p} of article {a} says that its word is w{a}x{p}." for p in range(4)] for a in range(30)]


def squad() -> dict[str, Any]:
    """The official form: article 0's first question cannot be answered."""

    def qa(a: int, p: int) -> dict[str, Any]:
        word = f"w{a}x{p}"
        return {
            "question": f"What is the word of paragraph {p} of article {a}?",
            "answers": [] if (a, p) == (0, 0) else [{"text": word}, {"text": f"word is {word}"}],
            "is_impossible": (a, p) == (0, 0),
        }

    return {
        "data": [
            {"paragraphs": [{"context": text, "qas": [qa(a, p)]} for p, text in enumerate(article)]}
            for a, article in enumerate(ARTICLES)
        ]
    }


def hotpotqa() -> list[dict[str, Any]]:
    """The official form: every question has ten paragraphs, two of them with the answer."""
    return [
        {
            "question": f"Who is named in {i}?",
            "answer": f"name{i}",
            "context": [[f"Title {i}-{p}", [f"It is name{i if p < 2 else 100 + p}.", " So it is."]] for p in range(10)],
        }
        for i in range(5)
    ]


@pytest.fixture(scope="module")
def qa_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("qa")
    for name, data in (("squad", squad()), ("hotpotqa", hotpotqa())):
        (place / name).write_text(json.dumps(data))
    return {name: str(place / name) for name in ("squad", "hotpotqa")}


@pytest.fixture(scope="module")
def material(qa_files: dict[str, str]) -> Material:
    questions = {
        "qa_1": ruler.read_squad(Path(qa_files["squad"])),
        "qa_2": ruler.read_hotpotqa(Path(qa_files["hotpotqa"])),
    }
    return Material(tuple(HAY.split()), WORDS[:200], WORDS[200:300], WORDS, questions)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Callable[..., Path]) -> Any:
    """One token a byte, no BOS."""
    return AutoTokenizer.from_pretrained(model_dir())


class PairTokenizer:
    """Two bytes a token."""

    eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode()[::2])}


class WideTokenizer(PairTokenizer):
    """Three tokens a byte."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(3 * text.encode())}


@pytest.fixture(scope="module")
def cases(tokenizer: Any, material: Material) -> dict[tuple[str, int], list[Case]]:
    asks = [Ask(task, length, i) for task in TASKS for length in (SHORT, LONG) for i in range(2)]
    made: dict[tuple[str, int], list[Case]] = {}
    for case in ruler.make_cases(tokenizer, asks, material):
        made.setdefault((case.task, case.length), []).append(case)
    return made


each_task = pytest.mark.parametrize("task", TASKS)
each_length = pytest.mark.parametrize("length", [SHORT, LONG])


@each_length
@each_task
def test_a_case_fills_its_length_and_no_more(cases: Any, tokenizer: Any, task: str, length: int) -> None:
    new_tokens = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}.get(task, 128)
    for i, case in enumerate(cases[task, length]):
        assert (case.id, case.task, case.length) == (f"{task}/{length}/{i}", task, length)
        assert case.max_new_tokens == new_tokens
        tokens = len(prompt_ids(tokenizer, case.prompt))
        assert case.facts["prompt_tokens"] == tokens
        assert 0 <= length - tokens - new_tokens < 150, "a line or a document more would have fitted"


def test_depths_spread(tokenizer: Any, material: Material) -> None:
    asks = [Ask("niah_single_1", SHORT, i) for i in range(40)]
    places = [
        case.prompt.index("One of the") / len(case.prompt) for case in ruler.make_cases(tokenizer, asks, material)
    ]
    assert min(places) < 0.2 and max(places) > 0.75
    assert 0.35 < sum(places) / len(places) < 0.65


PINNED = {
    "niah_single_1": "843faafb10129b0d",
    "niah_single_2": "8f3a6777a2dff453",
    "niah_single_3": "3d15a5d387da5ab9",
    "niah_multikey_1": "8f69c1ba636ff345",
    "niah_multikey_2": "44ddb2d1f00de695",
    "niah_multikey_3": "2dd69db613b848b8",
    "niah_multivalue": "b5008204a45896ed",
    "niah_multiquery": "64e67501ed83d1da",
    "vt": "20bf28f792b35332",
    "cwe": "4ebc7efd5026d1e8",
    "fwe": "34c4e5cc34197a71",
    "qa_1": "eb2248a256407180",
    "qa_2": "a638b41fe10304b3",
}


def digest(cases: list[Case]) -> str:
    return hashlib.sha256(json.dumps([asdict(case) for case in cases]).encode()).hexdigest()[:16]


def test_cases_are_what_they_were(cases: Any) -> None:
    """A change here is a change of every number measured since: raise ruler.GENERATOR with it."""
    assert {task: digest(cases[task, SHORT] + cases[task, LONG]) for task in TASKS} == PINNED


SCRIPT = """
import hashlib, json, sys
from dataclasses import asdict
from ctxext.data import ruler
from ctxext.data.ruler_tasks import TASKS, Ask, Material

class PairTokenizer:
    eos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": list(text.encode()[::2])}

hay, words = json.load(sys.stdin)
asks = [Ask(task, 3000, i) for task in TASKS if not task.startswith("qa") for i in range(2)]
cases = ruler.make_cases(PairTokenizer(), asks, Material(hay, words[:200], words[200:300], words))
print(hashlib.sha256(json.dumps([asdict(case) for case in cases]).encode()).hexdigest()[:16])
"""


def test_another_process_makes_the_same_cases(material: Material) -> None:
    asks = [Ask(task, SHORT, i) for task in TASKS if not task.startswith("qa") for i in range(2)]
    words = Material(material.hay, material.nouns, material.adjectives, material.words)
    mine = digest(ruler.make_cases(PairTokenizer(), asks, words))
    given = json.dumps([material.hay, material.words])
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, input=given, capture_output=True, text=True
        )
        assert run.stdout.strip() == mine, run.stderr


def test_a_case_does_not_depend_on_the_others(cases: Any, tokenizer: Any, material: Material) -> None:
    for task in TASKS:
        assert ruler.make_cases(tokenizer, [Ask(task, SHORT, 1)], material) == cases[task, SHORT][1:]
    other = ruler.make_cases(tokenizer, [Ask("vt", SHORT, 0, seed=1)], material)
    assert other[0].references != cases["vt", SHORT][0].references


@each_task
def test_a_tokenizer_decides_the_filler_alone(cases: Any, material: Material, task: str) -> None:
    [longer] = ruler.make_cases(PairTokenizer(), [Ask(task, SHORT, 0)], material)
    case = cases[task, SHORT][0]
    assert longer.references == case.references and longer.facts["size"] > case.facts["size"]
    assert longer.prompt.splitlines()[-1] == case.prompt.splitlines()[-1]
    assert longer.facts.get("depths") == case.facts.get("depths")


def test_what_is_too_short_is_refused_with_what_would_do(tokenizer: Any, material: Material) -> None:
    asks = [Ask(task, 900, i) for task in ("niah_single_1", "vt", "cwe") for i in range(3)]
    with pytest.raises(InputError, match="do not all fit") as refused:
        ruler.make_cases(tokenizer, asks, material)
    needs = dict(re.findall(r"(\w+) at 900 needs ([\d,]+) tokens", refused.value.message))
    assert set(needs) == {"vt", "cwe"}
    for task, need in needs.items():
        length = int(need.replace(",", ""))
        assert f"{length:,}" in refused.value.message
        ruler.make_cases(tokenizer, [Ask(task, length, i) for i in range(3)], material)
        with pytest.raises(InputError):
            ruler.make_cases(tokenizer, [Ask(task, length - 60, i) for i in range(3)], material)
    most = max(needs.values(), key=lambda need: int(need.replace(",", "")))
    assert refused.value.hint == f"evaluate at {most} tokens or more, or name the tasks that fit: niah_single_1"
    with pytest.raises(InputError, match=r"cwe at 4,100 needs 6,\d\d\d tokens"):
        ruler.make_cases(tokenizer, [Ask("cwe", 4_100, 0)], material)


def test_a_length_that_would_do_is_one_that_was_tried(material: Material) -> None:
    """By the rules of short lengths cwe would need less than 9,000 tokens, by those from 4,096 on far more."""
    with pytest.raises(InputError) as refused:
        ruler.make_cases(WideTokenizer(), [Ask("cwe", 900, 0)], material)
    found = re.search(r"cwe at 900 needs ([\d,]+) tokens", refused.value.message)
    assert found and (length := int(found[1].replace(",", ""))) > 15_000
    assert ruler.make_cases(WideTokenizer(), [Ask("cwe", length, 0)], material)


def test_cwe_stays_short_when_there_are_no_more_words(tokenizer: Any, material: Material) -> None:
    few = Material(words=WORDS[:60])
    [case] = ruler.make_cases(tokenizer, [Ask("cwe", 20_000, 0)], few)
    assert case.facts["size"] == 60


def test_tasks_are_chosen_in_order(qa_files: dict[str, str]) -> None:
    assert ruler.chosen_tasks(None, {}) == [task for task in TASKS if task not in QA]
    assert ruler.chosen_tasks(None, {"squad": "x"}) == [task for task in TASKS if task != "qa_2"]
    assert ruler.chosen_tasks(None, qa_files) == list(TASKS)
    assert ruler.chosen_tasks(("vt", "niah_single_1"), qa_files) == ["niah_single_1", "vt"]
    with pytest.raises(InputError, match="no task 'niah'; allowed: niah_single_1"):
        ruler.chosen_tasks(("niah",), {})
    with pytest.raises(InputError, match="`squad` is not given"):
        ruler.chosen_tasks(("qa_1",), {"hotpotqa": "x"})


def test_material_has_what_tasks_need(tokenizer: Any, qa_files: dict[str, str]) -> None:
    made = ruler.read_material(tokenizer, ["vt", "qa_2"], HAY, qa_files)
    assert made.hay == tuple(HAY.split()) and not made.nouns and set(made.questions) == {"qa_2"}
    assert made.example_lines == 5, "at least five, where 500 tokens do not hold as many"
    assert ruler.read_material(PairTokenizer(), ["vt"], HAY, {}).example_lines == 5
    with pytest.raises(InputError, match="empty"):
        ruler.read_material(tokenizer, ["vt"], " \n", {})


def test_questions_are_read(qa_files: dict[str, str], tmp_path: Path) -> None:
    read = ruler.read_squad(Path(qa_files["squad"]))
    assert len(read.entries) == 119 and len(read.documents) == 120
    question, answers, needed, near = read.entries[0]
    assert (question, answers) == ("What is the word of paragraph 1 of article 0?", ("w0x1", "word is w0x1"))
    assert [read.documents[i] for i in needed] == ARTICLES[0][1:2]
    assert {read.documents[i] for i in near} == {ARTICLES[0][0], *ARTICLES[0][2:]}
    hops = ruler.read_hotpotqa(Path(qa_files["hotpotqa"]))
    assert len(hops.entries) == 5 and len(hops.entries[0][2]) == 10
    assert "Title 0-1\nIt is name0. So it is." in hops.documents
    bad = tmp_path / "bad.json"
    for text, reads in (
        ("{", ruler.read_squad),
        ('{"data": [{}]}', ruler.read_squad),
        ('[{"a": 1}]', ruler.read_hotpotqa),
    ):
        bad.write_text(text)
        with pytest.raises(DataError, match=re.escape(str(bad))):
            reads(bad)
    bad.write_text('{"data": []}')
    with pytest.raises(DataError, match="no question"):
        ruler.read_squad(bad)
    with pytest.raises(InputError, match="cannot read"):
        ruler.read_squad(tmp_path / "absent.json")


def test_cases_are_kept_for_one_request(cases: Any, tmp_path: Path) -> None:
    path = tmp_path / "cases" / "ruler.jsonl"
    first, other = cases["vt", SHORT], cases["fwe", SHORT]
    request = {"seed": 0, "tasks": ["vt"], "haystack": None}
    made = []

    def make(cases: list[Case]) -> Callable[[], list[Case]]:
        return lambda: made.append(cases) or cases

    assert ruler.kept_cases(path, request, make(first)) == first
    assert ruler.kept_cases(path, request, make(other)) == first and len(made) == 1
    assert json.loads(path.with_name("ruler.jsonl.manifest.json").read_text())["tasks"] == ["vt"]
    assert ruler.kept_cases(path, {**request, "tasks": ["fwe"]}, make(other)) == other and len(made) == 2
    path.write_bytes(path.read_bytes()[:-9])
    assert ruler.kept_cases(path, {**request, "tasks": ["fwe"]}, make(other)) == other and len(made) == 3
    path.with_name("ruler.jsonl.manifest.json").write_text("{")
    assert ruler.kept_cases(path, {**request, "tasks": ["fwe"]}, make(other)) == other and len(made) == 4


def test_the_words_are_wonderwords() -> None:
    if find_spec("wonderwords") is None:
        with pytest.raises(EnvironmentFault, match="not installed"):
            ruler.word_lists()
        pytest.skip("wonderwords is not installed: its lists were not read, RULER's needles were not made of them")
    nouns, adjectives, verbs = ruler.word_lists()
    assert len(nouns) > 4_000 and len(adjectives) > 500 and len(verbs) > 300
    for words in (nouns, adjectives, verbs):
        assert list(words) == sorted(set(words)) and all(word == word.strip() != "" for word in words)
    assert ruler.words_version(["cwe"]) and ruler.words_version(["vt", "fwe"]) is None
