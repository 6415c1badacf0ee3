"""Passkey retrieval over length x depth: does the model give back five digits that it was shown once?

B batch, T tokens of a case, A answer tokens of a batch together, E model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ctxext.data.haystack import Case, passkey_cases
from ctxext.errors import InputError
from ctxext.model.load import LoadedModel, hidden_states, output_weight

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
HAYSTACKS = ("held-out", "grass")


@dataclass(frozen=True)
class Score:
    """`hits` of `n` cases; `low` and `high` bound the true rate with 95% confidence (Wilson 1927)."""

    n: int
    hits: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One square of the grid. `answer_nats` is the mean loss of an answer token; None when decoded."""

    length: int
    depth: float
    score: Score
    answer_nats: float | None


@dataclass(frozen=True)
class PasskeyResult:
    """Accuracy is the share of cases whose whole answer is right. `chance` is that of guessing the digits."""

    protocol: str  # passkey-teacher-forced or passkey-decoded
    haystack: str
    seed: int
    chance: float
    overall: Score
    by_length: dict[int, Score]
    by_depth: dict[float, Score]
    cells: list[Cell] = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """A flat row a length, for a table."""
        return [
            {
                "length": length,
                "protocol": self.protocol,
                "haystack": self.haystack,
                "accuracy": score.accuracy,
                "low": score.low,
                "high": score.high,
                "n": score.n,
                "chance": self.chance,
                "seed": self.seed,
            }
            for length, score in self.by_length.items()
        ]


@dataclass(frozen=True)
class _Outcome:
    length: int
    depth: float
    hit: bool
    nats: float  # summed over the answer
    tokens: int


def passkey(
    loaded: LoadedModel,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    per_depth: int = 10,
    seed: int = 0,
    haystack: str = "held-out",
    haystack_text: str | None = None,
    decode: bool = False,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int, int], None] | None = None,
) -> PasskeyResult:
    """Exact-match accuracy on `per_depth` cases for each of `lengths` (tokens) x `depths` (0 first, 1 last).

    Greedy decoding gives the answer if and only if, with the answer itself fed in, every answer token is the
    argmax at its place: up to the first wrong token both have seen the same. So a case costs ONE forward, and
    only the answer's places go through the head. `decode` runs `generate` with its cache instead, one case at
    a time; the two differ only where rounding turns two nearly equal logits about.

    `haystack` is "held-out" (of the embedded corpus) or "grass" (repeated sentences), or the name to report
    for `haystack_text`, a text of one's own. Cases of a length have that many tokens exactly, so no padding.
    `progress(cases done, cases in all)`. The model is left in eval mode. Sampling is never used.

    Errors: InputError (a haystack, a depth, or a length too short for needle and question).
    """
    if haystack_text is None and haystack not in HAYSTACKS:
        raise InputError(f"haystack {haystack!r} is unknown; allowed are {', '.join(HAYSTACKS)}, or a text")
    if per_depth < 1 or not lengths or not depths:
        raise InputError(
            "passkey needs at least one length, one depth and one case for each", hint="give a limit of at least 1"
        )
    loaded.model.eval()
    run = _decoded if decode else _teacher_forced
    outcomes: list[_Outcome] = []
    digits = 1
    for length in lengths:
        cases = passkey_cases(
            loaded.tokenizer,
            length,
            depths=depths,
            per_depth=per_depth,
            seed=seed,
            haystack=haystack if haystack_text is None else haystack_text,
        )
        digits = len(cases[0].key)
        for batch in _batches(cases, 1 if decode else max(1, tokens_per_batch // length)):
            outcomes += run(loaded.model, batch)
            if progress is not None:
                progress(len(outcomes), len(lengths) * len(cases))
    protocol = "passkey-decoded" if decode else "passkey-teacher-forced"
    return _result(outcomes, protocol, haystack, seed, 10.0**-digits)


def _result(outcomes: list[_Outcome], protocol: str, haystack: str, seed: int, chance: float) -> PasskeyResult:
    lengths = dict.fromkeys(o.length for o in outcomes)
    depths = dict.fromkeys(o.depth for o in outcomes)
    return PasskeyResult(
        protocol,
        haystack,
        seed,
        chance,
        _score(outcomes),
        {length: _score([o for o in outcomes if o.length == length]) for length in lengths},
        {depth: _score([o for o in outcomes if o.depth == depth]) for depth in depths},
        [_cell(length, depth, outcomes) for length in lengths for depth in depths],
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a rate, by Wilson's score; (0, 1) where nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    middle = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def _batches(cases: list[Case], count: int) -> Iterator[list[Case]]:
    yield from (cases[i : i + count] for i in range(0, len(cases), count))


@torch.no_grad()
def _teacher_forced(model: torch.nn.Module, cases: list[Case]) -> list[_Outcome]:
    weight = output_weight(model)
    ids = torch.tensor([case.prompt_ids + case.answer_ids for case in cases], device=weight.device)  # [B, T]
    hidden = hidden_states(model, ids[:, :-1])  # [B, T - 1, E]
    counts = [len(case.answer_ids) for case in cases]
    rows = torch.cat([hidden[i, -count:] for i, count in enumerate(counts)])  # [A, E]
    answers = torch.cat([ids[i, -count:] for i, count in enumerate(counts)])  # [A]
    logits = torch.nn.functional.linear(
        rows, weight.to(rows.dtype)
    )  # [A, V], in the model's dtype as `generate` has them
    right = (logits.argmax(-1) == answers).split(counts)
    nats = torch.nn.functional.cross_entropy(logits.float(), answers, reduction="none").split(counts)
    return [
        _Outcome(case.length, case.depth, bool(r.all()), float(loss.sum()), count)
        for case, r, loss, count in zip(cases, right, nats, counts, strict=True)
    ]


@torch.no_grad()
def _decoded(model: Any, cases: list[Case]) -> list[_Outcome]:
    outcomes = []
    for case in cases:
        prompt = torch.tensor([case.prompt_ids], device=model.device)
        # Explicit, because what is unset here is filled in from the checkpoint's own generation_config.
        given = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            max_new_tokens=len(case.answer_ids),
            use_cache=True,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=0,
        )
        hit = tuple(given[0, prompt.shape[1] :].tolist()) == tuple(case.answer_ids)
        outcomes.append(_Outcome(case.length, case.depth, hit, math.nan, 0))
    return outcomes


def _score(outcomes: Sequence[_Outcome]) -> Score:
    n, hits = len(outcomes), sum(o.hit for o in outcomes)
    return Score(n, hits, hits / n if n else 0.0, *wilson(hits, n))


def _cell(length: int, depth: float, outcomes: Sequence[_Outcome]) -> Cell:
    mine = [o for o in outcomes if (o.length, o.depth) == (length, depth)]
    tokens = sum(o.tokens for o in mine)
    return Cell(length, depth, _score(mine), sum(o.nats for o in mine) / tokens if tokens else None)
