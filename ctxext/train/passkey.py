"""A small passkey grid while a model trains, under the attention it will run with: one forward a case, answer fed in.

The same cases every time (data/haystack.py), hidden in held-out text of the embedded corpus. A case is right when every
token of its answer is the most probable one at its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ctxext.data.haystack import Case, haystack_text, passkey_cases
from ctxext.model.load import load_tokenizer
from ctxext.train.engine import Engine
from ctxext.train.loss import IGNORED
from ctxext.train.plan import RunPlan

HAYSTACK = 32  # characters for every token of the longest case: room for filler to begin in many places


def grid_cases(plan: RunPlan) -> tuple[Case, ...]:
    """The cases of validation.passkey, none where it is off. Raises InputError for a length too short for a needle."""
    spec = plan.spec.validation.passkey
    if spec is None:
        return ()
    tokenizer = load_tokenizer(plan.source.directory)
    text = haystack_text("held-out")[: HAYSTACK * max(spec.lengths)]
    return tuple(
        case
        for length in spec.lengths
        for case in passkey_cases(tokenizer, length, depths=spec.depths, per_depth=spec.cases, haystack=text)
    )


@torch.no_grad()
def measure(engine: Engine, cases: Sequence[Case], backend: str) -> dict[str, Any]:
    """Accuracy (0 to 1) and mean nats of an answer token, of all cases and in `cells`, one a length and depth.

    Every rank runs its share of the cases; the model is to be in eval mode.
    """
    cells = {cell: i for i, cell in enumerate(dict.fromkeys((case.length, case.depth) for case in cases))}
    sums = torch.zeros(len(cells), 4, dtype=torch.float64)  # (right, cases, nats, answer tokens)
    for first in range(0, len(cases), engine.world):
        mine = first + engine.rank < len(cases)  # every rank runs equally often, for ZeRO-3's sake
        case = cases[first + engine.rank if mine else first]
        ids, answer = torch.tensor(case.prompt_ids + case.answer_ids), len(case.answer_ids)
        labels = torch.full((len(ids) - 1,), IGNORED)
        labels[-answer:] = ids[-answer:]
        inputs = (x[None].to(engine.device) for x in (ids[:-1], labels))
        nats, right = engine.loss(*inputs, each=True, backend=backend)[:, 0, -answer:].double().cpu()
        if mine:
            row = [float(right.all()), 1.0, float(nats.sum()), answer]
            sums[cells[case.length, case.depth]] += torch.tensor(row, dtype=torch.float64)
    sums = torch.tensor(engine.total(*sums.flatten().tolist())).view(-1, 4)
    rows = [{"length": length, "depth": depth} | _rates(sums[i]) for (length, depth), i in cells.items()]
    return _rates(sums.sum(0)) | {"cells": rows}


def in_words(grid: dict[str, Any]) -> str:
    """`passkey 50% (512: 100%, 1,024: 0%), 0.731 nats an answer token`; every cell has as many cases."""
    by_length: dict[int, list[float]] = {}
    for cell in grid["cells"]:
        by_length.setdefault(cell["length"], []).append(cell["accuracy"])
    lengths = ", ".join(f"{length:,}: {sum(found) / len(found):.0%}" for length, found in by_length.items())
    return f"passkey {grid['accuracy']:.0%} ({lengths}), {grid['answer_nats']:.3f} nats an answer token"


def _rates(sums: torch.Tensor) -> dict[str, float]:
    right, cases, nats, tokens = sums.tolist()
    return {"accuracy": right / cases, "answer_nats": nats / tokens}
