"""Random rows of text of an exact length, by a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxext.data.cases import private_random
from ctxext.data.haystack import haystack_ids
from ctxext.data.prompts import framing
from ctxext.evals.haystacks import haystack


def text_rows(tokenizer: Any, data: str, length: int, samples: int, seed: int) -> Tensor:
    """Returns ids [samples, length]: what the tokenizer puts first (a BOS, or nothing), then text from random places.

    `data` as in evals/haystacks.py; a text shorter than a row is repeated. The rows of a smaller `length` are the
    beginnings of those of a greater one.
    """
    _, text = haystack(data)
    ids, (begin, _) = haystack_ids(tokenizer, text), framing(tokenizer)
    rng = private_random("probe texts", seed)
    rows = []
    for _ in range(samples):
        start = rng.randrange(len(ids))
        rows.append(begin + [ids[(start + i) % len(ids)] for i in range(length - len(begin))])
    return torch.tensor(rows)
