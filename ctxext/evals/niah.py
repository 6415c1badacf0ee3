"""Needle in a haystack over length x depth, answered by greedy generation.

An answer is right when it contains the number. Each case keeps the expected number and what the model wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ctxext.data.niah import NEW_TOKENS, NiahQuestion, niah_questions
from ctxext.evals.eval_spec import Niah
from ctxext.evals.haystacks import haystack
from ctxext.evals.item_runner import Outcome, ResultRow, SuiteJob, rates
from ctxext.model.decode import generate, stop_ids
from ctxext.model.load import LoadedModel


def job(loaded: LoadedModel, spec: Niah, place: Path) -> SuiteJob:
    """Returns the job of `spec.cases` at each length and depth, or of `limit` in all.

    Raises InputError for a length without room for needle and question.
    """
    assert spec.lengths is not None
    where, text = haystack(spec.data, spec.text_field)
    questions = niah_questions(loaded.tokenizer, text, spec.lengths, spec.depths, spec.cases, spec.limit, spec.seed)
    protocol = f"niah, number found in at most {NEW_TOKENS} greedy tokens, hidden in {where}, seed {spec.seed}"

    def rows(outcomes: Sequence[Outcome]) -> list[ResultRow]:
        return rates("niah", protocol, "accuracy", outcomes, seed=spec.seed, haystack=where)

    loaded.model.eval()
    return SuiteJob(questions, partial(_answer, loaded), rows)


def _answer(loaded: LoadedModel, questions: Sequence[NiahQuestion]) -> list[Outcome]:
    stop = stop_ids(loaded.model, loaded.tokenizer)
    answers = generate(loaded.model, [question.ids for question in questions], NEW_TOKENS, stop=stop)
    outcomes = []
    for question, ids in zip(questions, answers, strict=True):
        answer, case = loaded.tokenizer.decode(ids, skip_special_tokens=True), question.case
        details = {"depth": case.facts["depth"], "answer": answer, "reference": case.references[0]}
        outcomes.append(Outcome(case.id, "", case.length, float(case.references[0] in answer), details=details))
    return outcomes
