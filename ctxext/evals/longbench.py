"""LongBench v1 (Bai et al. 2023, arXiv 2308.14508) on the user's own copy of its data.

Answer lengths and metrics are the official ones. Prompts have the official structure, or are the official ones from a
file (data/longbench.py, longbench_metrics.py). Decoding is greedy. A prompt that leaves no room for its answer at a
length loses its MIDDLE, because instructions are at both ends. lm-eval cuts off the left end.

Different from the official scripts: a prompt never gets a chat template (the scripts use one for chat models, except on
trec, triviaqa, samsum, lsht, lcc and repobench-p); samsum's first token may be a line break (the scripts forbid it);
the length covers prompt and answer together (theirs covers the prompt alone).

Torch is imported only when a model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.data.cases import evenly, prompt_ids
from ctxext.data.longbench import TASKS, LongBenchQuestion, read_questions, read_templates
from ctxext.errors import InputError
from ctxext.evals.eval_spec import LongBench
from ctxext.evals.item_runner import Outcome, ResultRow, SuiteJob, mean
from ctxext.evals.longbench_metrics import best, require_jieba

if TYPE_CHECKING:
    from ctxext.model.load import LoadedModel


@dataclass(frozen=True)
class LongBenchRequest:
    """A question at a length. `size` is the length: prompt and answer together have at most that many tokens."""

    question: LongBenchQuestion
    length: int

    @property
    def id(self) -> str:
        """Returns length, task and question as one id."""
        return f"{self.length}/{self.question.task}/{self.question.id}"

    @property
    def size(self) -> int:
        """Returns the most tokens of prompt and answer together."""
        return self.length


def check(spec: LongBench) -> list[LongBenchQuestion]:
    """Returns the questions to ask, in the order of the files. No torch.

    Errors: those of `read_questions`; InputError (no data named, a length without room for a task's prompt),
    EnvironmentFault (Chinese tasks without jieba).
    """
    if spec.data is None:
        raise InputError(
            "longbench needs the data of LongBench, which ctxext does not include or download",
            hint="give LongBench's JSONL, or the directory of its <task>.jsonl, in `data`",
        )
    questions = read_questions(spec.data, spec.tasks)
    names, templates = dict.fromkeys(question.task for question in questions), read_templates(spec.prompts)
    missing = [name for name in names if name not in templates]
    if missing:
        raise InputError(f"{spec.prompts} has no prompt for {', '.join(missing)}", hint="name other tasks in `tasks`")
    tasks = [TASKS[task] for task in names]
    require_jieba([task.metric for task in tasks])
    # At least half of each length must remain for the prompt.
    longest = max(task.max_new_tokens for task in tasks)
    short = [length for length in spec.lengths or () if length < 2 * longest]
    if short:
        raise InputError(
            f"longbench at length {min(short):,}: answers of up to {longest} tokens leave too little for the prompts",
            hint=f"give lengths of at least {2 * longest:,}, or tasks with shorter answers",
        )
    return questions


def job(loaded: LoadedModel, spec: LongBench, place: Path) -> SuiteJob:
    """Returns the job of every question at every length, or of `spec.limit` in all, taken evenly.

    Errors: those of `check`.
    """
    assert spec.lengths is not None
    questions = check(spec)
    requests = [LongBenchRequest(question, length) for length in spec.lengths for question in questions]
    items = evenly(requests, spec.limit, lambda item: (item.length, item.question.task))
    prompts = "prompts of ctxext" if spec.prompts is None else f"prompts of {spec.prompts}"
    loaded.model.eval()
    templates = read_templates(spec.prompts)
    return SuiteJob(items, lambda batch: list(_answers(loaded, templates, batch)), partial(rows, prompts))


def rows(prompts: str, outcomes: Sequence[Outcome]) -> list[ResultRow]:
    """Returns one row per length, the mean of its tasks' scores, then one per task; in percent, as in LongBench."""
    found = []
    for length in dict.fromkeys(outcome.length for outcome in outcomes):
        by_task: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            if outcome.length == length:
                by_task.setdefault(outcome.task, []).append(outcome)
        protocol = f"longbench, {prompts}, no chat template, greedy, middle cut, {len(by_task)} of 21 tasks"
        each = [_row(protocol, task, length, TASKS[task].metric, mine) for task, mine in by_task.items()]
        values = [row.value for row in each if row.value is not None]
        everything = [outcome for mine in by_task.values() for outcome in mine]
        whole = {"tasks": list(by_task), "cut": _cut(everything)}
        # Each task has the same weight, whatever its number of questions.
        average = sum(values) / len(values)
        found += [
            ResultRow("longbench", protocol, "", length, "average", average, len(everything), details=whole),
            *each,
        ]
    return found


def truncated(tokenizer: Any, prompt: str, budget: int) -> tuple[list[int], bool]:
    """Returns the prompt's tokens, at most `budget`, and whether its middle was cut out.

    The first and last halves are decoded and encoded again, as the official script does. Where that gives too many
    tokens (a character cut in two, merges undone), the halves are made shorter.
    """
    ids = prompt_ids(tokenizer, prompt)
    half, kept = budget // 2, ids
    # Shorten each half by half of the excess, and by at least 1, so that the loop ends.
    while len(kept) > budget:
        ends = [tokenizer.decode(end, skip_special_tokens=True) for end in (ids[:half], ids[len(ids) - half :])]
        kept = prompt_ids(tokenizer, "".join(ends))
        half = max(0, half - max(1, (len(kept) - budget) // 2))
    return kept, kept is not ids


def _answers(loaded: LoadedModel, templates: Mapping[str, str], batch: Sequence[LongBenchRequest]) -> Iterator[Outcome]:
    from ctxext.model.decode import generate, stop_ids

    stop = stop_ids(loaded.model, loaded.tokenizer)
    # A batch may hold several tasks, which differ in the number of tokens to generate.
    for name, group in groupby(batch, key=lambda item: item.question.task):
        task, items = TASKS[name], list(group)
        prompts = [
            truncated(loaded.tokenizer, item.question.prompt(templates), item.length - task.max_new_tokens)
            for item in items
        ]
        written = generate(loaded.model, [ids for ids, _ in prompts], task.max_new_tokens, stop=stop)
        for item, (ids, cut), new in zip(items, prompts, written, strict=True):
            answer = loaded.tokenizer.decode(new, skip_special_tokens=True)
            # The full answer is kept in the details; some tasks score its first line only.
            scored = answer.lstrip("\n").split("\n")[0] if task.first_line else answer
            score = best(task.metric, scored, item.question.answers, item.question.classes)
            details = {"answer": answer, "prompt_tokens": len(ids), "cut": cut}
            yield Outcome(item.id, name, item.length, score, details=details)


def _row(protocol: str, task: str, length: int, metric: str, outcomes: Sequence[Outcome]) -> ResultRow:
    value = mean(outcomes)
    percent = None if value is None else 100 * value
    return ResultRow(
        "longbench", protocol, task, length, metric, percent, len(outcomes), details={"cut": _cut(outcomes)}
    )


def _cut(outcomes: Sequence[Outcome]) -> int:
    """Returns how many prompts lost their middle."""
    return sum(outcome.details["cut"] for outcome in outcomes)
