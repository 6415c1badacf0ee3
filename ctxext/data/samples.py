"""Samples text from a model, so that the model can be trained on its own text if there is no corpus.

Documents are sampled in batches, from the whole vocabulary. Each one begins at its first token (BOS if the tokenizer
adds one, else EOS, which documents follow in training) and ends at its end or at the model's trained length. Training
uses that first token and the sampled tokens, unchanged. If a document was cut at the length, the model did not write
the EOS that joins documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ctxext.data.documents import Document
from ctxext.data.prompts import framing
from ctxext.errors import DataError
from ctxext.model.decode import generate, sampled, stop_ids

GIVE_UP = 8  # batches without a token before an error is raised


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
    """Yields at least `tokens` tokens of text, in documents of at most `length`, `batch` at once.

    `length` includes the first token and EOS. Deterministic for a seed, a device and a batch. `progress` is called with
    the tokens written so far. Raises DataError if the model ends every document before it begins.
    """
    begin = framing(tokenizer)[0] or [tokenizer.eos_token_id]
    stop, choose = stop_ids(model, tokenizer), sampled(temperature, seed)
    done, empty = 0, 0
    while done < tokens:
        # The length includes the first token and the EOS that joins documents.
        rows = generate(model, [begin] * batch, length - 1 - len(begin), stop=stop, choose=choose)
        written = sum(map(len, rows))
        empty = 0 if written else empty + 1
        if empty == GIVE_UP:
            raise DataError(f"the model ends every sampled document at its first token ({GIVE_UP * batch} of them)")
        # Keep the ids: encoding the decoded text again could give other tokens.
        for number, row in enumerate(rows):
            if row:
                text = tokenizer.decode(row, skip_special_tokens=True)
                yield Document(text, f"sample-{done}-{number}", ids=(*begin, *row))
        done += written
        progress(done)
