"""Text for measurements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxext.evals.perplexity import encode


def joined(documents: Any, tokenizer: Any, most: int) -> Tensor:
    """Returns the documents' tokens in one row [N], N at most `most`, with EOS between documents if there is an EOS."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[Tensor] = []
    for text in encode(documents, tokenizer, max_tokens=most):
        parts += [torch.tensor(end, dtype=torch.int64), text.ids] if parts else [text.ids]
    return torch.cat(parts)[:most] if parts else torch.zeros(0, dtype=torch.int64)
