"""Perplexity at a length, under a protocol that is named, because the protocols do not agree with each other.

- `hf-stride`: windows `stride` apart (default length // 2); each scores only the tokens no earlier window
  has scored, so every token but a text's first counts once, with at least length - stride tokens before
  it except in the first window (Hugging Face, "Perplexity of fixed-length models").
- `longlora`: whole windows 256 apart, the mean over ALL positions of each (Chen et al. 2024, eval.py). A
  token counts about length / 256 times: `progress` says how many windows that means before the first.
- `truncate`: whole windows side by side, all positions. Cheap, and pessimistic: half of the tokens have
  less than length / 2 before them.

B batch, T tokens of a window, E model width, N tokens of a text or scored tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from ctxext.data.documents import Document
from ctxext.errors import DataError, InputError, ModelError
from ctxext.evals import PROTOCOLS
from ctxext.model.load import LoadedModel, hidden_states, output_weight
from ctxext.train.loss import token_losses

LONGLORA_STRIDE = 256
_FIRST_BUCKET = 64  # positions 1..63; from there each bucket is as wide as all before it


@dataclass(frozen=True)
class EncodedText:
    """A document's tokens and how many bytes of UTF-8 they stand for."""

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

    `bits_per_byte` is nats_per_token / ln 2 times the tokens per byte of the whole text (EOS between joined
    documents counted as tokens), so it compares models with different tokenizers. A text cut by a limit has
    its bytes counted in proportion to the tokens kept.
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
    dropped_tokens: int  # joined text too short for one window
    buckets: list[Bucket] = field(repr=False)
    seed: None = None  # nothing is drawn at random

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for a table."""
        return [
            {
                "length": self.length,
                "protocol": self.protocol,
                "stride": self.stride,
                "perplexity": self.perplexity,
                "nats_per_token": self.nats_per_token,
                "bits_per_byte": self.bits_per_byte,
                "tokens_scored": self.tokens_scored,
            }
        ]


@dataclass(frozen=True)
class _Window:
    """Tokens begin <= i < end of one text go in; the targets first <= i < end are scored."""

    text: int
    begin: int
    end: int
    first: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.begin, self.first - self.begin


def encode(documents: Iterable[Document], tokenizer: Any, *, max_tokens: int | None = None) -> list[EncodedText]:
    """Tokenises documents, in order, until there are `max_tokens` (None: all); the last one is cut there.

    No BOS is added.
    """
    texts: list[EncodedText] = []
    left = math.inf if max_tokens is None else max_tokens
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        kept = ids[: int(min(left, len(ids)))]
        if kept:
            share = len(kept) / len(ids)
            texts.append(EncodedText(torch.tensor(kept), share * len(document.text.encode())))
            left -= len(kept)
        if left <= 0:
            break
    return texts


def perplexity(
    loaded: LoadedModel,
    texts: Sequence[EncodedText],
    length: int,
    *,
    protocol: str = "hf-stride",
    stride: int | None = None,
    alone_from: int | None = None,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of `texts` (see `encode`) when the model sees at most `length` tokens.

    The protocols are described at the top of this file; `stride` is in tokens.

    Documents of at least `alone_from` tokens (default `length`) are texts of their own; shorter ones are
    joined by EOS into one more text, which is left out (and counted in `dropped_tokens`) where it is shorter
    than that. To compare lengths on the same text, give all of them one `alone_from`: the greatest length.

    `progress(windows done, windows in all)`. Memory grows with `length` and `tokens_per_batch` (at least one
    window is run at once), never with T x vocabulary. The model is left in eval mode. `length` may exceed
    what the model bears: that is how damage is measured.

    Errors: InputError (protocol, length, stride), DataError (not enough text), ModelError (a loss that is
    not finite).
    """
    stride = _checked_stride(protocol, length, stride)
    alone_from = length if alone_from is None else max(length, alone_from)
    segments, counts = _segments(texts, alone_from, loaded.tokenizer.eos_token_id)
    windows = [
        window for i, (ids, _) in enumerate(segments) for window in _windows(i, len(ids), protocol, length, stride)
    ]
    buckets = _score(loaded, windows, [ids for ids, _ in segments], length, tokens_per_batch, progress)
    tokens = sum(bucket.tokens for bucket in buckets)
    nats = sum(bucket.tokens * (bucket.nats_per_token or 0.0) for bucket in buckets) / tokens
    text_tokens = sum(len(ids) for ids, _ in segments)
    bits = nats / math.log(2) * text_tokens / sum(size for _, size in segments)
    return PerplexityResult(
        protocol=protocol,
        length=length,
        stride=stride,
        windows=len(windows),
        tokens_scored=tokens,
        nats_per_token=nats,
        perplexity=_exp(nats),
        bits_per_byte=bits,
        documents_alone=counts[0],
        documents_joined=counts[1],
        dropped_tokens=counts[2],
        text_tokens=text_tokens,
        buckets=buckets,
    )


def _score(
    loaded: LoadedModel,
    windows: list[_Window],
    texts: list[torch.Tensor],
    length: int,
    tokens_per_batch: int,
    progress: Callable[[int, int], None] | None,
) -> list[Bucket]:
    """Runs every window and sums its losses by how many tokens each target has before it."""
    edges = _bucket_edges(length)
    sums = torch.zeros(len(edges) - 1, dtype=torch.float64)
    tokens = torch.zeros(len(edges) - 1, dtype=torch.int64)
    done = 0
    if progress is not None:
        progress(0, len(windows))
    for batch in _batches(windows, tokens_per_batch):
        losses = _window_losses(loaded.model, batch, texts)  # [B, scored] fp64
        if not bool(torch.isfinite(losses).all()):
            raise ModelError(
                f"{loaded.name} gives a loss that is not finite at length {length:,}",
                hint="its weights or activations overflow: evaluate it in float32",
            )
        size, first = batch[0].shape
        bucket = torch.bucketize(torch.arange(first, size), edges, right=True) - 1
        sums.index_add_(0, bucket, losses.sum(0))
        tokens.index_add_(0, bucket, torch.full_like(bucket, len(batch)))
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    return [
        Bucket(int(a), int(b), int(n), float(s / n) if n else None)
        for a, b, n, s in zip(edges[:-1], edges[1:], tokens, sums, strict=True)
    ]


def _checked_stride(protocol: str, length: int, stride: int | None) -> int:
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is unknown; allowed are {', '.join(PROTOCOLS)}")
    if length < 2:
        raise InputError(f"length is {length}; perplexity needs at least 2 tokens")
    if protocol == "truncate":
        if stride not in (None, length):
            raise InputError(
                f"stride {stride} was given, but `truncate` puts its windows side by side",
                hint="leave the stride out, or choose hf-stride",
            )
        return length
    if stride is None:
        stride = LONGLORA_STRIDE if protocol == "longlora" else length // 2
    if stride < 1 or (protocol == "hf-stride" and stride >= length):
        raise InputError(f"stride is {stride}; {protocol} at length {length} allows 1 to {length - 1}")
    return stride


def _segments(
    texts: Sequence[EncodedText], alone_from: int, eos_id: int | None
) -> tuple[list[tuple[torch.Tensor, float]], tuple[int, int, int]]:
    """Texts to score as (ids, bytes), and (documents alone, documents joined, tokens dropped)."""
    alone = [(text.ids, text.text_bytes) for text in texts if len(text.ids) >= alone_from]
    short = [text for text in texts if len(text.ids) < alone_from]
    if not short:
        return _enough(alone, 0, alone_from), (len(alone), 0, 0)
    if eos_id is None:
        raise InputError(
            "the tokenizer has no EOS to join short documents with",
            hint=f"give documents of at least {alone_from:,} tokens",
        )
    end = torch.tensor([eos_id])
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


def _windows(text: int, size: int, protocol: str, length: int, stride: int) -> Iterator[_Window]:
    if protocol != "hf-stride":
        for begin in range(0, size - length + 1, stride):
            yield _Window(text, begin, begin + length, begin + 1)
        return
    begin, scored = 0, 1
    while scored < size:
        end = min(begin + length, size)
        yield _Window(text, begin, end, scored)
        begin, scored = begin + stride, end


def _batches(windows: list[_Window], tokens: int) -> Iterator[list[_Window]]:
    """Neighbours of one shape, at most `tokens` together."""
    for (size, _), group in groupby(windows, key=lambda window: window.shape):
        same = list(group)
        count = max(1, tokens // size)
        yield from (same[i : i + count] for i in range(0, len(same), count))


@torch.no_grad()
def _window_losses(model: torch.nn.Module, batch: list[_Window], texts: list[torch.Tensor]) -> torch.Tensor:
    """Loss of each scored target, fp64 [B, scored] on the CPU."""
    model.eval()
    weight = output_weight(model)
    ids = torch.stack([texts[w.text][w.begin : w.end] for w in batch]).to(weight.device)  # [B, T]
    first = batch[0].shape[1]
    hidden = hidden_states(model, ids)[:, first - 1 : -1]  # [B, scored, E]
    losses = token_losses(hidden.flatten(0, 1), weight, ids[:, first:].flatten())
    return losses.double().cpu().view(len(batch), -1)


def _bucket_edges(length: int) -> torch.Tensor:
    """1, 64, 128, 256 ... up to and with `length`: the same edges at every length, so rows compare."""
    edges = [1]
    step = _FIRST_BUCKET
    while step < length:
        edges.append(step)
        step *= 2
    return torch.tensor([*edges, length])


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700.0 else math.inf
