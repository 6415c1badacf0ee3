"""Perplexity at a length, under a named protocol, because the protocols give different numbers.

- `hf-stride`: windows `stride` apart (default length // 2); each scores only the tokens that no earlier window has
  scored, so every token but a text's first counts once, with at least length - stride tokens before it except in the
  first window (Hugging Face, "Perplexity of fixed-length models").
- `longlora`: whole windows 256 apart, the mean over ALL positions of each (Chen et al. 2024, eval.py). A token counts
  about length / 256 times: `progress` reports the number of windows before the first one runs.
- `truncate`: whole windows side by side, all positions. It is cheap and pessimistic: half of the tokens have less than
  length / 2 before them.

A window is an item: its id names length, text and position, so that models with one tokenizer are compared by windows.

B batch, T tokens of a window, E model width, N tokens of a text or scored tokens of a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ctxext.data.documents import EMBEDDED, Document, Documents, read_documents
from ctxext.data.encoding import PlainText
from ctxext.errors import DataError, InputError, ModelError
from ctxext.evals import PROTOCOLS
from ctxext.evals.eval_spec import Perplexity
from ctxext.evals.item_runner import Ledger, Outcome, ResultRow, SuiteJob, run_job
from ctxext.model.ids import check_ids
from ctxext.model.load import LoadedModel, hidden_states, output_weight
from ctxext.progress import CountProgress, ignore
from ctxext.train.loss import token_losses
from ctxext.units import counted, format_duration

LONGLORA_STRIDE = 256
DEFAULT_TOKENS = 32_768  # of text; raised to twice the greatest length where that is more
_FIRST_BUCKET = 64  # the first bucket has positions 1..63; each later one is as wide as all before it


@dataclass(frozen=True)
class EncodedText:
    """A document's tokens and the number of UTF-8 bytes that they encode."""

    ids: torch.Tensor  # int64 [N]
    text_bytes: float


@dataclass(frozen=True)
class Bucket:
    """Mean loss of the targets with `start` <= tokens before them in the window < `stop`."""

    start: int
    stop: int
    tokens: int
    nats_per_token: float | None  # None where the bucket is empty


@dataclass(frozen=True)
class PerplexityResult:
    """`nats_per_token` is the mean over `tokens_scored` targets; `perplexity` its exponential.

    `bits_per_byte` is nats_per_token / ln 2 times the tokens per byte of the whole text (EOS between joined documents
    counts as a token), so it compares models with different tokenizers. Where a limit cuts a text, its bytes are
    counted in proportion to the tokens kept.
    """

    protocol: str
    length: int
    stride: int
    windows: int
    tokens_scored: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    documents_alone: int  # documents scored by themselves
    documents_joined: int  # shorter ones, joined by EOS and scored as one text
    text_tokens: int  # tokens of the text the windows are cut from
    dropped_tokens: int  # tokens of the joined text where it is too short for one window
    buckets: list[Bucket] = field(repr=False)
    seed: None = None  # no randomness

    def row(self, data: str) -> ResultRow:
        """Returns the result as a row of a report; `data` names the text."""
        protocol = f"{self.protocol}, stride {self.stride:,}, on {data}"
        details = {
            name: value for name, value in asdict(self).items() if name not in ("protocol", "length", "perplexity")
        }
        return ResultRow(
            "perplexity", protocol, "", self.length, "perplexity", self.perplexity, self.tokens_scored, details=details
        )


@dataclass(frozen=True)
class Window:
    """One window: its input is the tokens begin <= i < end of one text; its scored targets are first <= i < end."""

    length: int
    text: int
    begin: int
    end: int
    first: int

    @property
    def id(self) -> str:
        """Returns length, text and first token as one id."""
        return f"{self.length}/{self.text}/{self.begin}"

    @property
    def size(self) -> int:
        """Returns the number of tokens."""
        return self.end - self.begin

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the number of tokens and the place of the first scored target; equal shapes run together."""
        return self.size, self.first - self.begin


def encode(
    documents: Iterable[Document], tokenizer: Any, *, max_tokens: int | None = None, plain: PlainText | None = None
) -> list[EncodedText]:
    """Tokenises documents, in order, until there are `max_tokens` (None: all); the last one is cut there.

    No BOS is added, even where the tokenizer adds one to a prompt. Short documents are joined, and windows after a
    text's first have none in any protocol, so all windows are treated alike. Control tokens in the text are read as
    text; `plain`, of the same tokenizer, counts them.
    """
    plain = plain or PlainText(tokenizer)
    texts: list[EncodedText] = []
    left = math.inf if max_tokens is None else max_tokens
    for document in documents:
        ids = plain.encode([document.text])[0][0]
        kept = ids[: int(min(left, len(ids)))]
        if kept:
            share = len(kept) / len(ids)
            texts.append(EncodedText(torch.tensor(kept), share * len(document.text.encode())))
            left -= len(kept)
        if left <= 0:
            break
    if isinstance(documents, Documents):
        documents.reading.tokens = sum(len(text.ids) for text in texts)
        documents.reading.notes = plain.notes()
    return texts


def check_texts(loaded: LoadedModel, texts: Iterable[torch.Tensor]) -> None:
    """Raises ModelError, before any window runs, if an id has no row in the model's output matrix."""
    largest = max((int(ids.max()) for ids in texts if len(ids)), default=-1)
    check_ids([largest], output_weight(loaded.model).shape[0], loaded.name)


def perplexity(
    loaded: LoadedModel,
    texts: Sequence[EncodedText],
    length: int,
    *,
    protocol: str = "hf-stride",
    stride: int | None = None,
    alone_from: int | None = None,
    tokens_per_batch: int = 16_384,
    progress: CountProgress = ignore,
) -> PerplexityResult:
    """Returns the perplexity of `texts` (see `encode`) when the model sees at most `length` tokens.

    The module docstring describes the protocols; `stride` is in tokens.

    Documents of at least `alone_from` tokens (default `length`) are separate texts. Shorter ones are joined by EOS into
    one more text, which is left out (and counted in `dropped_tokens`) where it is shorter than that. To compare lengths
    on the same text, give all of them one `alone_from`: the greatest length.

    `progress(windows done, windows in all)`. Memory grows with `length` and `tokens_per_batch` (at least one window
    runs at once), never with T x vocabulary. The model is left in eval mode. `length` may exceed what the model
    supports: that is how damage is measured.

    Errors: InputError (protocol, length, stride), DataError (not enough text), ModelError (a loss that is not finite, a
    token without a row in the model).
    """
    check_texts(loaded, [text.ids for text in texts])
    cut = cut_windows(texts, length, loaded.tokenizer.eos_token_id, protocol, stride, alone_from)
    run = partial(run_windows, loaded, [ids for ids, _ in cut.segments])
    ledger = Ledger()
    run_job(SuiteJob(cut.windows, run, lambda _: []), ledger, tokens_per_batch, progress)
    return summed(cut, [ledger.outcomes[window.id] for window in cut.windows])


def job(loaded: LoadedModel, spec: Perplexity, place: Path) -> SuiteJob:
    """Returns the job of all lengths of a spec on the same text.

    Every length takes the same documents as separate texts.
    """
    assert spec.lengths is not None
    longest = max(spec.lengths)
    split = "held-out" if spec.data == EMBEDDED else None
    documents = read_documents(spec.data, text_field=spec.text_field, split=split)
    texts = encode(documents, loaded.tokenizer, max_tokens=spec.limit or max(DEFAULT_TOKENS, 2 * longest))
    check_texts(loaded, [text.ids for text in texts])
    eos = loaded.tokenizer.eos_token_id
    cuts = [cut_windows(texts, length, eos, spec.protocol, spec.stride, longest) for length in spec.lengths]
    where = "held-out embedded text" if spec.data == EMBEDDED else spec.data

    def rows(outcomes: Sequence[Outcome]) -> list[ResultRow]:
        by_id = {outcome.id: outcome for outcome in outcomes}
        return [summed(cut, [by_id[window.id] for window in cut.windows]).row(where) for cut in cuts]

    items = [window for cut in cuts for window in cut.windows]
    tokens = sum(window.size for window in items)
    notes = [f"perplexity: {counted(len(items), 'window')}, {tokens:,} tokens to run ({spec.protocol})"]
    # The texts of the cuts are the same, so any cut's segments serve all windows.
    run = partial(run_windows, loaded, [ids for ids, _ in cuts[0].segments])
    # longlora allows a stride beyond the length; then some text is in no window.
    skipping = [cut for cut in cuts if cut.stride > cut.length]
    if skipping:
        shown = ", ".join(f"{cut.length:,}" for cut in skipping)
        notes.append(f"windows {skipping[0].stride:,} tokens apart skip text at length {shown}")
    # longlora is slow. Run one window to estimate the total time; the job runs that window again.
    if spec.protocol == "longlora":
        began = time.perf_counter()
        run(items[:1])
        seconds = (time.perf_counter() - began) * tokens / items[0].size
        notes.append(
            f"longlora computes each token about length / 256 times: about {format_duration(seconds)}, estimated from "
            "the first window"
        )
    return SuiteJob(items, run, rows, tuple(notes))


def summed(cut: Cut, outcomes: Sequence[Outcome]) -> PerplexityResult:
    """Combines the outcomes of a cut's windows, in order, into one result."""
    edges = _bucket_edges(cut.length).tolist()
    nats, counts = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1)
    # Every window of one length has the same bucket edges, so sums and counts add up bucket by bucket.
    for outcome in outcomes:
        for i, (sum_, count) in enumerate(outcome.details["buckets"]):
            nats[i] += sum_
            counts[i] += count
    buckets = [
        Bucket(start, stop, n, total / n if n else None)
        for start, stop, n, total in zip(edges[:-1], edges[1:], counts, nats, strict=True)
    ]
    tokens, text_tokens = sum(counts), sum(len(ids) for ids, _ in cut.segments)
    per_token = sum(nats) / tokens
    return PerplexityResult(
        protocol=cut.protocol,
        length=cut.length,
        stride=cut.stride,
        windows=len(cut.windows),
        tokens_scored=tokens,
        nats_per_token=per_token,
        perplexity=_exp(per_token),
        bits_per_byte=per_token / math.log(2) * text_tokens / sum(size for _, size in cut.segments),
        documents_alone=cut.documents[0],
        documents_joined=cut.documents[1],
        dropped_tokens=cut.documents[2],
        text_tokens=text_tokens,
        buckets=buckets,
    )


def run_windows(loaded: LoadedModel, texts: list[torch.Tensor], batch: Sequence[Window]) -> list[Outcome]:
    """Returns each window's loss, in all and by bucket of position. Adjacent windows of one shape run together."""
    outcomes = []
    for (size, first), same in groupby(batch, key=lambda window: window.shape):
        windows = list(same)
        losses = _window_losses(loaded.model, windows, texts)  # [B, scored] fp64
        if not bool(torch.isfinite(losses).all()):
            raise ModelError(
                f"{loaded.name} gives a loss that is not finite at length {windows[0].length:,}",
                hint="its weights or activations overflow: evaluate it in float32",
            )
        edges = _bucket_edges(windows[0].length)
        # All windows of one shape score the same positions, so they share the bucket of each position and the counts.
        bucket = torch.bucketize(torch.arange(first, size), edges, right=True) - 1
        counts = torch.bincount(bucket, minlength=len(edges) - 1).tolist()
        sums = losses.new_zeros(len(windows), len(edges) - 1).index_add_(1, bucket, losses).tolist()
        for window, row in zip(windows, sums, strict=True):
            details = {"buckets": [[nats, count] for nats, count in zip(row, counts, strict=True)]}
            outcomes.append(Outcome(window.id, "", window.length, sum(row), size - first, details))
    return outcomes


@dataclass(frozen=True)
class Cut:
    """Texts cut into windows: segments are (ids, bytes); documents are (separate, joined, tokens dropped)."""

    protocol: str
    length: int
    stride: int
    segments: list[tuple[torch.Tensor, float]]
    windows: list[Window]
    documents: tuple[int, int, int]


def cut_windows(
    texts: Sequence[EncodedText],
    length: int,
    eos_id: int | None,
    protocol: str = "hf-stride",
    stride: int | None = None,
    alone_from: int | None = None,
) -> Cut:
    """Returns the windows that `perplexity` runs. Errors as there."""
    stride = _checked_stride(protocol, length, stride)
    segments, counts = _segments(texts, max(length, alone_from or length), eos_id)
    windows = [w for i, (ids, _) in enumerate(segments) for w in _windows(i, len(ids), protocol, length, stride)]
    return Cut(protocol, length, stride, segments, windows, counts)


def _checked_stride(protocol: str, length: int, stride: int | None) -> int:
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is unknown; allowed are {', '.join(PROTOCOLS)}")
    if length < 2:
        raise InputError(f"length is {length}; perplexity needs at least 2 tokens")
    if protocol == "truncate":
        if stride not in (None, length):
            raise InputError(
                f"stride {stride} was given, but the windows of `truncate` are adjacent",
                hint="leave the stride out, or choose hf-stride",
            )
        return length
    if stride is None:
        stride = LONGLORA_STRIDE if protocol == "longlora" else length // 2
    # Windows of longlora score all their positions, so they need not overlap. Text between them is skipped (see `job`).
    largest = length - 1 if protocol == "hf-stride" else math.inf
    if not 1 <= stride <= largest:
        allowed = "1 or more" if largest == math.inf else f"1 to {largest}"
        raise InputError(f"stride is {stride}; {protocol} at length {length} allows {allowed}")
    return stride


def _segments(
    texts: Sequence[EncodedText], alone_from: int, eos_id: int | None
) -> tuple[list[tuple[torch.Tensor, float]], tuple[int, int, int]]:
    """Returns texts to score as (ids, bytes), and (documents alone, documents joined, tokens dropped)."""
    alone = [(text.ids, text.text_bytes) for text in texts if len(text.ids) >= alone_from]
    short = [text for text in texts if len(text.ids) < alone_from]
    if not short:
        return _enough(alone, 0, alone_from), (len(alone), 0, 0)
    if eos_id is None:
        raise InputError(
            "the tokenizer has no EOS token, which joins short documents",
            hint=f"give documents of at least {alone_from:,} tokens",
        )
    end = torch.tensor([eos_id])
    # EOS follows every short document, the last one too.
    joined = torch.cat([part for text in short for part in (text.ids, end)])
    if len(joined) < alone_from:
        return _enough(alone, len(joined), alone_from), (len(alone), 0, len(joined))
    return [*alone, (joined, sum(text.text_bytes for text in short))], (len(alone), len(short), 0)


def _enough(segments: list[tuple[torch.Tensor, float]], had: int, needed: int) -> list[tuple[torch.Tensor, float]]:
    if not segments:
        raise DataError(
            f"the text has {had:,} tokens; one window needs {needed:,}",
            hint="give more text, a greater limit, or a shorter length",
        )
    return segments


def _windows(text: int, size: int, protocol: str, length: int, stride: int) -> Iterator[Window]:
    if protocol != "hf-stride":
        for begin in range(0, size - length + 1, stride):
            yield Window(length, text, begin, begin + length, begin + 1)
        return
    # hf-stride: the last window may be shorter; `scored` is the first token that no window has scored yet.
    begin, scored = 0, 1
    while scored < size:
        end = min(begin + length, size)
        yield Window(length, text, begin, end, scored)
        begin, scored = begin + stride, end


@torch.no_grad()
def _window_losses(model: torch.nn.Module, batch: Sequence[Window], texts: list[torch.Tensor]) -> torch.Tensor:
    """Returns the loss of each scored target, fp64 [B, scored] on the CPU."""
    model.eval()
    weight = output_weight(model)
    ids = torch.stack([texts[w.text][w.begin : w.end] for w in batch]).to(weight.device)  # [B, T]
    first = batch[0].shape[1]
    hidden = hidden_states(model, ids)[:, first - 1 : -1]  # [B, scored, E]
    losses = token_losses(hidden.flatten(0, 1), weight, ids[:, first:].flatten())
    return losses.double().cpu().view(len(batch), -1)


def _bucket_edges(length: int) -> torch.Tensor:
    """Returns 1, 64, 128, 256 and so on, then `length`. All lengths share these edges, so their rows compare."""
    edges = [1]
    step = _FIRST_BUCKET
    while step < length:
        edges.append(step)
        step *= 2
    return torch.tensor([*edges, length])


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700.0 else math.inf
