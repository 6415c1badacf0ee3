"""Held-out text in two halves, one to choose by and one to report on, and a model's losses on windows of it.

A number that was chosen because it did best on a text says too much of itself on that text. So documents go to one half
or the other (a source of one document is cut in two), and what was chosen is reported on text that chose nothing.
Windows are whole and side by side (evals/perplexity.py, `truncate`), those of all lengths cut from the same texts: long
documents alone, shorter ones joined.

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
from ctxext.evals.engine import Outcome, batches
from ctxext.evals.perplexity import EncodedText, Window, check_texts, cut_windows, encode, run_windows
from ctxext.model.load import LoadedModel
from ctxext.units import counted

TOKENS = 8_192  # a length, to choose by; the half to report on has twice that
FEWEST = 8  # windows a length where there is text enough: with fewer than six the paired test can show nothing
_TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True)
class Half:
    """Texts as ids, int64 [N] each, and the windows to run, all lengths one after another."""

    texts: list[torch.Tensor]
    windows: list[Window]

    @property
    def tokens(self) -> int:
        return sum(window.size for window in self.windows)


def halves(data: str, tokenizer: Any, lengths: Sequence[int], fewest: int = FEWEST) -> tuple[Half, Half]:
    """(to choose by, to report on) from `data`, a source of data/documents.py; of the embedded one what is held out.

    `lengths` are tokens; of each there are at least `fewest` windows to choose by, where there is text enough. Raises
    DataError where a half has less text than one window of the greatest length, and what reading raises.
    """
    longest = max(lengths)
    needs = [times * max(TOKENS, fewest * longest) for times in (1, 2)]
    documents = read_documents(data, split="held-out" if data == EMBEDDED else None)
    plain = PlainText(tokenizer)
    chosen, reported = _split(documents, plain, needs)
    documents.reading.tokens = sum(len(text.ids) for text in (*chosen, *reported))
    documents.reading.notes = plain.notes()
    return _half(chosen, data, tokenizer, lengths, fewest, 1), _half(reported, data, tokenizer, lengths, fewest, 2)


def _split(documents: Iterable[Document], plain: PlainText, needs: Sequence[int]) -> list[list[EncodedText]]:
    """Each document to the half that has less of what it needs, until both have enough."""
    sides: list[list[EncodedText]] = [[], []]
    had = [0, 0]
    for document in documents:
        for text in encode([document], plain.tokenizer, plain=plain):
            side = min((0, 1), key=lambda i: had[i] / needs[i])
            sides[side].append(text)
            had[side] += len(text.ids)
        if had[0] >= needs[0] and had[1] >= needs[1]:
            break
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
            hint="give longer text with --data (half of it is to choose by, half to report on) or a shorter --length",
        )
    cuts = [cut_windows(texts, T, tokenizer.eos_token_id, "truncate", alone_from=longest) for T in lengths]
    windows = []
    for cut in cuts:
        n = min(len(cut.windows), times * max(fewest, TOKENS // cut.length))
        windows += [cut.windows[i * len(cut.windows) // n] for i in range(n)]
    return Half([ids for ids, _ in cuts[0].segments], windows)


def losses(loaded: LoadedModel, half: Half) -> list[Outcome]:
    """The loss of every window, as (nats, tokens scored).

    Raises ModelError where one is not finite, or a token has no row in the model.
    """
    check_texts(loaded, half.texts)
    found = (run_windows(loaded, half.texts, batch) for batch in batches(half.windows, _TOKENS_PER_BATCH))
    return [outcome for outcomes in found for outcome in outcomes]


def by_length(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Nats a token at each length."""
    lengths = dict.fromkeys(outcome.length for outcome in outcomes)
    sums = {
        T: [sum(pair) for pair in zip(*((o.score, o.weight) for o in outcomes if o.length == T), strict=True)]
        for T in lengths
    }
    return {T: nats / tokens for T, (nats, tokens) in sums.items()}


def criterion(outcomes: Sequence[Outcome]) -> float:
    """What is made small: the mean over lengths of nats a token, so that a long length counts as much as a short."""
    found = by_length(outcomes)
    return sum(found.values()) / len(found)


def told_better(mine: Sequence[Outcome], others: Sequence[Outcome], looks: int = 1) -> tuple[bool, str]:
    """Whether `mine` has the lower criterion by evals/compare.py's paired test, and the figures in words.

    `mine` is the best of `looks` that were tried: its p is held to 0.05 / looks (Bonferroni). Without that a scale of
    1.2 was chosen on `tiny` at p = 0.007 of nine tries, and the other half showed no gain.
    """
    lengths = dict.fromkeys(outcome.length for outcome in mine)
    strata = [[(a, b) for a, b in zip(mine, others, strict=True) if a.length == T] for T in lengths]
    value, low, high, p = paired(strata)
    tries = f", the best of {looks} tries" if looks > 1 else ""
    words = f"{value:+.4f} nats, 95% from {low:+.4f} to {high:+.4f}, p = {p:.4f}, {counted(len(mine), 'pair')}{tries}"
    return p * looks < 0.05 and high < 0, words


Notice = Callable[[str], None]
