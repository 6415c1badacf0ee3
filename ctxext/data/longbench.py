"""LongBench's questions (Bai et al. 2023, arXiv 2308.14508): a table of its tasks, and a reader for the user's JSONL.

Answer lengths and metrics are the official ones. The prompts have the official structure in our own words. Numbers that
are to be compared with published ones need the official words, which `read_templates` reads from the file that
LongBench publishes. No data is included or downloaded.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.data.documents import checked_text
from ctxext.errors import DataError, InputError


@dataclass(frozen=True)
class LongBenchTask:
    """One task. metric: a name in evals/longbench_metrics.py. first_line: only the answer's first line is scored."""

    metric: str
    max_new_tokens: int
    template: str
    first_line: bool = False


@dataclass(frozen=True)
class LongBenchQuestion:
    """One row of LongBench.

    `id` is the row's own, each of `answers` is correct by itself, `classes` are those of a classification.
    """

    id: str
    task: str
    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def prompt(self, templates: Mapping[str, str]) -> str:
        """Returns the prompt, made with the template of the question's task."""
        return templates[self.task].format(context=self.context, input=self.input)


def _framed(instruction: str, name: str, question: str = "", answer: str = "Answer:") -> str:
    """Builds a template: instruction, named context, the instruction again, the question, and the start of the answer.

    The instruction is repeated so that a prompt with its middle cut out still states the task.
    """
    return f"{instruction}\n\n{name}:\n{{context}}\n\n{instruction}\n\n{question}{answer}"


_SHORT = "Give the answer alone, in as few words as it takes, and explain nothing."
_QUESTION, _QUESTION_ZH = "Question: {input}\n", "问题:{input}\n"
_STORY = _framed(f"Answer a question about this story or film script. {_SHORT}", "Story", _QUESTION)
_PAPER = _framed(
    "Answer a question about this scientific paper. Give the answer alone, in a phrase or one sentence. A question of "
    'yes or no gets "yes" or "no"; one that the paper does not answer gets "unanswerable".',
    "Paper",
    _QUESTION,
)
_SEVERAL = _framed(f"Answer a question from these passages. {_SHORT}", "Passages", _QUESTION)
_TEXT = _framed(f"Answer a question about this text. {_SHORT}", "Text", _QUESTION)
_TEXT_ZH = _framed("请根据下文用中文简短作答,不要写其他内容。", "正文", _QUESTION_ZH, "答案:")
_ARTICLES_ZH = _framed("请根据下列文章回答问题。", "文章", _QUESTION_ZH, "答案:")
_REPORT = _framed("Summarise this government report on one page.", "Report", answer="Summary:")
_NEWS = _framed("Summarise all of these news articles together on one page.", "News", answer="Summary:")
_MEETING = _framed("Answer a query about this meeting in one or more sentences.", "Transcript", "Query: {input}\n")
_MEETING_ZH = _framed("请用一段话总结这次会议。", "会议记录", answer="总结:")
_COUNT = _framed(
    "Some of these paragraphs stand here more than once. Count how many different ones there are, and give the number "
    "alone, such as 7.",
    "Paragraphs",
    answer="Number of different paragraphs: ",
)
_WHICH = _framed(
    'One of these numbered paragraphs is summed up by an abstract. Say which, in the form "Paragraph 7".',
    "Paragraphs",
    "Abstract:\n{input}\n\n",
    "It sums up: ",
)
_WHICH_ZH = _framed('下列段落都有编号,请指出摘要对应哪一段,格式如"段落7"。', "段落", "摘要:\n{input}\n\n", "对应:")
_KIND = "Say of what type the last question is, as in the examples.\n\n{context}\n{input}"
_KIND_ZH = "请仿照例子判断最后一条新闻的类别。\n\n{context}\n{input}"
_TRIVIA = "Answer the last question from its passage, in as few words as in the examples.\n\n{context}\n\n{input}"
_DIALOGUE = "Sum up the last dialogue in a few short sentences, as in the examples.\n\n{context}\n\n{input}"
_CODE = "Continue this code with its next line.\n{context}Next line:\n"
_CODE_OF = "Continue this code with its next line.\n{context}{input}Next line:\n"

TASKS: dict[str, LongBenchTask] = {
    "narrativeqa": LongBenchTask("qa_f1", 128, _STORY),
    "qasper": LongBenchTask("qa_f1", 128, _PAPER),
    "multifieldqa_en": LongBenchTask("qa_f1", 64, _TEXT),
    "multifieldqa_zh": LongBenchTask("qa_f1_zh", 64, _TEXT_ZH),
    "hotpotqa": LongBenchTask("qa_f1", 32, _SEVERAL),
    "2wikimqa": LongBenchTask("qa_f1", 32, _SEVERAL),
    "musique": LongBenchTask("qa_f1", 32, _SEVERAL),
    "dureader": LongBenchTask("rouge_l_zh", 128, _ARTICLES_ZH),
    "gov_report": LongBenchTask("rouge_l", 512, _REPORT),
    "qmsum": LongBenchTask("rouge_l", 512, _MEETING),
    "multi_news": LongBenchTask("rouge_l", 512, _NEWS),
    "vcsum": LongBenchTask("rouge_l_zh", 512, _MEETING_ZH),
    "trec": LongBenchTask("classification", 64, _KIND, first_line=True),
    "triviaqa": LongBenchTask("qa_f1", 32, _TRIVIA, first_line=True),
    "samsum": LongBenchTask("rouge_l", 128, _DIALOGUE, first_line=True),
    "lsht": LongBenchTask("classification", 64, _KIND_ZH, first_line=True),
    "passage_count": LongBenchTask("count", 32, _COUNT),
    "passage_retrieval_en": LongBenchTask("retrieval", 32, _WHICH),
    "passage_retrieval_zh": LongBenchTask("retrieval_zh", 32, _WHICH_ZH),
    "lcc": LongBenchTask("code_similarity", 64, _CODE),
    "repobench-p": LongBenchTask("code_similarity", 64, _CODE_OF),
}


def read_templates(path: str | None) -> dict[str, str]:
    """Returns the template of each task: ctxext's own, or those of a JSON file.

    The file is {task: text with {context} and {input}}, such as LongBench's own dataset2prompt.json. A task that it
    lacks is left out. Errors: InputError (no such file), DataError (not such an object, a template without {context} or
    with other fields).
    """
    if path is None:
        return {name: task.template for name, task in TASKS.items()}
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the prompts {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a JSON object of task and template")
    # Check each template now, so that a bad one fails before any model runs.
    for name, template in found.items():
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: the template of {name} is not valid ({error})") from None
        if "context" not in fields or fields - {"context", "input"}:
            raise DataError(
                f"{path}: the template of {name} has the fields {sorted(fields)}; allowed: context, and input"
            )
    return {name: template for name, template in found.items() if name in TASKS}


def read_questions(source: str, tasks: Sequence[str] | None = None) -> list[LongBenchQuestion]:
    """Returns the questions of a JSONL file, or of all `<task>.jsonl` in a directory; of `tasks` only, if given.

    Errors: InputError (no such path, no .jsonl in it, an entry of `tasks` that is unknown or without questions),
    DataError (a line with bad JSON, a bad field, an unknown task or a repeated id; a file without questions).
    """
    unknown = [task for task in tasks or () if task not in TASKS]
    if unknown:
        raise InputError(f"unknown LongBench tasks: {', '.join(unknown)}", hint=_allowed())
    questions = []
    for path in _files(Path(source), tasks):
        questions += [question for question in _read(path) if tasks is None or question.task in tasks]
    there = {question.task for question in questions}
    absent = [task for task in tasks or () if task not in there]
    if absent:
        raise InputError(f"{source} has no questions of {', '.join(absent)}")
    return questions


def _files(source: Path, tasks: Sequence[str] | None) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"no such file or directory: {source}", hint="give LongBench's JSONL, or a directory of it")
    found = sorted(source.glob("*.jsonl"))
    if not found:
        raise InputError(f"no .jsonl in the directory {source}", hint="put LongBench's <task>.jsonl there")
    # In a directory the file names must be tasks; a single file may have any name.
    stray = [path.name for path in found if path.stem not in TASKS]
    if stray:
        raise DataError(
            f"{source}: {', '.join(stray)}: the names are not tasks; {_allowed()}",
            hint="give such a file on its own, not in a directory",
        )
    return [path for path in found if tasks is None or path.stem in tasks]


def _read(path: Path) -> Iterator[LongBenchQuestion]:
    seen = set[tuple[str, str]]()
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            question = _question(line, f"{path}:{number}")
            if (question.task, question.id) in seen:
                raise DataError(f"{path}:{number}: the id {question.id!r} of {question.task} is used twice")
            seen.add((question.task, question.id))
            yield question
    if not seen:
        raise DataError(f"{path} has no question")


def _question(line: str, place: str) -> LongBenchQuestion:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object")
    texts = {name: checked_text(_field(row, name, str, place), place, name) for name in ("context", "input")}
    task = _field(row, "dataset", str, place)
    if task not in TASKS:
        raise DataError(f"{place}: unknown task {task!r}; {_allowed()}")
    answers = _texts(row, "answers", place)
    classes = _texts(row, "all_classes", place) if TASKS[task].metric == "classification" else ()
    return LongBenchQuestion(_field(row, "_id", str, place), task, **texts, answers=answers, classes=classes)


def _field(row: dict[str, Any], name: str, kind: type, place: str) -> Any:
    if not isinstance(row.get(name), kind):
        got = f"{type(row[name]).__name__} {str(row[name])[:40]!r}" if name in row else "missing"
        raise DataError(f"{place}: {name} is {got}; allowed: {kind.__name__}")
    return row[name]


def _texts(row: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    texts = _field(row, name, list, place)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: {name} should be a list of texts, at least one")
    return tuple(texts)


def _allowed() -> str:
    return f"allowed are {', '.join(TASKS)}"
