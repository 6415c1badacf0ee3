"""Suites over models and lengths: rows for a table, a dict for JSON. No torch until one runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.data import documents
from ctxext.errors import InputError
from ctxext.evals import PROTOCOLS
from ctxext.model.source import ModelSource, resolve

if TYPE_CHECKING:  # torch comes with these: it is imported when every argument has been found good
    from ctxext.evals.passkey import PasskeyResult
    from ctxext.evals.perplexity import PerplexityResult
    from ctxext.model.load import LoadedModel

EMBEDDED_SPLIT = "held-out"
GRASS = "grass"  # the haystack of repeated sentences
DEFAULT_TOKENS = 32_768  # of text, for perplexity; at least twice the greatest length
DEFAULT_CASES = 10  # for passkey, at each length and depth
_HAYSTACK_CHARACTERS = 2 << 20

Progress = Callable[[str, int, int], None]  # (what, done, in all)


@dataclass(frozen=True)
class Request:
    """What `evaluate` was asked; `limit` is None or tokens of text (perplexity), cases a cell (passkey)."""

    suite: str
    lengths: tuple[int, ...]
    data: str
    limit: int | None
    seed: int
    protocol: str
    text_field: str
    decode: bool


@dataclass(frozen=True)
class ModelResult:
    """What one model did. `usable_length` is what it bears by its own config, in tokens."""

    model: str
    usable_length: int
    results: list[PerplexityResult] | list[PasskeyResult]


@dataclass(frozen=True)
class EvalReport:
    """All results of one `evaluate`; `data_fingerprint` says which text they are of."""

    request: Request
    data_fingerprint: str
    models: list[ModelResult] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each model and length; `extrapolated` where the model does not bear the length."""
        return [
            {"model": entry.model, **row, "extrapolated": row["length"] > entry.usable_length}
            for entry in self.models
            for result in entry.results
            for row in result.rows()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "rows": self.rows()}


def evaluate(
    models: Sequence[Any],
    suite: str,
    *,
    lengths: Sequence[int],
    data: str = documents.EMBEDDED,
    limit: int | None = None,
    seed: int = 0,
    protocol: str = "hf-stride",
    text_field: str = "text",
    decode: bool = False,
    dtype: str = "float32",
    device: str | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Runs `suite` ("perplexity" or "passkey") on each model, one in memory at a time, at each of `lengths`.

    `models` are names, paths or sources for `ctxext.model.load`, or models already loaded. `data` is a source
    for `read_documents`; the embedded corpus gives its held-out part; for passkey it is the text to hide in,
    and may also be "grass". `protocol` is perplexity's; `decode` is passkey's (see there). Every length of
    perplexity is measured on the same text, cut where it is at least as long as the greatest length.

    A length beyond a model's usable length is run, and its row says `extrapolated`: that is how damage is
    shown. Errors: InputError and ModelError for what arguments and the models' files can decide, all before
    torch is imported; those of the data and of loading as they come.
    """
    request = Request(suite, tuple(sorted(set(lengths))), data, limit, seed, protocol, text_field, decode)
    _check(request)
    if not models:
        raise InputError("no model was given to evaluate")
    report = EvalReport(request, _fingerprint(request))
    found = [resolve(str(model)) if isinstance(model, str | Path) else model for model in models]
    for model in found:
        loaded = model if hasattr(model, "tokenizer") else _load(model, dtype, device)
        results = SUITES[suite](loaded, request, progress)
        report.models.append(ModelResult(loaded.name, loaded.usable_length, results))
        del loaded
        gc.collect()
    return report


def _check(request: Request) -> None:
    if request.suite not in SUITES:
        raise InputError(f"suite {request.suite!r} is unknown; allowed are {', '.join(SUITES)}")
    if request.protocol not in PROTOCOLS:
        raise InputError(f"protocol {request.protocol!r} is unknown; allowed are {', '.join(PROTOCOLS)}")
    if not request.lengths or request.lengths[0] < 2:
        raise InputError(f"lengths are {list(request.lengths)}: give at least one, each of at least 2 tokens")
    if request.limit is not None and request.limit < 1:
        raise InputError(f"limit is {request.limit}; it must be at least 1, or left out")
    longest = request.lengths[-1]
    if request.suite == "perplexity" and request.limit is not None and request.limit < longest:
        raise InputError(
            f"a limit of {request.limit:,} tokens is less than one window of {longest:,}",
            hint="raise the limit, or leave it out",
        )


def _perplexity(loaded: LoadedModel, request: Request, progress: Progress | None) -> list[PerplexityResult]:
    from ctxext.evals import perplexity

    longest = request.lengths[-1]
    limit = request.limit or max(DEFAULT_TOKENS, 2 * longest)
    texts = perplexity.encode(_read(request), loaded.tokenizer, max_tokens=limit)
    return [
        perplexity.perplexity(
            loaded,
            texts,
            length,
            protocol=request.protocol,
            alone_from=longest,
            progress=_named(progress, f"{loaded.name} perplexity at {length:,}"),
        )
        for length in request.lengths
    ]


def _passkey(loaded: LoadedModel, request: Request, progress: Progress | None) -> list[PasskeyResult]:
    from ctxext.evals import passkey

    haystack, text = request.data, None
    if request.data == documents.EMBEDDED:
        haystack = "held-out"
    elif request.data != GRASS:
        text = _beginning(_read(request), _HAYSTACK_CHARACTERS)
    return [
        passkey.passkey(
            loaded,
            request.lengths,
            per_depth=request.limit or DEFAULT_CASES,
            seed=request.seed,
            haystack=haystack,
            haystack_text=text,
            decode=request.decode,
            progress=_named(progress, f"{loaded.name} passkey"),
        )
    ]


SUITES: dict[str, Callable[[Any, Request, Progress | None], Any]] = {"perplexity": _perplexity, "passkey": _passkey}


def _load(model: ModelSource, dtype: str, device: str | None) -> LoadedModel:
    from ctxext.model.load import load_model

    return load_model(model, dtype=dtype, device=device)


def _split(data: str) -> str | None:
    return EMBEDDED_SPLIT if data == documents.EMBEDDED else None


def _fingerprint(request: Request) -> str:
    if request.suite == "passkey" and request.data == GRASS:
        return GRASS
    return documents.fingerprint(request.data, text_field=request.text_field, split=_split(request.data))


def _read(request: Request) -> Iterable[documents.Document]:
    return documents.read_documents(request.data, text_field=request.text_field, split=_split(request.data))


def _beginning(texts: Iterable[documents.Document], characters: int) -> str:
    parts, size = [], 0
    for document in texts:
        parts.append(document.text)
        size += len(document.text)
        if size >= characters:
            break
    return "\n".join(parts)[:characters]


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
