"""Passkey retrieval over length x depth: does the model give back five digits that were shown to it once?

Shapes: B batch, T tokens of a case, A answer tokens of a batch together, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctxext.data.cases import evenly
from ctxext.data.haystack import HaystackCase, passkey_cases
from ctxext.errors import ModelError
from ctxext.evals.eval_spec import Passkey
from ctxext.evals.haystacks import haystack
from ctxext.evals.item_runner import Ledger, Outcome, ResultRow, SuiteJob, rates, run_job
from ctxext.model.decode import generate
from ctxext.model.load import LoadedModel, hidden_states, output_weight
from ctxext.progress import CountProgress, ignore


@dataclass(frozen=True)
class PasskeyQuestion:
    """A case with the id by which it pairs with another model's."""

    id: str
    case: HaystackCase

    @property
    def size(self) -> int:
        """Returns the length of the case in tokens."""
        return self.case.length


def job(loaded: LoadedModel, spec: Passkey, place: Path) -> SuiteJob:
    """Returns the job of `spec.cases` at each length (tokens) and depth (0 first, 1 last), or of `limit` in all.

    Greedy decoding gives the answer if and only if, with the answer itself as input, every answer token is the argmax
    at its position: up to the first wrong token both see the same text. So a case costs ONE forward, and only the
    answer's positions go through the head. `decode` generates instead; the results differ only where rounding swaps two
    nearly equal logits.

    Cases of a length have exactly that many tokens. Errors: InputError (a length too short for needle and question, a
    text that does not exist), ModelError (logits that are not finite).
    """
    assert spec.lengths is not None
    where, text = haystack(spec.data, spec.text_field)
    questions = []
    for length in spec.lengths:
        cases = passkey_cases(
            loaded.tokenizer, length, depths=spec.depths, per_depth=spec.cases, seed=spec.seed, haystack=text
        )
        # Number the cases of each depth, so that ids are the same for every model.
        count = dict.fromkeys(spec.depths, 0)
        for case in cases:
            questions.append(PasskeyQuestion(f"{length}/{case.depth}/{count[case.depth]}", case))
            count[case.depth] += 1
    questions = evenly(questions, spec.limit, lambda q: (q.case.length, q.case.depth))
    how = "decoded greedily" if spec.decode else "teacher-forced"
    protocol = f"passkey, exact match, {how}, hidden in {where}, seed {spec.seed}"
    # Chance of guessing all digits of the key.
    chance = 10.0 ** -len(questions[0].case.key)

    def rows(outcomes: Sequence[Outcome]) -> list[ResultRow]:
        made = rates("passkey", protocol, "accuracy", outcomes, seed=spec.seed, haystack=where, chance=chance)
        return [replace(row, details={**row.details, **_nats(outcomes, row.length)}) for row in made]

    loaded.model.eval()
    return SuiteJob(questions, partial(_decoded if spec.decode else _teacher_forced, loaded.model), rows)


def passkey(
    loaded: LoadedModel, spec: Passkey, *, tokens_per_batch: int = 16_384, progress: CountProgress = ignore
) -> list[ResultRow]:
    """Runs one spec on one model and returns one row per length; writes nothing."""
    return run_job(job(loaded, spec, Path()), Ledger(), tokens_per_batch, progress)


def _nats(outcomes: Sequence[Outcome], length: int) -> dict[str, float]:
    """Returns the mean loss of an answer token, for cases whose answers were fed in."""
    mine = [o.details for o in outcomes if o.length == length and "nats" in o.details]
    tokens = sum(details["tokens"] for details in mine)
    return {"answer_nats": sum(details["nats"] for details in mine) / tokens} if tokens else {}


@torch.no_grad()
def _teacher_forced(model: Any, questions: Sequence[PasskeyQuestion]) -> list[Outcome]:
    weight = output_weight(model)
    cases = [question.case for question in questions]
    ids = torch.tensor([case.prompt_ids + case.answer_ids for case in cases], device=weight.device)  # [B, T]
    # The last token predicts nothing that is scored, so it is not fed in. State i predicts token i + 1.
    hidden = hidden_states(model, ids[:, :-1])  # [B, T - 1, E]
    counts = [len(case.answer_ids) for case in cases]
    # Answers may differ in token count; concatenate their rows and split them again below.
    rows = torch.cat([hidden[i, -count:] for i, count in enumerate(counts)])  # [A, E]
    answers = torch.cat([ids[i, -count:] for i, count in enumerate(counts)])  # [A]
    logits = torch.nn.functional.linear(
        rows, weight.to(rows.dtype)
    )  # [A, V], in the model's dtype as `generate` has them
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"logits that are not finite at length {cases[0].length:,}", hint="evaluate the model in float32"
        )
    right = (logits.argmax(-1) == answers).split(counts)
    nats = torch.nn.functional.cross_entropy(logits.float(), answers, reduction="none").split(counts)
    return [
        _outcome(question, bool(r.all()), nats=float(loss.sum()), tokens=count)
        for question, r, loss, count in zip(questions, right, nats, counts, strict=True)
    ]


def _decoded(model: Any, questions: Sequence[PasskeyQuestion]) -> list[Outcome]:
    most = max(len(question.case.answer_ids) for question in questions)
    answers = generate(model, [question.case.prompt_ids for question in questions], most)
    return [
        _outcome(question, tuple(given[: len(question.case.answer_ids)]) == tuple(question.case.answer_ids))
        for question, given in zip(questions, answers, strict=True)
    ]


def _outcome(question: PasskeyQuestion, hit: bool, **details: Any) -> Outcome:
    return Outcome(question.id, "", question.case.length, float(hit), details={"depth": question.case.depth, **details})
