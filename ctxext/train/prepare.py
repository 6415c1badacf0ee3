"""Turns the data that the spec names into sequences: tokenised once into the user's cache, some held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ctxext.config import manifest as manifests
from ctxext.data import corpus, synthetic
from ctxext.data.chat import chat_rows, template_hash
from ctxext.data.documents import EMBEDDED, SELF, Document, Documents, fingerprint, read_documents
from ctxext.data.encoding import plain_ids
from ctxext.data.files import Reading
from ctxext.data.mixture import Mixture, Sequences, apportion, slots_of
from ctxext.data.packing import PackedSequences, attended_share
from ctxext.data.prompts import framing
from ctxext.data.samples import sample_documents
from ctxext.data.store import FORMAT, TokenStore, tokenise, tokenizer_hash
from ctxext.errors import EnvironmentFault, InputError
from ctxext.model.ids import check_ids
from ctxext.model.load import build_model, load_tokenizer
from ctxext.model.source import original_config
from ctxext.train.finetune_spec import MixturePart
from ctxext.train.loop import Events
from ctxext.train.run_plan import RunPlan, on_gpu
from ctxext.units import counted

LITTLE_HISTORY = 0.05  # share of the tokens; below it a run at this ctx learns almost nothing about long distances
MOST_CHARACTERS = 64_000_000  # of the embedded corpus tokenised at once; longer runs repeat it
MOST_HELD_OUT = 0.1  # share of the sequences of a user's text


@dataclass(frozen=True)
class _Source:
    """A part of the data and its documents, not yet read, with `print_`, a hash of them.

    `share` is its share of the run's sequences, `wanted` the number of sequences to hold out. `held_out` has the
    documents for validation where they differ from those that train.
    """

    name: str
    embedded: bool
    share: float
    wanted: int
    documents: Iterator[Document]
    print_: str
    held_out: tuple[Iterator[Document], str] | None = None


def training_device(plan: RunPlan) -> tuple[torch.device, torch.dtype]:
    """Returns the device and dtype that a plan trains with on this machine.

    Raises EnvironmentFault where torch and the plan disagree about a GPU: the plan's dtype and memory would be wrong.
    """
    planned, found = on_gpu(plan.gpu), torch.cuda.is_available()
    if planned and not found:
        raise EnvironmentFault(
            f"the plan uses the GPU that this machine reports, but torch {torch.__version__} does not find one",
            hint="run ctxext doctor to check the driver; to train on the CPU, set CUDA_VISIBLE_DEVICES to nothing",
        )
    if found and not planned:
        raise EnvironmentFault(
            f"torch {torch.__version__} finds a GPU, but the plan uses none: neither the driver's files nor "
            "nvidia-smi show one",
            hint="put nvidia-smi on the PATH; to train on the CPU, set CUDA_VISIBLE_DEVICES to nothing",
        )
    return torch.device("cuda" if found else "cpu"), getattr(torch, plan.dtype)


def prepare_data(plan: RunPlan, events: Events) -> tuple[Sequences, Sequences | None]:
    """Returns (the training sequences, the held-out sequences for validation), each of exactly ctx tokens.

    Held out are some files of the embedded corpus, the last sequences of other text, some sequences of each part of a
    mixture. The second result is None where validation is off, or where the text is too short, which is logged. Raises
    InputError for a tokenizer without an EOS token.
    """
    spec = plan.spec
    tokenizer = load_tokenizer(plan.source.directory)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{plan.source.name}: its tokenizer has no EOS token; every document needs one at its end")
    slots = slots_of([part.weight for part in spec.data.parts])
    wanted = spec.validation.sequences if spec.validation.every_steps else 0
    counts = apportion(wanted, slots, least=1)
    # Find every source before reading the first, so that a wrong path fails before long work.
    sources = [
        _source(plan, part, tokenizer, share / sum(slots), count, events)
        for part, share, count in zip(spec.data.parts, slots, counts, strict=True)
    ]
    pairs = [_split(plan, source, tokenizer, events) for source in sources]
    if not spec.data.mixture:
        return pairs[0]
    held_out = [held for _, held in pairs if held is not None]
    training = Mixture([train for train, _ in pairs], slots, seed=spec.seed)
    return training, Mixture(held_out, [len(held) for held in held_out], seed=spec.seed) if held_out else None


def _split(
    plan: RunPlan, source: _Source, tokenizer: Any, events: Events
) -> tuple[PackedSequences, PackedSequences | None]:
    """Reads a source. Returns its training sequences and its held-out ones, or None."""
    spec = plan.spec
    options: dict[str, Any] = {"seed": spec.seed, "document_mask": spec.data.document_mask}
    store = _store(plan, source.documents, source.print_, tokenizer, events)
    # Log what was read first: it explains the error that PackedSequences raises for too little text.
    _log_reading(plan, source, store, events)
    whole = PackedSequences(store, spec.ctx, **options)
    _describe(plan, source, whole, events)
    # Documents of their own for validation: all other sequences train.
    if source.held_out is not None:
        held = PackedSequences(_store(plan, *source.held_out, tokenizer, events), spec.ctx, **options)
        return whole, held.part(0, min(source.wanted, len(held)))
    # Otherwise hold out the last sequences, at most a tenth.
    count = min(source.wanted, int(len(whole) * MOST_HELD_OUT))
    if source.wanted and not count:
        of = f" on {source.name}" if spec.data.mixture else ""
        events.say(f"no validation{of}: {counted(len(whole), 'sequence')} of text, too few to hold out a part")
    if not count:
        return whole, None
    return whole.part(0, len(whole) - count), whole.part(len(whole) - count, count)


def _store(plan: RunPlan, documents: Iterator[Document], print_: str, tokenizer: Any, events: Events) -> TokenStore:
    """The tokens of documents, from the cache or made now. ModelError for an id without a row in the model."""
    data, eos_id = plan.spec.data, tokenizer.eos_token_id
    begin = framing(tokenizer)[0] if data.bos else []
    # The cache key has everything that determines the tokens.
    what = f"{FORMAT} {print_} {tokenizer_hash(tokenizer)} {begin} {eos_id} {data.min_tokens} {data.max_tokens}"
    store = tokenise(
        documents,
        tokenizer,
        _cache() / hashlib.sha256(what.encode()).hexdigest()[:24],
        eos_id=eos_id,
        begin=begin,
        source_fingerprint=print_,
        min_tokens=data.min_tokens,
        max_tokens=data.max_tokens,
        waiting=lambda: events.say("waiting for another process that tokenises the same text"),
    )
    check_ids([store.meta.max_id], plan.config.shape.vocab_size, plan.source.name)
    return store


def readings(sequences: Sequences) -> list[dict[str, Any]]:
    """Returns for each source what was read, for manifests and reports: files, documents, tokens, what was skipped."""
    parts = sequences.parts if isinstance(sequences, Mixture) else (sequences,)
    return [part.store.meta.reading for part in parts]


def _name(plan: RunPlan, source: _Source) -> str:
    """The beginning of a source's log lines."""
    if not plan.spec.data.mixture:
        return "data"
    return f"data, {source.name} ({source.share:.1%} of the sequences)"


def _log_reading(plan: RunPlan, source: _Source, store: TokenStore, events: Events) -> None:
    reading = Reading.of(store.meta.reading)
    if store.reused and isinstance(source.documents, Documents):
        # The tokens come from the cache. The other files of the directory may be new: use the list made now.
        now = source.documents.reading
        reading = replace(reading, beside=now.beside, more=now.more, hidden=now.hidden)
    for line in (reading.line(reused=store.reused), *reading.notes):
        events.say(f"{_name(plan, source)}: {line}")


def _describe(plan: RunPlan, source: _Source, sequences: PackedSequences, events: Events) -> None:
    """Logs a source's contents, in lines that begin with its name, and warns of short documents."""
    spec, store, name = plan.spec, sequences.store, _name(plan, source)
    if source.embedded:
        events.say(
            f"{name}: the embedded corpus (this Python's standard library, {spec.data.synthetic_fraction:.0%} of it "
            f"synthetic: {', '.join(spec.data.synthetic_kinds)})"
        )
    if store.meta.left_out:
        given = (("min_tokens", spec.data.min_tokens), ("max_tokens", spec.data.max_tokens))
        limits = ", ".join(f"data.{limit}={value:,}" for limit, value in given if value is not None)
        every = store.meta.left_out + store.meta.documents
        events.say(f"{name}: {store.meta.left_out:,} of {counted(every, 'document')} left out by {limits}")
    if store.meta.scored is not None:
        events.say(f"{name}: loss on {store.meta.scored / store.meta.tokens:.1%} of the tokens: the answers")
    if sequences.without_answer:
        every = sequences.without_answer + len(sequences)
        events.say(f"{name}: {sequences.without_answer:,} of {counted(every, 'sequence')} left out, without an answer")
    # 0.5 is the best possible share, for documents longer than many sequences.
    share = attended_share(store, spec.ctx)
    events.say(f"{name}: {share:.1%} of the tokens see at least half of ctx in their own document")
    if spec.data.document_mask and share < LITTLE_HISTORY:
        events.say(
            f"warning: only {share:.1%} of the tokens see half of ctx: the documents are short, and a context of "
            f"{spec.ctx:,} tokens is hardly trained; use longer documents, or data.document_mask=false"
        )


def _source(plan: RunPlan, part: MixturePart, tokenizer: Any, share: float, wanted: int, events: Events) -> _Source:
    """Finds the documents of a part without reading them. Raises the errors that are known before reading."""
    spec, embedded = plan.spec, part.source == EMBEDDED
    if part.source == SELF:
        return _Source("its own samples", False, share, wanted, *_samples(plan, tokenizer, events))
    if embedded:
        # A fifth more text than the run needs: `_embedded` only estimates the number of tokens.
        tokens = plan.steps * plan.tokens_per_step * 1.2 * share + spec.ctx
        documents, print_ = _embedded(plan, tokenizer, "train", spec.seed, tokens)
        held_out = None
        if wanted:  # from the other split, with synthetic text of another seed
            held_out = _embedded(plan, tokenizer, "held-out", spec.seed + 1, (1.5 * wanted + 1) * spec.ctx)
        return _Source(part.source, embedded, share, wanted, documents, print_, held_out)
    rows = None if part.format == "text" else chat_rows(part.format, tokenizer)
    documents = read_documents(part.source, text_field=part.text_field, rows=rows)
    print_ = fingerprint(part.source, text_field=part.text_field, format=part.format)
    # The chat template also determines the tokens of these formats.
    if part.format in ("messages", "prompt_chat"):
        print_ = hashlib.sha256(f"{print_} {template_hash(tokenizer)}".encode()).hexdigest()
    return _Source(Path(part.source).name, embedded, share, wanted, documents, print_)


def _samples(plan: RunPlan, tokenizer: Any, events: Events) -> tuple[Iterator[Document], str]:
    """Text that the model before any conversion generates, sampled when the documents are first read."""
    config, sampling = original_config(plan.source), plan.spec.data.samples
    length = min(plan.source.original_length or plan.spec.ctx, plan.spec.ctx)
    weights = manifests.weight_hashes(plan.source.directory)
    device, dtype = training_device(plan)
    # Sampled text has no file to hash: hash everything that determines it.
    print_ = hashlib.sha256(f"{weights} {config.fields} {sampling} {length} {dtype}".encode()).hexdigest()

    # A generator: the model is only loaded where the tokens are not in the cache.
    def documents() -> Iterator[Document]:
        events.say(f"sampling {sampling.tokens:,} tokens from {plan.source.name} as it was before any conversion")
        model: Any = build_model(plan.source.directory, config, dtype).to(device).eval()
        shown = [0]

        def progress(done: int) -> None:
            if done - shown[0] >= sampling.tokens / 10:
                shown[0] = done
                events.say(f"sampled {done:,} of {sampling.tokens:,} tokens")

        yield from sample_documents(
            model,
            tokenizer,
            tokens=sampling.tokens,
            length=length,
            batch=sampling.batch,
            temperature=sampling.temperature,
            seed=sampling.seed,
            progress=progress,
        )

    return documents(), print_


def _embedded(
    plan: RunPlan, tokenizer: Any, split: corpus.Split, seed: int, tokens: float
) -> tuple[Iterator[Document], str]:
    """About `tokens` tokens of a split of the embedded corpus, and a hash of the documents."""
    data = plan.spec.data
    # The corpus is cut by characters: estimate how many a token has, on a sample.
    sample = "".join(document.text for document in corpus.stdlib_documents("held-out")[:8])
    per_token = len(sample) / len(plain_ids(tokenizer, sample))
    arguments: dict[str, Any] = {
        "seed": seed,
        "synthetic_fraction": data.synthetic_fraction,
        "kinds": data.synthetic_kinds,
        "span_chars": max(int(plan.spec.ctx * per_token), synthetic.MIN_SPAN_CHARS),
        "max_chars": int(min(tokens * per_token, MOST_CHARACTERS)),
    }
    print_ = hashlib.sha256(f"{corpus.fingerprint()['sha256']} {split} {arguments}".encode()).hexdigest()
    return corpus.corpus_documents(split, **arguments), print_


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxext" / "tokens"
