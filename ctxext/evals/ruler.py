"""RULER (Hsieh et al. 2024, arXiv 2404.06654): thirteen tasks at each length, answered greedily, matched as text.

Cases are made once (data/ruler.py) and run from their file. A task's score is the mean over its cases of the share of
references found in the answer; for qa, of whether any reference is found; in percent. The score of a length is the mean
over tasks. The effective length is the longest with a score of at least 85.6, the score of Llama-2-7B at 4k (section 4
of the paper).

data/ruler_tasks.py lists what differs from the official cases; the haystack matters most, so every number names it. A
run of fewer than 13 tasks is named as such, and its mean is not the paper's: qa is harder than most other tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ctxext.data import ruler
from ctxext.data.cases import Case, evenly, prompt_ids, read_cases
from ctxext.data.ruler_tasks import QA, TASKS, Ask
from ctxext.data.store import tokenizer_hash
from ctxext.errors import DataError, InputError
from ctxext.evals.eval_spec import Ruler
from ctxext.evals.haystacks import haystack
from ctxext.evals.item_runner import Outcome, ResultRow, SuiteJob, mean
from ctxext.evals.scores import string_match_all, string_match_part
from ctxext.model.decode import generate, stop_ids
from ctxext.model.load import LoadedModel
from ctxext.units import counted

EFFECTIVE = 85.6  # percent
_KEPT = 500  # characters of an answer that are kept in its details
_FULL = 0.95  # share of a length that a full prompt reaches at least
_LINE = 64  # tokens; a line of filler may have that many

Answers = Callable[[Sequence[Case]], list[str]]  # takes cases that generate the same number of tokens


@dataclass(frozen=True)
class RulerQuestion:
    """A case as an item."""

    case: Case

    @property
    def id(self) -> str:
        """Returns the id of the case."""
        return self.case.id

    @property
    def size(self) -> int:
        """Returns the length of the case in tokens."""
        return self.case.length


def job(loaded: LoadedModel, spec: Ruler, place: Path) -> SuiteJob:
    """Returns the job of `spec`'s cases, which are made into `place`/cases unless they are there or given.

    Errors: those of data/ruler.py; InputError (no case of the requested lengths and tasks), DataError (cases that are
    not RULER's).
    """
    assert spec.lengths is not None
    cases, facts, notes = _given(loaded, spec) if spec.from_cases else _made(loaded, spec, place)
    tasks = [task for task in TASKS if any(case.task == task for case in cases)]
    name = suite_name(tasks)
    protocol = f"{name}, string match, greedy, haystack {facts.get('haystack')}, seed {facts.get('seed')}"
    loaded.model.eval()
    return SuiteJob(
        [RulerQuestion(case) for case in cases],
        partial(scored, partial(_generated, loaded)),
        partial(rows, protocol),
        (f"ruler: {name}, {counted(len(cases), 'case')}", *notes, *_not_full(cases)),
    )


def suite_name(tasks: Sequence[str]) -> str:
    """Returns the name for the mean over `tasks`."""
    missing = [task for task in TASKS if task not in tasks]
    if not missing:
        return "RULER-13"
    if set(missing) <= set(QA):
        return f"RULER-{len(tasks)} (no {'QA' if len(missing) == len(QA) else missing[0]})"
    return f"RULER, {len(tasks)} of 13 tasks ({', '.join(tasks)})"


def _made(loaded: LoadedModel, spec: Ruler, place: Path) -> tuple[list[Case], dict[str, Any], list[str]]:
    qa_files = {"squad": spec.squad, "hotpotqa": spec.hotpotqa}
    tasks = ruler.chosen_tasks(spec.tasks, qa_files)
    where, text = haystack(spec.data, spec.text_field)
    tokenizer = tokenizer_hash(loaded.tokenizer)
    # Everything that decides the cases. A kept file is used again only if its manifest matches all of this.
    request = {
        "suite": "ruler",
        "generator": ruler.GENERATOR,
        "tokenizer": tokenizer,
        "seed": spec.seed,
        "lengths": list(spec.lengths or ()),
        "tasks": tasks,
        "cases_each": spec.cases,
        "limit": spec.limit,
        "haystack": where,
        "haystack_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "wonderwords": ruler.words_version(tasks),
        **{name: ruler.file_hash(path) for name, path in qa_files.items()},
    }

    def make() -> list[Case]:
        material = ruler.read_material(loaded.tokenizer, tasks, text, qa_files)
        cells = [(length, task, i) for length in spec.lengths or () for task in tasks for i in range(spec.cases)]
        # `limit` is taken evenly over lengths and tasks before any case is made.
        chosen = evenly(cells, spec.limit, lambda cell: cell[:2])
        asks = [Ask(task, length, i, spec.seed) for length, task, i in chosen]
        return ruler.make_cases(loaded.tokenizer, asks, material)

    cases = ruler.kept_cases(place / "cases" / f"ruler-{tokenizer[:8]}.jsonl", request, make)
    without = [task for task in QA if task not in tasks] if spec.tasks is None else []
    notes = [f"ruler: {task} is left out: give `{QA[task]}`, the path of its official JSON" for task in without]
    return cases, request, notes


def _given(loaded: LoadedModel, spec: Ruler) -> tuple[list[Case], dict[str, Any], list[str]]:
    cases, facts = read_cases(Path(str(spec.from_cases)))
    invalid = next((case for case in cases if case.task not in TASKS or not case.references), None)
    if invalid is not None:
        raise DataError(
            f"{spec.from_cases}: {invalid.id!r} is not a case of RULER (task {invalid.task!r}, "
            f"{len(invalid.references)} references)",
            hint=f"tasks are {', '.join(TASKS)}, and each case has at least one reference",
        )
    mine = [c for c in cases if c.length in (spec.lengths or ()) and c.task in (spec.tasks or TASKS)]
    if not mine:
        there = ", ".join(f"{length:,}" for length in sorted({case.length for case in cases}))
        raise InputError(
            f"{spec.from_cases} has no case of the requested lengths and tasks",
            hint=f"it has the lengths {there}, and the tasks {', '.join(dict.fromkeys(c.task for c in cases))}",
        )
    # Items of one size run together, so keep the lengths together.
    mine = sorted(evenly(mine, spec.limit, lambda case: (case.length, case.task)), key=lambda case: case.length)
    notes = []
    if facts.get("tokenizer") != tokenizer_hash(loaded.tokenizer):
        notes.append(f"ruler: {spec.from_cases} was made with another tokenizer: prompts may exceed their length")
    return mine, {"haystack": "as in the file", "seed": "as in the file", **facts}, notes


def _not_full(cases: Sequence[Case]) -> list[str]:
    """Returns notes on prompts that stay well short of their length: cwe, once it lists every word of its list."""
    notes = []
    for (length, task), group in groupby(cases, key=lambda case: (case.length, case.task)):
        counted = [case.facts["prompt_tokens"] + case.max_new_tokens for case in group if "prompt_tokens" in case.facts]
        if counted and max(counted) < min(_FULL * length, length - _LINE):
            notes.append(f"ruler: {task} at {length:,} has at most {max(counted):,} tokens: the task has no more text")
    return notes


def _generated(loaded: LoadedModel, cases: Sequence[Case]) -> list[str]:
    prompts = [prompt_ids(loaded.tokenizer, case.prompt) for case in cases]
    stop = stop_ids(loaded.model, loaded.tokenizer)
    answers = generate(loaded.model, prompts, cases[0].max_new_tokens, stop=stop)
    return [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def scored(answers: Answers, questions: Sequence[RulerQuestion]) -> list[Outcome]:
    """Returns the outcomes of a batch; cases that generate the same number of tokens are answered together."""
    outcomes = []
    for _, group in groupby((question.case for question in questions), key=lambda case: case.max_new_tokens):
        cases = list(group)
        for case, answer in zip(cases, answers(cases), strict=True):
            match = string_match_part if case.task in QA else string_match_all
            details = {"answer": answer[:_KEPT], "references": list(case.references)}
            outcomes.append(Outcome(case.id, case.task, case.length, match(answer, case.references), details=details))
    return outcomes


def rows(protocol: str, outcomes: Sequence[Outcome]) -> list[ResultRow]:
    """Returns one row per length, the mean over tasks, then one per task and length; in percent."""
    lengths = sorted({outcome.length for outcome in outcomes})
    cells = {
        (length, task): [outcome for outcome in outcomes if (outcome.length, outcome.task) == (length, task)]
        for length in lengths
        for task in TASKS
    }
    scores = {cell: 100 * (mean(group) or 0.0) for cell, group in cells.items() if group}
    # Each task has the same weight in the score of a length.
    averages = {}
    for length in lengths:
        mine = [score for (of, _), score in scores.items() if of == length]
        averages[length] = sum(mine) / len(mine)
    effective = max((length for length, average in averages.items() if average >= EFFECTIVE), default=None)
    made = []
    for length, average in averages.items():
        tasks = [task for of, task in scores if of == length]
        details = {"effective_length": effective, "effective_from": EFFECTIVE, "tasks": tasks}
        n = sum(len(cells[length, task]) for task in tasks)
        made.append(ResultRow("ruler", protocol, "", length, "score", average, n, details=details))
    return made + [
        ResultRow("ruler", protocol, task, length, "score", score, len(cells[length, task]))
        for (length, task), score in scores.items()
    ]
