"""LongPPL: perplexity of the tokens that need a long context (Fang et al. 2024, arXiv 2410.23771).

An evaluator model finds these tokens. A token is key where two conditions hold: its loss with only the last `short`
tokens as context is more than 2 nats above its loss with everything before it as context, and the latter loss is below
2 nats. Keys are stored as spans of characters of a text, so that models with other tokenizers are scored on the same
ones: a model's key tokens are those whose span overlaps a key span. LongPPL is exp(loss of key tokens / their number)
over all documents together.

Different from the authors' code: no BOS before a document, neither for the evaluator nor for the models (perplexity.py
has none either); a token counts where it overlaps a key span, not only where it lies within one.

T tokens of a document, E model width. Torch is imported only when a model runs.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.data.cases import manifest_of, read_manifest, write_rows
from ctxext.data.documents import EMBEDDED, MOST_COMPARED, Document, fingerprint, read_documents
from ctxext.data.encoding import PlainText, Spans
from ctxext.data.files import Reading, distinct, recorded
from ctxext.errors import DataError, InputError, ModelError
from ctxext.evals.eval_spec import LongPpl
from ctxext.evals.item_runner import Outcome, ResultRow, SuiteJob, mean
from ctxext.model.companions import require_tokenizer
from ctxext.model.ids import check_ids
from ctxext.model.source import ModelSource, resolve
from ctxext.progress import CountProgress, Progress

if TYPE_CHECKING:
    from ctxext.model.load import LoadedModel

GAIN_NATS, LOSS_NATS = 2.0, 2.0  # the long context lowers a key's loss by more than the first, to below the second
SHORT, STEP = 4096, 1024  # tokens; at most an eighth and a thirty-second of a length
DOCUMENTS = 8
FEW_KEYS = 100
SPLIT = {EMBEDDED: "held-out"}
_JOINT = "\n\n"  # separator between short documents that are joined


@dataclass(frozen=True)
class KeyText:
    """A document cut after the evaluator's first `length` tokens, and the spans of its key tokens in characters."""

    name: str
    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DocumentPart:
    """One text at one length in a model's own tokens; `keys` are indices of key tokens."""

    length: int
    number: int
    name: str
    ids: list[int]
    keys: list[int]

    @property
    def id(self) -> str:
        """Returns length and number of the text as one id."""
        return f"{self.length}/{self.number}"

    @property
    def size(self) -> int:
        """Returns the number of tokens."""
        return len(self.ids)


def truncation(spec: LongPpl, length: int) -> tuple[int, int]:
    """Returns the short context and the step at a length, in tokens.

    Raises InputError where they leave nothing to score.
    """
    short = spec.short or min(SHORT, max(1, length // 8))
    step = spec.step or min(STEP, max(1, length // 32))
    if short + step >= length:
        raise InputError(
            f"longppl at length {length:,}: a short context of {short:,} and a step of {step:,} tokens leave no "
            "longer context to compare with",
            hint="give a greater length, or smaller short and step",
        )
    return short, step


def check(spec: LongPpl) -> ModelSource:
    """Returns the evaluator after checking that it supports the request. No torch.

    Errors: InputError (none named, not found, short and step that do not fit), ModelError (no tokenizer, a length
    beyond what it supports).
    """
    if spec.evaluator is None:
        raise InputError(
            "longppl needs an evaluator: the model that finds which tokens need a long context",
            hint="name a strong long-context model in `evaluator`; a model should not be its own evaluator",
        )
    source = resolve(spec.evaluator)
    require_tokenizer(source.directory)
    for length in spec.lengths or ():
        truncation(spec, length)
    longest = max(spec.lengths or (0,))
    if longest > source.usable_length:
        raise ModelError(
            f"the evaluator {source.name} has a usable length of {source.usable_length:,}, below {longest:,} tokens",
            hint=f"name an evaluator with a usable length of {longest:,} tokens, or give shorter lengths",
        )
    return source


def prepare(spec: LongPpl, place: Path, dtype: str, device: str | None, progress: Progress) -> None:
    """Writes the keys of every length to `<place>/keys/longppl-<length>.jsonl`.

    Existing keys are kept if they are of the same evaluator, thresholds and text. The evaluator is loaded once and
    released.

    Errors: those of `check`; ModelError (a slow tokenizer), DataError (too little text); those of loading.
    """
    source = check(spec)
    from ctxext.model.load import load_model, load_tokenizer

    tokenizer = require_offsets(load_tokenizer(source.directory), source.name)
    # Read the text of every length that has no valid keys yet. This needs the tokenizer only.
    texts = {}
    for length in spec.lengths or ():
        facts = {**_facts(spec, source, length), "dtype": dtype}
        if not _same(_path(place, length), facts):
            with recorded() as began:
                found = list(documents(spec, length, tokenizer))
            texts[length] = found, facts | {"read": [one.as_dict() for one in distinct(began)]}
    if not texts:
        return
    evaluator: Any = load_model(source, dtype=dtype, device=device)
    # Check all token ids against the vocabulary before the first forward.
    largest = max(max(ids) for found, _ in texts.values() for _, ids, _ in found)
    check_ids([largest], source.config.shape.vocab_size, source.name)
    for length, (found, facts) in texts.items():
        count_keys = partial(progress, f"keys by {source.name} at {length:,}")
        write_rows(
            _path(place, length), _key_texts(evaluator.model, found, *truncation(spec, length), count_keys), facts
        )
    # Free the evaluator before an evaluated model is loaded.
    del evaluator
    gc.collect()


def job(loaded: LoadedModel, spec: LongPpl, place: Path) -> SuiteJob:
    """Returns the job with one item per length and document, from the keys that `prepare` wrote.

    Errors: those of `check`; InputError (no keys, or those of another request), DataError (keys that differ from their
    manifest), ModelError (a slow tokenizer; a token without an embedding row; a loss that is not finite).
    """
    assert spec.lengths is not None
    source = check(spec)
    require_offsets(loaded.tokenizer, loaded.name)
    parts, facts = list[DocumentPart](), dict[int, dict[str, Any]]()
    for length in spec.lengths:
        keys, facts[length] = _read(_path(place, length))
        # Keys are valid only for the request that made them, so their manifest must contain all facts of this one.
        if not _facts(spec, source, length).items() <= facts[length].items():
            raise InputError(
                f"{_path(place, length)} has keys of another evaluator, text or truncation",
                hint="evaluate one longppl suite at a time, or give each its own output directory",
            )
        parts += [_part(loaded.tokenizer, length, number, key) for number, key in enumerate(keys)]
    largest = max((max(part.ids) for part in parts if part.ids), default=-1)
    check_ids([largest], loaded.source.config.shape.vocab_size, loaded.name)

    def rows(outcomes: Sequence[Outcome]) -> list[ResultRow]:
        return [_row([o for o in outcomes if o.length == length], length, facts[length]) for length in facts]

    return SuiteJob(
        parts, lambda batch: [_score(loaded, part) for part in batch], rows, tuple(_notes(loaded, parts, facts))
    )


def documents(spec: LongPpl, length: int, tokenizer: Any) -> Iterator[tuple[Document, list[int], Spans]]:
    """Yields documents cut to `length` tokens, with these tokens and their characters.

    Documents of fewer tokens are joined in order until they are long enough. Yields at most `spec.limit` (8). The tail
    of a long document is left out, and so are remaining short ones. Raises DataError where there is no document.
    """
    made, total, waiting, waiting_tokens = 0, 0, list[Document](), 0
    plain = PlainText(tokenizer)
    source = read_documents(spec.data, text_field=spec.text_field, split=SPLIT.get(spec.data))
    for document in source:
        candidate = document
        ids, offsets = encode(tokenizer, document.text, plain)
        total += len(ids)
        source.reading.tokens, source.reading.notes = total, plain.notes()
        if len(ids) < length:
            waiting, waiting_tokens = [*waiting, document], waiting_tokens + len(ids)
            if waiting_tokens < length:
                continue
            names = [d.name for d in waiting[:3]] + ([f"{len(waiting) - 3} more"] if len(waiting) > 3 else [])
            candidate = Document(_JOINT.join(d.text for d in waiting), " + ".join(names))
            # Tokenise the joined text again: its tokens differ from those of its parts, by the separators and at the
            # joints. Pass no `plain`: their control tokens are counted already.
            ids, offsets = encode(tokenizer, candidate.text)
            if len(ids) < length:  # too few, because tokens merged where the texts meet
                continue
            waiting, waiting_tokens = [], 0
        # Cut the text where its last token ends, so that text and tokens match.
        end = offsets[length - 1][1]
        yield Document(candidate.text[:end], candidate.name), ids[:length], offsets[:length]
        made += 1
        if made == (spec.limit or DOCUMENTS):
            return
    if made == 0:
        raise DataError(
            f"{spec.data} has {total:,} tokens in all; longppl at length {length:,} needs one document of this length",
            hint="give more text, or a shorter length",
        )


def find_keys(model: Any, ids: Sequence[int], short: int, step: int, done: Callable[[], None]) -> list[int]:
    """Returns the indices of the key tokens among `ids`.

    Runs of `step` tokens are scored with the `short` tokens before the run, so a token has at most short + step - 1
    tokens before it. The first run has no more context than the short one, so it has no keys and is left out. Calls
    `done()` after each run.
    """
    first = short + step
    # One forward over the whole text gives the loss of every scored token with its full context.
    full = losses(model, ids, first)
    keys = []
    for begin in range(first, len(ids), step):
        # The losses of this run with the short context, then the same tokens out of the full pass.
        near = losses(model, ids[begin - short : begin + step], short)
        far = full[begin - first : begin - first + len(near)]
        pairs = enumerate(zip(near, far, strict=True), start=begin)
        keys += [i for i, (n, f) in pairs if n - f > GAIN_NATS and f < LOSS_NATS]
        done()
    return keys


def losses(model: Any, ids: Sequence[int], first: int) -> list[float]:
    """Returns the loss of each of ids[first:] given all ids before it, in nats. Only these positions get logits.

    Raises ModelError where a loss is not finite.
    """
    import torch

    from ctxext.model.load import hidden_states, output_weight
    from ctxext.train.loss import token_losses

    model.eval()
    weight = output_weight(model)
    row = torch.tensor([list(ids)], device=weight.device)  # [1, T]
    with torch.no_grad():
        # The state of token i predicts token i + 1, so take the states from first - 1 up to the last but one.
        hidden = hidden_states(model, row)[0, first - 1 : -1]  # [T - first, E]
        found = token_losses(hidden, weight, row[0, first:])
    if not bool(found.isfinite().all()):
        raise ModelError(
            f"a loss is not finite at {len(ids):,} tokens",
            hint="the model's weights or activations overflow: evaluate it in float32",
        )
    return found.tolist()


def encode(tokenizer: Any, text: str, plain: PlainText | None = None) -> tuple[list[int], Spans]:
    """Returns the tokens of a plain text, without BOS and EOS, and the character span of each.

    `plain` counts control tokens in the texts that it encodes.
    """
    ids, spans = (plain or PlainText(tokenizer)).encode([text], spans=True)
    assert spans is not None
    return ids[0], spans[0]


def require_offsets(tokenizer: Any, name: str) -> Any:
    """Returns the tokenizer if it provides the characters of each token. Raises ModelError for a slow one."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: its tokenizer is a slow one, which does not map tokens to characters",
            hint="convert it once with transformers' convert_slow_tokenizer and save tokenizer.json beside the weights",
        )
    return tokenizer


def merged(spans: Sequence[tuple[int, int]]) -> Spans:
    """Returns the spans in order; spans that touch or overlap become one, empty ones are left out."""
    found: Spans = []
    for start, end in sorted(spans):
        if start == end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def meeting(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the indices of the tokens that share a character with one of `spans`, which must come from `merged`."""
    starts = [start for start, _ in spans]
    found = []
    for i, (start, end) in enumerate(offsets):
        before = bisect_left(starts, end) - 1  # the last span that begins before the token ends
        if start < end and before >= 0 and spans[before][1] > start:
            found.append(i)
    return found


def _key_texts(
    model: Any, found: Sequence[tuple[Document, list[int], Spans]], short: int, step: int, progress: CountProgress
) -> list[KeyText]:
    runs = sum(len(range(short + step, len(ids), step)) for _, ids, _ in found)
    done = count(1)
    progress(0, runs)
    texts = []
    for document, ids, offsets in found:
        keys = find_keys(model, ids, short, step, lambda: progress(next(done), runs))
        texts.append(KeyText(document.name, document.text, tuple(merged([offsets[i] for i in keys]))))
    return texts


def _part(tokenizer: Any, length: int, number: int, key: KeyText) -> DocumentPart:
    ids, offsets = encode(tokenizer, key.text)
    keys = [i for i in meeting(offsets, key.spans) if i > 0]  # the first token has no context to be predicted from
    return DocumentPart(length, number, key.name, ids, keys)


def _score(loaded: LoadedModel, part: DocumentPart) -> Outcome:
    of_each = losses(loaded.model, part.ids, 1) if len(part.ids) > 1 else []
    details = {"document": part.name, "all_nats": sum(of_each), "all_tokens": len(of_each)}
    return Outcome(part.id, "", part.length, sum(of_each[i - 1] for i in part.keys), len(part.keys), details)


def _row(outcomes: Sequence[Outcome], length: int, facts: dict[str, Any]) -> ResultRow:
    n = int(sum(outcome.weight for outcome in outcomes))
    nats = mean(outcomes)
    tokens = sum(outcome.details["all_tokens"] for outcome in outcomes)
    details = {
        "n_key": n,
        "few_keys": n < FEW_KEYS,
        **{name: facts[name] for name in ("evaluator_name", "short", "step")},
        "documents": len(outcomes),
        "tokens": tokens,
        "perplexity": _exp(sum(o.details["all_nats"] for o in outcomes) / tokens) if tokens else None,
    }
    protocol = f"longppl, {facts['truncation']}, keys by {facts['evaluator_name']}, on "
    protocol += "held-out embedded text" if facts["data"] == EMBEDDED else facts["data"]
    return ResultRow(
        "longppl", protocol, "", length, "longppl", None if nats is None else _exp(nats), n, details=details
    )


def _notes(loaded: LoadedModel, parts: Sequence[DocumentPart], facts: dict[int, dict[str, Any]]) -> Iterator[str]:
    of = next(iter(facts.values()))
    read = [Reading.of(one) for every in facts.values() for one in every.get("read", [])]
    yield from dict.fromkeys(f"longppl: {line}" for one in read for line in one.lines())
    yield f"longppl: key tokens found by {of['evaluator_name']}"
    if manifests.weight_hashes(loaded.source.directory) == of["evaluator"]["weights"]:
        yield f"longppl: {loaded.name} has the weights of the evaluator: it defines its own keys"
    for length in facts:
        mine = [part for part in parts if part.length == length]
        n, beyond = sum(len(part.keys) for part in mine), [p.size for p in mine if p.size > loaded.usable_length]
        if n < FEW_KEYS:
            yield f"longppl at {length:,}: only {n} key tokens: give more text, or a greater limit"
        if beyond:
            yield (
                f"longppl at {length:,}: {len(beyond)} of {len(mine)} documents are longer with {loaded.name} "
                f"(up to {max(beyond):,} tokens) than its usable length {loaded.usable_length:,}; none was cut off"
            )


def _facts(spec: LongPpl, source: ModelSource, length: int) -> dict[str, Any]:
    """Returns what the keys depend on, as their manifest stores it, except for the dtype."""
    short, step = truncation(spec, length)
    near = f"{short:,}" if spec.short or short == SHORT else "length / 8"
    run = f"{step:,}" if spec.step or step == STEP else "length / 32"
    base = source.base
    return {
        "evaluator_name": source.name,
        "evaluator": manifests.parent(source.directory),
        "base": manifests.parent(base.directory) if base else None,
        "length": length,
        "short": short,
        "step": step,
        "truncation": f"short {near}, step {run}" + (", scalable truncation" if "/" in near + run else ""),
        "gain_nats": GAIN_NATS,
        "loss_nats": LOSS_NATS,
        "documents": spec.limit or DOCUMENTS,
        "data": spec.data,
        "text": fingerprint(spec.data, text_field=spec.text_field, split=SPLIT.get(spec.data), most=MOST_COMPARED),
    }


def _path(place: Path, length: int) -> Path:
    return place / "keys" / f"longppl-{length}.jsonl"


def _same(path: Path, facts: dict[str, Any]) -> bool:
    """Returns whether the keys at `path` are those of a request with these `facts`."""
    try:
        return facts.items() <= _read(path)[1].items()
    except (InputError, DataError):
        return False


def _read(path: Path) -> tuple[list[KeyText], dict[str, Any]]:
    if not path.is_file() or not manifest_of(path).is_file():
        raise InputError(f"no keys at {path}", hint="call longppl.prepare first: it finds them with the evaluator")
    data = path.read_bytes()
    facts = read_manifest(path)
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DataError(
            f"the sha256 of {path} differs from the one in its manifest",
            hint="remove the file and run the evaluation again",
        )
    rows = [json.loads(line) for line in data.decode().split("\n") if line]
    return [KeyText(row["name"], row["text"], tuple(map(tuple, row["spans"]))) for row in rows], facts


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700.0 else math.inf
