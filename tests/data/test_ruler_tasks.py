"""Every task is true: by recounting, by interpreting, by looking, at a size on both sides of the official switch."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import pytest

from ctxext.data.cases import Case
from ctxext.data.ruler_tasks import FWE_LEAST, NOISE, QA, TASKS, Ask, Material, Questions

SHORT, LONG = 3_000, 9_000  # tokens: cwe repeats more from 4,096 on
SIZES = {SHORT: 60, LONG: 150}  # words, lines or documents
WORDS = tuple("".join(parts) for parts in product(("ba", "ko", "lu", "mi", "re", "sa", "to", "vu"), repeat=3))
HAY = (
    "The ferry left at noon. Nobody on the quay had seen it go! Was it early, or were the clocks late? An old man said "
    "that it was neither. (He had been wrong before.) The gulls came back, one by one, and sat on the rail."
)
ARTICLES = [[f"Paragraph {p} of article {a} says that its word is w{a}x{p}." for p in range(4)] for a in range(30)]


def questions(needed: int) -> Questions:
    """Of every paragraph, asked for its word; it needs `needed` paragraphs, its own first."""
    entries = []
    for i in range(120):
        own = tuple((i + step) % 120 for step in range(needed))
        near = tuple(j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j not in own) if needed == 1 else ()
        word = f"w{i // 4}x{i % 4}"
        entries.append((f"What is the word of {i}?", (word, f"word is {word}"), own, near))
    return Questions(tuple(text for article in ARTICLES for text in article), tuple(entries))


MATERIAL = Material(
    tuple(HAY.split()), WORDS[:200], WORDS[200:300], WORDS, {"qa_1": questions(1), "qa_2": questions(10)}
)


def drawn(task: str, length: int) -> list[Case]:
    """Two cases of a task."""
    cases = []
    for i in range(2):
        size = SIZES[length] * (10 if task == "fwe" else 1)
        prompt, references, facts = TASKS[task].make(Ask(task, length, i), size, MATERIAL)
        cases.append(Case(f"{i}", task, length, prompt, references, 1, {**facts, "size": size}))
    return cases


each_length = pytest.mark.parametrize("length", [SHORT, LONG])


NEEDLES = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}


@each_length
@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_needles_say_what_is_asked(task: str, length: int) -> None:
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    for case in drawn(task, length):
        kind = "uuids" if task in ("niah_single_3", "niah_multikey_3") else "numbers"
        said = re.findall(rf"One of the special magic {kind} for (\S+) is: (\S+)\.", case.prompt)
        held: dict[str, list[str]] = {}
        for key, value in said:
            held.setdefault(key, []).append(value)
            assert re.fullmatch(uuid if kind == "uuids" else r"\d{7}", value)
            assert re.fullmatch(uuid if task == "niah_multikey_3" else r"[a-z]+-[a-z]+", key)
        many = task in ("niah_multivalue", "niah_multiquery")
        what, are, start = (kind, "are", "Some") if many else (kind[:-1], "is", "A")
        ending = rf"\? The special magic {what} for (.*) mentioned in the provided text {are}$"
        requested = re.search(ending, case.prompt)
        assert requested and case.prompt.startswith(f"{start} special magic {what} {are} hidden within")
        keys = re.split(r", and |, ", requested[1])
        assert len(keys) == (4 if task == "niah_multiquery" else 1)
        assert case.references and sorted(case.references) == sorted(v for key in keys for v in held[key])
        if task in ("niah_multikey_2", "niah_multikey_3"):
            assert len(said) == case.facts["size"] + 1, "all the rest are distractors"
        else:
            assert len(said) == NEEDLES.get(task, 1)
            assert case.prompt.count(NOISE) == (case.facts["size"] if task == "niah_single_1" else 0)


def test_needles_stand_between_sentences() -> None:
    for case in drawn("niah_multikey_1", LONG):
        text = case.prompt.split("\n")[1]
        for before in re.findall(r"(\S+) One of the special magic", text):
            assert before.rstrip("\"')]").endswith((".", "!", "?")), before
        rest = re.sub(r"One of the special magic numbers for \S+ is: \d+\. ?", "", text).split()
        assert len(rest) == case.facts["size"]
        assert rest == [MATERIAL.hay[i % len(MATERIAL.hay)] for i in range(len(rest))]


def interpreted(text: str) -> tuple[str, list[str]]:
    """The value asked for in one prompt of vt, and the variables that have it, found by following assignments."""
    value = re.search(r"assigned the value (\d+) in the text above", text)
    assert value
    holds: dict[str, str] = {}
    for name, right in re.findall(r"VAR ([A-Z]+) = ((?:VAR [A-Z]+)|\d+)", text):
        holds[name] = holds[right.removeprefix("VAR ")] if right.startswith("VAR") else right
    return value[1], [name for name, held in holds.items() if held == value[1]]


@each_length
def test_vt_holds_when_interpreted(length: int) -> None:
    for case in drawn("vt", length):
        example, question = case.prompt.split("\n\n\n\n")
        value, names = interpreted(question)
        assert tuple(names) == case.references and len(names) == 5
        assert value == case.facts["value"]
        assert question.count(NOISE) == case.facts["size"]
        shown, shown_names = interpreted(example)
        assert example.endswith(f"variables are assgined the value {shown}, they are: {' '.join(shown_names)}")
        assert len(shown_names) == 5 and {len(name) for name in shown_names} == {3}
        assert shown != value and question.endswith(f"the value {value}, they are:")


@each_length
def test_cwe_holds_when_recounted(length: int) -> None:
    (common, rare), (shown_common, shown_rare) = ((30, 3), (10, 3)) if length == LONG else ((6, 1), (3, 1))
    for case in drawn("cwe", length):
        requested = "Answer: The top 10 words that appear most often in the list are:"
        example, answer, question, end = re.split(rf"{requested}|\n(?=Below)", case.prompt)
        assert end == ""
        counts = Counter(re.findall(r"\d+\. ([a-z]+)", question))
        assert len(counts) == case.facts["size"]
        assert {word for word, n in counts.items() if n == common} == set(case.references)
        assert set(counts.values()) == {common, rare} and len(case.references) == 10
        shown = Counter(re.findall(r"\d+\. ([a-z]+)", example))
        assert len(shown) == (40 if length == LONG else 20)
        assert {word for word, n in shown.items() if n == shown_common} == set(re.findall(r"\d+\. ([a-z]+)", answer))
        assert set(shown.values()) == {shown_common, shown_rare}
        numbers = [int(number) for number in re.findall(r"(\d+)\. ", question)]
        assert numbers == list(range(1, counts.total() + 1))


@each_length
def test_fwe_holds_when_recounted(length: int) -> None:
    for case in drawn("fwe", length):
        text = case.prompt.split("coded words. ")[1].split("\nQuestion")[0]
        counts = Counter(text.split()).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == case.references
        size = case.facts["size"]
        assert [n for _, n in counts[:5]] == [int(size / k**2 * 6 / 3.141592653589793**2) for k in range(1, 6)]
        assert len(counts) <= length // 50


def test_fwe_has_no_ties_from_its_least_size_on() -> None:
    for size in range(FWE_LEAST, 300):
        prompt, references, _ = TASKS["fwe"].make(Ask("fwe", SHORT, 0), size, MATERIAL)
        counts = Counter(prompt.split("coded words. ")[1].split("\nQuestion")[0].split())
        of = [counts[word] for word in references]
        rest = max(n for word, n in counts.items() if word not in (*references, "..."))
        assert of[0] > of[1] > of[2] > rest, size


@each_length
@pytest.mark.parametrize("task", QA)
def test_documents_have_the_answer(task: str, length: int) -> None:
    for case in drawn(task, length):
        numbered = re.findall(r"Document (\d+):\n", case.prompt)
        assert numbered == [str(n) for n in range(1, case.facts["size"] + 1)]
        question = re.search(r"\n\nQuestion: (.*) Answer:$", case.prompt)
        assert question
        entry = next(e for e in MATERIAL.questions[task].entries if e[0] == question[1])
        assert case.references == entry[1] and all(reference in case.prompt for reference in case.references)
        assert all(MATERIAL.questions[task].documents[i] in case.prompt for i in entry[2])
    assert len({case.prompt.split("Question: ")[1] for case in drawn(task, length)}) == 2


def test_distractors_come_from_the_same_article_first() -> None:
    for size, near in ((1, 0), (3, 2), (4, 3), (30, 3)):
        prompt, references, _ = TASKS["qa_1"].make(Ask("qa_1", SHORT, 3), size, MATERIAL)
        article = re.match(r"w(\d+)x", references[0])
        assert article
        found = re.findall(r"Paragraph \d of article (\d+) says", prompt)
        assert (len(found), len(set(re.findall(r"Paragraph \d of article \d+ says", prompt)))) == (size, size)
        assert found.count(article[1]) == 1 + near
    prompt, _, _ = TASKS["qa_1"].make(Ask("qa_1", SHORT, 3), 300, MATERIAL)
    assert set(Counter(re.findall(r"Paragraph \d of article \d+ says", prompt)).values()) == {2, 3}, "all, and again"
