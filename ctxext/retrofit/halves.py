"""Held-out text in two halves, one to choose by and one to report on, and a model's losses on windows of it.

A number that was chosen because it did best on a text looks too good on that text. Therefore each document goes to one
half (a source of one document is cut in two), and the chosen number is reported on the other half. Windows are whole
and adjacent (evals/perplexity.py, `truncate`). The windows of all lengths are cut from the same texts: long documents
alone, shorter ones joined.

B windows of a batch, T tokens of a window, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ctxext.data.documents import EMBEDDED, Document, read_documents
from ctxext.data.encoding import PlainText
from ctxext.errors import DataError
from ctxext.evals.compare import paired
from ctxext.evals.item_runner import Outcome, batches
from ctxext.evals.perplexity import EncodedText, Window, check_texts, cut_windows, encode, run_windows
from ctxext.model.load import LoadedModel
from ctxext.units import counted

TOKENS = 8_192  # per length, to choose by; the half to report on has twice as many
MIN_WINDOWS = 8  # windows per length, if there is enough text: with fewer than six the paired test can show nothing
_TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True)
class Half:
    """Texts as ids, int64 [N] each, and the windows to run, one length after another."""

    texts: list[torch.Tensor]
    windows: list[Window]

    @property
    def tokens(self) -> int:
        """The tokens of all windows."""
        return sum(window.size for window in self.windows)


def halves(data: str, tokenizer: Any, lengths: Sequence[int], fewest: int = MIN_WINDOWS) -> tuple[Half, Half]:
    """Returns (half to choose by, half to report on) of `data`, a source of data/documents.py.

    Of the embedded corpus only held-out text is used. `lengths` are tokens. Each length has at least `fewest` windows
    to choose by, if there is enough text. Raises DataError if a half has less text than one window of the greatest
    length, and the errors of reading.
    """
    longest = max(lengths)
    # Tokens that each half needs; the half to report on has twice as many.
    needs = [times * max(TOKENS, fewest * longest) for times in (1, 2)]
    documents = read_documents(data, split="held-out" if data == EMBEDDED else None)
    plain = PlainText(tokenizer)
    chosen, reported = _split(documents, plain, needs)
    documents.reading.tokens = sum(len(text.ids) for text in (*chosen, *reported))
    documents.reading.notes = plain.notes()
    return _half(chosen, data, tokenizer, lengths, fewest, 1), _half(reported, data, tokenizer, lengths, fewest, 2)


def _split(documents: Iterable[Document], plain: PlainText, needs: Sequence[int]) -> list[list[EncodedText]]:
    """Gives each document to the half with the smaller share of its need, until both halves have enough."""
    sides: list[list[EncodedText]] = [[], []]
    had = [0, 0]
    for document in documents:
        for text in encode([document], plain.tokenizer, plain=plain):
            side = min((0, 1), key=lambda i: had[i] / needs[i])
            sides[side].append(text)
            had[side] += len(text.ids)
        if had[0] >= needs[0] and had[1] >= needs[1]:
            break
    # A single document is cut: a third to choose by, two thirds to report on.
    if len(sides[0]) == 1 and not sides[1]:
        ids, size = sides[0][0].ids, sides[0][0].text_bytes
        sides = [
            [EncodedText(part, size * len(part) / len(ids))]
            for part in ids.split([len(ids) // 3, len(ids) - len(ids) // 3])
        ]
    return sides


def _half(texts: list[EncodedText], data: str, tokenizer: Any, lengths: Sequence[int], fewest: int, times: int) -> Half:
    longest, tokens = max(lengths), sum(len(text.ids) for text in texts)
    if tokens < longest:
        raise DataError(
            f"{data}: half of the text has {tokens:,} tokens, and one window has {longest:,}",
            hint="give longer text with --data (one half to choose by, one to report on), or a shorter --length",
        )
    cuts = [cut_windows(texts, T, tokenizer.eos_token_id, "truncate", alone_from=longest) for T in lengths]
    windows = []
    for cut in cuts:
        # Take n windows evenly spread over all that there are.
        n = min(len(cut.windows), times * max(fewest, TOKENS // cut.length))
        windows += [cut.windows[i * len(cut.windows) // n] for i in range(n)]
    return Half([ids for ids, _ in cuts[0].segments], windows)


def losses(loaded: LoadedModel, half: Half) -> list[Outcome]:
    """Returns the loss of every window, as (nats, tokens scored).

    Raises ModelError if a loss is not finite, or if a token has no row in the model.
    """
    check_texts(loaded, half.texts)
    found = (run_windows(loaded, half.texts, batch) for batch in batches(half.windows, _TOKENS_PER_BATCH))
    return [outcome for outcomes in found for outcome in outcomes]


def by_length(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Returns nats a token at each length."""
    lengths = dict.fromkeys(outcome.length for outcome in outcomes)
    sums = {
        T: [sum(pair) for pair in zip(*((o.score, o.weight) for o in outcomes if o.length == T), strict=True)]
        for T in lengths
    }
    return {T: nats / tokens for T, (nats, tokens) in sums.items()}


def criterion(outcomes: Sequence[Outcome]) -> float:
    """Returns the number to minimise: nats a token, averaged over lengths, so that all lengths count equally."""
    found = by_length(outcomes)
    return sum(found.values()) / len(found)


def significantly_better(mine: Sequence[Outcome], others: Sequence[Outcome], looks: int = 1) -> tuple[bool, str]:
    """Returns whether `mine` has a significantly lower criterion (evals/compare.py, paired), and the figures in words.

    `mine` is the best of `looks` tries, so that its p must be below 0.05 / looks (Bonferroni). Without this correction,
    a scale of 1.2 was chosen on `tiny` at p = 0.007 of nine tries, and the other half showed no gain.
    """
    lengths = dict.fromkeys(outcome.length for outcome in mine)
    # Pairs of the same window, grouped by length; each length counts equally.
    strata = [[(a, b) for a, b in zip(mine, others, strict=True) if a.length == T] for T in lengths]
    value, low, high, p = paired(strata)
    tries = f", the best of {looks} values" if looks > 1 else ""
    words = f"{value:+.4f} nats, 95% from {low:+.4f} to {high:+.4f}, p = {p:.4f}, {counted(len(mine), 'pair')}{tries}"
    return p * looks < 0.05 and high < 0, words


Notice = Callable[[str], None]
