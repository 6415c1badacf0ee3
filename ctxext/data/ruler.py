"""Makes RULER's cases: fits the tasks (ruler_tasks.py) to a length, reads words and questions, caches cases in files.

A case has the largest size, or nearly so, at which prompt and tokens to generate stay within the length. Officially the
size is a multiple of 5 to 500, whatever space that leaves free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from ctxext.data.cases import Case, private_random, prompt_ids, read_cases, write_cases
from ctxext.data.ruler_tasks import QA, TASKS, WORDY, Ask, Material, Questions, vt_example
from ctxext.errors import DataError, EnvironmentFault, InputError

GENERATOR = 1  # raise it when a change gives other cases
_EXAMPLE_TOKENS = 500  # limit for vt's example with the 30 tokens to generate; lines are added by fives
_PROBE = 16  # the first case is larger than the smallest by this, to measure the tokens per unit of size


def chosen_tasks(requested: Sequence[str] | None, qa_files: Mapping[str, str | None]) -> list[str]:
    """Returns the tasks to make, in official order: `requested`, or all tasks that have data.

    `qa_files` has the path of "squad" and of "hotpotqa", or None. Errors: InputError (an unknown task, a task of
    questions without its file).
    """
    unknown = [task for task in requested or () if task not in TASKS]
    if unknown:
        raise InputError(f"RULER has no task {', '.join(map(repr, unknown))}; allowed: {', '.join(TASKS)}")
    for task, name in QA.items():
        if task in (requested or ()) and not qa_files.get(name):
            raise InputError(
                f"{task} needs a file of questions, and `{name}` is not given",
                hint=f"give `{name}` the path of the data set's official JSON, or leave {task} out",
            )
    return [task for task in TASKS if (task in requested if requested else task not in QA or qa_files.get(QA[task]))]


def read_material(tokenizer: Any, tasks: Sequence[str], hay: str, qa_files: Mapping[str, str | None]) -> Material:
    """Returns what `tasks` are made of.

    Errors: InputError (no text, no such file), DataError (a file of another format), EnvironmentFault (no wonderwords,
    if a task needs words).
    """
    words = hay.split()
    if not words:
        raise InputError("the haystack text is empty")
    nouns, adjectives, verbs = word_lists() if set(tasks) & set(WORDY) else ((), (), ())
    questions = {task: _READERS[name](Path(str(qa_files[name]))) for task, name in QA.items() if task in tasks}
    every = sorted({*nouns, *adjectives, *verbs})
    return Material(tuple(words), nouns, adjectives, tuple(every), questions, _example_lines(tokenizer))


def word_lists() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Returns nouns, adjectives and verbs of wonderwords, sorted.

    They are read from the package's files; its random functions are not used. Raises EnvironmentFault if the package is
    missing or has other files.
    """
    if find_spec("wonderwords") is None:
        raise EnvironmentFault(
            "RULER's needles and word lists are made of the words of `wonderwords`, which is not installed",
            hint="pip install wonderwords, or name tasks that need no words: vt, fwe",
        )
    # Other versions may have other files; sorting makes the lists independent of the order in the files.
    assets = files("wonderwords") / "assets"
    try:
        texts = [(assets / f"{kind}list.txt").read_text(encoding="utf-8") for kind in ("noun", "adjective", "verb")]
    except OSError as error:
        raise EnvironmentFault(
            f"wonderwords {version('wonderwords')} does not have its word lists at the expected place: {error}",
            hint="install version 2 or 3 of wonderwords",
        ) from error
    nouns, adjectives, verbs = (tuple(sorted({line.strip() for line in text.splitlines()} - {""})) for text in texts)
    return nouns, adjectives, verbs


def words_version(tasks: Sequence[str]) -> str | None:
    """Returns the version of wonderwords if `tasks` need it and it is installed: its lists decide the cases."""
    return version("wonderwords") if set(tasks) & set(WORDY) and find_spec("wonderwords") else None


def read_squad(path: Path) -> Questions:
    """Reads SQuAD's JSON (version 2; questions without an answer are left out).

    A paragraph is a document, and the other paragraphs of its article are near. Errors: InputError (no such file),
    DataError (another format, no question).
    """
    data = _json(path)
    try:
        articles = [article["paragraphs"] for article in data["data"]]
        # Equal paragraphs become one document; sorting makes the indices independent of the file's order.
        documents = sorted({paragraph["context"] for paragraphs in articles for paragraph in paragraphs})
        index = {document: i for i, document in enumerate(documents)}
        entries = []
        for paragraphs in articles:
            of_article = [index[paragraph["context"]] for paragraph in paragraphs]
            for own, paragraph in zip(of_article, paragraphs, strict=True):
                near = tuple(i for i in dict.fromkeys(of_article) if i != own)
                for qa in paragraph["qas"]:
                    answers = tuple(str(answer["text"]) for answer in qa["answers"])
                    if answers and not qa.get("is_impossible", False):
                        entries.append((str(qa["question"]), answers, (own,), near))
    except (KeyError, TypeError) as error:
        raise _other_format(path, "SQuAD", error) from error
    return _some(path, Questions(tuple(documents), tuple(entries)))


def read_hotpotqa(path: Path) -> Questions:
    """Reads HotpotQA's JSON (dev, distractor): a question needs all ten paragraphs of its row.

    Errors as `read_squad`.
    """
    data = _json(path)
    try:
        questions = [
            (
                str(row["question"]),
                str(row["answer"]),
                [f"{title}\n{''.join(parts)}" for title, parts in row["context"]],
            )
            for row in data
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _other_format(path, "HotpotQA", error) from error
    # Equal paragraphs become one document; a row's title is part of its paragraph.
    documents = sorted({document for _, _, own in questions for document in own})
    index = {document: i for i, document in enumerate(documents)}
    entries = [
        (question, (answer,), tuple(dict.fromkeys(index[d] for d in own)), ()) for question, answer, own in questions
    ]
    return _some(path, Questions(tuple(documents), tuple(entries)))


_READERS: dict[str, Callable[[Path], Questions]] = {"squad": read_squad, "hotpotqa": read_hotpotqa}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the questions {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None


def _other_format(path: Path, name: str, error: Exception) -> DataError:
    return DataError(f"{path} is not in {name}'s official format ({type(error).__name__}: {error})")


def _some(path: Path, questions: Questions) -> Questions:
    if not questions.entries:
        raise DataError(f"{path} has no question with an answer")
    return questions


def make_cases(tokenizer: Any, asks: Sequence[Ask], material: Material) -> list[Case]:
    """Returns a case for each of `asks`, in order; a case does not depend on the other requested cases.

    Raises InputError if a length is too short for a task, with the smallest length that works.
    """
    # Check that the smallest cases of every task fit before any case is made, and report all that do not.
    cells = [list(cell) for _, cell in groupby(asks, key=lambda ask: (ask.task, ask.length, ask.seed))]
    least = [(cell[0], _least_length(tokenizer, cell, material)) for cell in cells]
    short = [(ask, length) for ask, length in least if length > ask.length]
    if short:
        lines = "".join(f"\n  {ask.task} at {ask.length:,} needs {length:,} tokens" for ask, length in short)
        fit = [task for task in dict.fromkeys(ask.task for ask in asks) if all(task != ask.task for ask, _ in short)]
        raise InputError(
            f"RULER's tasks do not all fit, with this tokenizer:{lines}",
            hint=f"evaluate at {max(length for _, length in short):,} tokens or more"
            + (f", or name the tasks that fit: {', '.join(fit)}" if fit else ""),
        )
    cases = []
    for cell in cells:
        # The size of case 0 is the start of the search for all other cases of the cell, whichever cases are requested.
        first = fitted(tokenizer, replace(cell[0], number=0), material, TASKS[cell[0].task].least + _PROBE)
        start = first.facts["size"]
        cases += [first if ask.number == 0 else fitted(tokenizer, ask, material, start) for ask in cell]
    return cases


def fitted(tokenizer: Any, ask: Ask, material: Material, start: int) -> Case:
    """Returns the case of about the largest size that fits; its smallest size must fit. The search begins at `start`.

    The search uses the tokens per unit of size, and stops when less than a unit, or 1/256 of the length, is left.
    """
    task = TASKS[ask.task]
    best, base = _case(tokenizer, ask, task.least, material)
    low, low_used = task.least, base  # the largest size known to fit
    high, high_used = task.most(material) + 1, None  # the smallest size known not to fit; None: not measured yet
    size = start
    while low + 1 < high:
        size = int(min(max(size, low + 1), high - 1))
        case, used = _case(tokenizer, ask, size, material)
        if used > ask.length:
            high, high_used = size, used
        else:
            best, low, low_used = case, size, used
        # Interpolate the tokens of one unit: between both bounds if measured, else from the smallest case.
        known = (low_used - base, low - task.least) if high_used is None else (high_used - low_used, high - low)
        unit, left = max(0.1, known[0] / known[1]), ask.length - low_used
        if left < max(unit, ask.length / 256):
            break
        size = low + max(1, int(left / unit))
    return best


def _case(tokenizer: Any, ask: Ask, size: int, material: Material) -> tuple[Case, int]:
    """Returns a case of a size, and its tokens including those to generate."""
    task = TASKS[ask.task]
    prompt, references, facts = task.make(ask, size, material)
    tokens = len(prompt_ids(tokenizer, prompt))
    facts = {**facts, "size": size, "prompt_tokens": tokens}
    case = Case(ask.id, ask.task, ask.length, prompt, references, task.new_tokens, facts)
    return case, tokens + task.new_tokens


def _least_length(tokenizer: Any, cell: Sequence[Ask], material: Material) -> int:
    """Returns the length of `cell`, or the smallest greater length found in which its smallest cases fit.

    Some tasks are larger at greater lengths, so each found length is tested again.
    """
    length, least = cell[0].length, TASKS[cell[0].task].least
    while True:
        need = max(_case(tokenizer, replace(ask, length=length), least, material)[1] for ask in cell)
        if need <= length:
            return length
        length = need


def _example_lines(tokenizer: Any) -> int:
    # Add lines while the example with its answer stays within the limit.
    lines, least = 5, 5
    while len(prompt_ids(tokenizer, vt_example(private_random("example"), "10000", lines))) + 30 <= _EXAMPLE_TOKENS:
        lines += 5
    return max(least, lines - 5)


def kept_cases(path: Path, request: dict[str, Any], make: Callable[[], list[Case]]) -> list[Case]:
    """Returns the cases of `path` if its manifest matches `request` (plain JSON values), else makes and writes them."""
    if path.is_file():
        try:
            cases, manifest = read_cases(path)
        except DataError:  # the file was cut off while it was written: make the same cases again
            manifest = {}
        if request.items() <= manifest.items():
            return cases
    cases = make()
    write_cases(path, cases, request)
    return cases


def file_hash(path: str | None) -> str | None:
    """Returns the sha256 of a file of questions, None without a file. Raises InputError if it cannot be read."""
    if path is None:
        return None
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the questions {path}: {error.strerror}") from None
