"""A small passkey grid during training, under the inference attention: one forward per case, with the answer as input.

The cases are always the same (data/haystack.py), hidden in held-out text of the embedded corpus. A case is correct when
every token of its answer is the most probable one at its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ctxext.data.haystack import HaystackCase, haystack_text, passkey_cases
from ctxext.model.load import load_tokenizer
from ctxext.train.engine import Engine
from ctxext.train.loss import IGNORED
from ctxext.train.run_plan import RunPlan

HAYSTACK = 32  # characters per token of the longest case, so that the filler can start at many places


def grid_cases(plan: RunPlan) -> tuple[HaystackCase, ...]:
    """Returns the cases of validation.passkey, () if off. Raises InputError for a length too short for a needle."""
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
def measure(engine: Engine, cases: Sequence[HaystackCase], backend: str) -> dict[str, Any]:
    """Measures accuracy (0 to 1) and mean nats of an answer token, over all cases and in `cells` (length, depth).

    Every rank runs its share of the cases. The caller sets the model to eval mode.
    """
    cells = {cell: i for i, cell in enumerate(dict.fromkeys((case.length, case.depth) for case in cases))}
    sums = torch.zeros(len(cells), 4, dtype=torch.float64)  # (right, cases, nats, answer tokens)
    for first in range(0, len(cases), engine.world):
        mine = first + engine.rank < len(cases)  # ZeRO-3 needs equally many forwards on every rank
        case = cases[first + engine.rank if mine else first]
        ids, answer = torch.tensor(case.prompt_ids + case.answer_ids), len(case.answer_ids)
        # Score the answer alone. Labels are shifted by one: the label of position t is token t + 1.
        labels = torch.full((len(ids) - 1,), IGNORED)
        labels[-answer:] = ids[-answer:]
        inputs = (x[None].to(engine.device) for x in (ids[:-1], labels))
        nats, right = engine.loss(*inputs, each=True, backend=backend)[:, 0, -answer:].double().cpu()
        if mine:
            row = [float(right.all()), 1.0, float(nats.sum()), answer]
            sums[cells[case.length, case.depth]] += torch.tensor(row, dtype=torch.float64)
    # Sum over all ranks, so that every rank returns the same result.
    sums = torch.tensor(engine.total(*sums.flatten().tolist())).view(-1, 4)
    rows = [{"length": length, "depth": depth} | _rates(sums[i]) for (length, depth), i in cells.items()]
    return _rates(sums.sum(0)) | {"cells": rows}


def in_words(grid: dict[str, Any]) -> str:
    """Returns a line such as `passkey 50% (512: 100%, 1,024: 0%), 0.731 nats an answer token`.

    The mean over depths is exact, because every cell has the same number of cases.
    """
    by_length: dict[int, list[float]] = {}
    for cell in grid["cells"]:
        by_length.setdefault(cell["length"], []).append(cell["accuracy"])
    lengths = ", ".join(f"{length:,}: {sum(found) / len(found):.0%}" for length, found in by_length.items())
    return f"passkey {grid['accuracy']:.0%} ({lengths}), {grid['answer_nats']:.3f} nats an answer token"


def _rates(sums: torch.Tensor) -> dict[str, float]:
    right, cases, nats, tokens = sums.tolist()
    return {"accuracy": right / cases, "answer_nats": nats / tokens}
