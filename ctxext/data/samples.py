"""Text that a model writes itself: what it can be taught from by itself where there is no corpus.

Documents are sampled a batch at a time, each from its first token (BOS where the tokenizer adds one, else EOS, which
documents follow in training) to its end or to the model's trained length, from the whole vocabulary. What is trained on
is that first token and what was sampled, token by token; where a document was cut at the length, the EOS that joins
documents is one that the model did not write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ctxext.data.documents import Document
from ctxext.data.prompts import framing
from ctxext.errors import DataError
from ctxext.model.decode import generate, sampled, stop_ids

GIVE_UP = 8  # batches without a token


def sample_documents(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    batch: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Document]:
    """At least `tokens` tokens of text, in documents of at most `length` (with first token and EOS), `batch` at once.

    Deterministic for a seed, a device and a batch. `progress` is told the tokens written so far. Raises DataError where
    the model ends every document before it begins.
    """
    begin = framing(tokenizer)[0] or [tokenizer.eos_token_id]
    stop, choose = stop_ids(model, tokenizer), sampled(temperature, seed)
    done, empty = 0, 0
    while done < tokens:
        rows = generate(model, [begin] * batch, length - 1 - len(begin), stop=stop, choose=choose)
        written = sum(map(len, rows))
        empty = 0 if written else empty + 1
        if empty == GIVE_UP:
            raise DataError(f"the model ends every document it samples at once ({GIVE_UP * batch} of them)")
        for number, row in enumerate(rows):
            if row:
                text = tokenizer.decode(row, skip_special_tokens=True)
                yield Document(text, f"sample-{done}-{number}", ids=(*begin, *row))
        done += written
        progress(done)
