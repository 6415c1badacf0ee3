"""LongPPL: perplexity of the tokens that need a long context (Fang et al. 2024, arXiv 2410.23771).

An evaluator model says which those are: a token is key where the loss with the last `short` tokens before it alone is
more than 2 nats above the loss with everything before it, and the latter is below 2 nats. Keys are spans of characters
of a text, so that models with other tokenizers are scored on the same ones: a model's key tokens are those whose span
meets a key span. LongPPL is exp(loss of key tokens / their number) over all documents together.

Not as in the authors' code: no BOS before a document, to the evaluator as to the models (perplexity.py does so too);
a token counts where it meets a key span, not only where it lies within one.

T tokens of a document, E model width. No torch until a model is run.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.data.cases import manifest_of, write_rows
from ctxext.data.documents import EMBEDDED, MOST_COMPARED, Document, fingerprint, read_documents
from ctxext.data.encoding import PlainText, Spans
from ctxext.data.files import Reading, distinct, recorded
from ctxext.errors import DataError, InputError, ModelError
from ctxext.evals.engine import Job, Outcome, Row, mean
from ctxext.evals.spec import LongPpl
from ctxext.model.ids import check_ids
from ctxext.model.source import ModelSource, require_tokenizer, resolve
from ctxext.progress import CountProgress, Progress

if TYPE_CHECKING:
    from ctxext.model.load import LoadedModel

GAIN_NATS, LOSS_NATS = 2.0, 2.0  # a key's loss falls by more than the first, to less than the second
SHORT, STEP = 4096, 1024  # tokens, or an eighth and a thirty-second of a length where that is less
DOCUMENTS = 8
FEW_KEYS = 100
SPLIT = {EMBEDDED: "held-out"}
_JOINT = "\n\n"  # between short documents that are joined


@dataclass(frozen=True)
class KeyText:
    """A document cut where the evaluator's first `length` tokens end, and the spans of its key tokens in characters."""

    name: str
    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """One text at one length as a model's tokens see it; `keys` are indices of key tokens."""

    length: int
    number: int
    name: str
    ids: list[int]
    keys: list[int]

    @property
    def id(self) -> str:
        return f"{self.length}/{self.number}"

    @property
    def size(self) -> int:
        return len(self.ids)


def truncation(spec: LongPpl, length: int) -> tuple[int, int]:
    """The short context and the step at a length, in tokens. Raises InputError where they leave nothing to score."""
    short = spec.short or min(SHORT, max(1, length // 8))
    step = spec.step or min(STEP, max(1, length // 32))
    if short + step >= length:
        raise InputError(
            f"longppl at length {length:,}: a short context of {short:,} and a step of {step:,} tokens leave nothing "
            "to compare it with",
            hint="give a greater length, or smaller short and step",
        )
    return short, step


def check(spec: LongPpl) -> ModelSource:
    """The evaluator, found and able to do what is asked. No torch.

    Errors: InputError (none named, not found, short and step that do not fit), ModelError (no tokenizer, a length
    beyond what it bears).
    """
    if spec.evaluator is None:
        raise InputError(
            "longppl needs an evaluator: the model that finds which tokens need a long context",
            hint="name a strong long-context model in `evaluator`; a model judged by its own keys is judged by itself",
        )
    source = resolve(spec.evaluator)
    require_tokenizer(source.directory)
    for length in spec.lengths or ():
        truncation(spec, length)
    longest = max(spec.lengths or (0,))
    if longest > source.usable_length:
        raise ModelError(
            f"the evaluator {source.name} bears {source.usable_length:,} tokens; keys at {longest:,} were asked of it",
            hint=f"name an evaluator that bears {longest:,} tokens, or give shorter lengths",
        )
    return source


def prepare(spec: LongPpl, place: Path, dtype: str, device: str | None, progress: Progress) -> None:
    """Keys of every length at `<place>/keys/longppl-<length>.jsonl`, unless those there are of the same evaluator,
    thresholds and text. The evaluator is loaded once and let go.

    Errors: those of `check`; ModelError (a slow tokenizer), DataError (too little text); those of loading.
    """
    source = check(spec)
    from ctxext.model.load import load_model, load_tokenizer

    tokenizer = require_offsets(load_tokenizer(source.directory), source.name)
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
    largest = max(max(ids) for found, _ in texts.values() for _, ids, _ in found)
    check_ids([largest], source.config["vocab_size"], source.name)
    for length, (found, facts) in texts.items():
        count = partial(progress, f"keys by {source.name} at {length:,}")
        write_rows(_path(place, length), _key_texts(evaluator.model, found, *truncation(spec, length), count), facts)
    del evaluator
    gc.collect()


def job(loaded: LoadedModel, spec: LongPpl, place: Path) -> Job:
    """One item a length and document, from the keys that `prepare` wrote.

    Errors: those of `check`; InputError (no keys, or those of another request), DataError (keys that are not what their
    manifest says), ModelError (a slow tokenizer; a token without a row; a loss that is not finite).
    """
    assert spec.lengths is not None
    source = check(spec)
    require_offsets(loaded.tokenizer, loaded.name)
    parts, facts = list[Part](), dict[int, dict[str, Any]]()
    for length in spec.lengths:
        keys, facts[length] = _read(_path(place, length))
        if not _facts(spec, source, length).items() <= facts[length].items():
            raise InputError(
                f"{_path(place, length)} has keys of another evaluator, text or truncation",
                hint="evaluate one longppl suite at a time, or into a place of its own",
            )
        parts += [_part(loaded.tokenizer, length, number, key) for number, key in enumerate(keys)]
    largest = max((max(part.ids) for part in parts if part.ids), default=-1)
    check_ids([largest], loaded.source.config["vocab_size"], loaded.name)

    def rows(outcomes: Sequence[Outcome]) -> list[Row]:
        return [_row([o for o in outcomes if o.length == length], length, facts[length]) for length in facts]

    return Job(parts, lambda batch: [_score(loaded, part) for part in batch], rows, tuple(_notes(loaded, parts, facts)))


def documents(spec: LongPpl, length: int, tokenizer: Any) -> Iterator[tuple[Document, list[int], Spans]]:
    """Documents of at least `length` tokens, cut there, with these tokens and their characters; shorter documents are
    joined in order until they are long enough.

    At most `spec.limit` (8). The tail of a long document is left out, and so is what is left of the short ones.
    Raises DataError where there is not one.
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
            ids, offsets = encode(tokenizer, candidate.text)
            if len(ids) < length:  # tokens merged where the texts meet
                continue
            waiting, waiting_tokens = [], 0
        end = offsets[length - 1][1]
        yield Document(candidate.text[:end], candidate.name), ids[:length], offsets[:length]
        made += 1
        if made == (spec.limit or DOCUMENTS):
            return
    if made == 0:
        raise DataError(
            f"{spec.data} has {total:,} tokens in all; longppl at length {length:,} needs as many in one document",
            hint="give more text, or a shorter length",
        )


def find_keys(model: Any, ids: Sequence[int], short: int, step: int, done: Callable[[], None]) -> list[int]:
    """Indices of the key tokens among `ids`.

    Runs of `step` tokens are scored with the `short` tokens before the run, so a token has at most short + step - 1
    before it. The first run, whose short context is all there is, has no keys and is left out. `done()` after each.
    """
    first = short + step
    full = losses(model, ids, first)
    keys = []
    for begin in range(first, len(ids), step):
        near = losses(model, ids[begin - short : begin + step], short)
        far = full[begin - first : begin - first + len(near)]
        pairs = enumerate(zip(near, far, strict=True), start=begin)
        keys += [i for i, (n, f) in pairs if n - f > GAIN_NATS and f < LOSS_NATS]
        done()
    return keys


def losses(model: Any, ids: Sequence[int], first: int) -> list[float]:
    """The loss of each of ids[first:] given all ids before it, in nats; logits are made of these positions alone.

    Raises ModelError where one is not finite.
    """
    import torch

    from ctxext.model.load import hidden_states, output_weight
    from ctxext.train.loss import token_losses

    model.eval()
    weight = output_weight(model)
    row = torch.tensor([list(ids)], device=weight.device)  # [1, T]
    with torch.no_grad():
        hidden = hidden_states(model, row)[0, first - 1 : -1]  # [T - first, E]
        found = token_losses(hidden, weight, row[0, first:])
    if not bool(found.isfinite().all()):
        raise ModelError(
            f"a loss is not finite at {len(ids):,} tokens",
            hint="the model's weights or activations overflow: evaluate it in float32",
        )
    return found.tolist()


def encode(tokenizer: Any, text: str, plain: PlainText | None = None) -> tuple[list[int], Spans]:
    """Tokens of a plain text, without BOS and EOS, and the characters each stands for. `plain` counts what it reads."""
    ids, spans = (plain or PlainText(tokenizer)).encode([text], spans=True)
    assert spans is not None
    return ids[0], spans[0]


def require_offsets(tokenizer: Any, name: str) -> Any:
    """The tokenizer, where it knows which characters a token stands for. Raises ModelError for a slow one."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: its tokenizer is a slow one, which does not tell the characters of a token",
            hint="convert it once with transformers' convert_slow_tokenizer and save tokenizer.json beside the weights",
        )
    return tokenizer


def merged(spans: Sequence[tuple[int, int]]) -> Spans:
    """Spans in order, those that touch made one, empty ones left out."""
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
    """Indices of the tokens that share a character with one of `spans`, which are as `merged` has them."""
    starts = [start for start, _ in spans]
    found = []
    for i, (start, end) in enumerate(offsets):
        before = bisect_left(starts, end) - 1  # the last span that begins before the token ends
        if start < end and before >= 0 and spans[before][1] > start:
            found.append(i)
    return found


def _key_texts(
    model: Any, found: Sequence[tuple[Document, list[int], Spans]], short: int, step: int, count: CountProgress
) -> list[KeyText]:
    runs = sum(len(range(short + step, len(ids), step)) for _, ids, _ in found)
    done = count(1)
    count(0, runs)
    texts = []
    for document, ids, offsets in found:
        keys = find_keys(model, ids, short, step, lambda: count(next(done), runs))
        texts.append(KeyText(document.name, document.text, tuple(merged([offsets[i] for i in keys]))))
    return texts


def _part(tokenizer: Any, length: int, number: int, key: KeyText) -> Part:
    ids, offsets = encode(tokenizer, key.text)
    keys = [i for i in meeting(offsets, key.spans) if i > 0]  # nothing comes before the first token
    return Part(length, number, key.name, ids, keys)


def _score(loaded: LoadedModel, part: Part) -> Outcome:
    of_each = losses(loaded.model, part.ids, 1) if len(part.ids) > 1 else []
    details = {"document": part.name, "all_nats": sum(of_each), "all_tokens": len(of_each)}
    return Outcome(part.id, "", part.length, sum(of_each[i - 1] for i in part.keys), len(part.keys), details)


def _row(outcomes: Sequence[Outcome], length: int, facts: dict[str, Any]) -> Row:
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
    return Row("longppl", protocol, "", length, "longppl", None if nats is None else _exp(nats), n, details=details)


def _notes(loaded: LoadedModel, parts: Sequence[Part], facts: dict[int, dict[str, Any]]) -> Iterator[str]:
    of = next(iter(facts.values()))
    read = [Reading.of(one) for every in facts.values() for one in every.get("read", [])]
    yield from dict.fromkeys(f"longppl: {line}" for one in read for line in one.lines())
    yield f"longppl: key tokens found by {of['evaluator_name']}"
    if manifests.weight_hashes(loaded.source.directory) == of["evaluator"]["weights"]:
        yield f"longppl: {loaded.name} has the weights of the evaluator: it is judged by its own keys"
    for length in facts:
        mine = [part for part in parts if part.length == length]
        n, beyond = sum(len(part.keys) for part in mine), [p.size for p in mine if p.size > loaded.usable_length]
        if n < FEW_KEYS:
            yield f"longppl at {length:,}: {n} key tokens are too few to say much: give more text, or a greater limit"
        if beyond:
            yield (
                f"longppl at {length:,}: {len(beyond)} of {len(mine)} documents are more tokens of {loaded.name} "
                f"(up to {max(beyond):,}) than the {loaded.usable_length:,} it bears; none was cut off"
            )


def _facts(spec: LongPpl, source: ModelSource, length: int) -> dict[str, Any]:
    """What keys depend on, as their manifest has it; but for the dtype."""
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
    """Whether the keys at `path` are those that `facts` would give."""
    try:
        return facts.items() <= _read(path)[1].items()
    except (InputError, DataError):
        return False


def _read(path: Path) -> tuple[list[KeyText], dict[str, Any]]:
    if not path.is_file() or not manifest_of(path).is_file():
        raise InputError(f"no keys at {path}", hint="longppl.prepare finds them with the evaluator")
    data = path.read_bytes()
    facts = json.loads(manifest_of(path).read_bytes())
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DataError(f"{path} is not what its manifest says (sha256)", hint="remove it: keys are found again")
    rows = [json.loads(line) for line in data.decode().split("\n") if line]
    return [KeyText(row["name"], row["text"], tuple(map(tuple, row["spans"]))) for row in rows], facts


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700.0 else math.inf
