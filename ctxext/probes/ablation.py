"""Measures what a model loses without some heads: the best of a ranking, against as many others drawn at random.

The control is that of arXiv 2404.15574: masking its retrieval heads broke retrieval, masking random heads did not. The
questions differ from those that rank the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ctxext.data.cases import private_random
from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.evals.eval_spec import FIVE_DEPTHS, Passkey
from ctxext.evals.haystacks import GRASS, haystack
from ctxext.evals.item_runner import Ledger, SuiteJob, run_job
from ctxext.evals.passkey import job as passkeys
from ctxext.evals.perplexity import EncodedText, encode, perplexity
from ctxext.model.attention import Intervention, intervening
from ctxext.model.load import LoadedModel, causal_lm
from ctxext.probes.probe_finding import Table
from ctxext.probes.probe_spec import RetrievalHeads
from ctxext.units import counted

Head = tuple[int, int]  # layer, head
LOSS_TOKENS = 16_384  # of text; raised to twice the length where that is more
BATCH_TOKENS = 8192  # tokens run at once; at least one row
PROTOCOL = "truncate"  # the cheapest of evals/perplexity.py; the same text is scored with every set of heads
MEASURES = ("accuracy", "answer_nats", "loss")


def without(loaded: LoadedModel, heads: Sequence[Head]) -> AbstractContextManager[None]:
    """Masks `heads` of the model, which then output zeros, while the block runs."""
    layers = {layer: Intervention(masked=tuple(h for i, h in heads if i == layer)) for layer, _ in heads}
    return intervening(causal_lm(loaded.model).get_decoder(), layers)


def ablate(
    loaded: LoadedModel, spec: RetrievalHeads, top: Sequence[Head], shape: tuple[int, int], done: Callable[[], None]
) -> tuple[dict[str, Any], Table]:
    """Measures passkeys and the loss of held-out text with nothing masked, with `top`, and with random heads masked.

    There are `spec.draws` draws, each of as many of the other heads as `top` has. `shape` is (layers, heads). `done` is
    called after each measurement.
    """
    K, rng = len(top), private_random("ablate", spec.seed)
    # The random heads are drawn from those outside `top`, so a draw shares no head with it.
    others = [(i, h) for i in range(shape[0]) for h in range(shape[1]) if (i, h) not in set(top)]
    sets = {"nothing": [], f"top {K}": list(top)}
    sets |= {f"random {K}, draw {i}": sorted(rng.sample(others, K)) for i in range(1, spec.draws + 1)}
    texts, job = _texts(loaded, spec), _passkey_job(loaded, spec)
    found: dict[str, dict[str, Any]] = {}
    for name, heads in sets.items():
        with without(loaded, heads):
            found[name] = {"masked": [list(head) for head in heads], **_measured(loaded, spec, job, texts)}
        done()
    runs = list(found.items())
    # The first two runs are "nothing" and "top"; the rest are the draws.
    means = {what: sum(one[what] for _, one in runs[2:]) / spec.draws for what in MEASURES}
    table = Table(
        f"heads masked: {counted(len(job.items), 'passkey')} at {spec.length:,} tokens in "
        f"{haystack(spec.data)[0]}, "
        f"different from those that rank the heads, and the loss of {_text_of(spec)} (adjacent windows)",
        ("masked", "heads", "passkey", "answer, nats a token", "loss, nats a token"),
        tuple(
            (
                name,
                " ".join(f"{layer}.{head}" for layer, head in one.get("masked", ())),
                f"{one['accuracy']:.0%}",
                f"{one['answer_nats']:.3f}",
                f"{one['loss']:.4f}",
            )
            for name, one in [*runs[:2], (f"random {K}, mean of {spec.draws}", means), *runs[2:]]
        ),
    )
    return {"heads": K, "cases": len(job.items), "protocol": PROTOCOL, "random_mean": means, "runs": found}, table


def _text_of(spec: RetrievalHeads) -> str:
    """Returns the text that the loss is measured on; never grass, which a model learns by heart."""
    return EMBEDDED if spec.data == GRASS else spec.data


def _texts(loaded: LoadedModel, spec: RetrievalHeads) -> list[EncodedText]:
    source = _text_of(spec)
    documents = read_documents(source, split="held-out" if source == EMBEDDED else None)
    return encode(documents, loaded.tokenizer, max_tokens=max(LOSS_TOKENS, 2 * (spec.length or 0)))


def _passkey_job(loaded: LoadedModel, spec: RetrievalHeads) -> SuiteJob:
    assert spec.length is not None
    cases = math.ceil(spec.samples / len(FIVE_DEPTHS))
    # Another seed than the ranking's, so that heads are tested on new questions.
    return passkeys(loaded, Passkey(lengths=(spec.length,), data=spec.data, cases=cases, seed=spec.seed + 1), Path())


def _measured(loaded: LoadedModel, spec: RetrievalHeads, job: SuiteJob, texts: Sequence[EncodedText]) -> dict[str, Any]:
    assert spec.length is not None
    row = run_job(job, Ledger(), BATCH_TOKENS, lambda *_: None)[0]
    result = perplexity(loaded, texts, spec.length, protocol=PROTOCOL, tokens_per_batch=BATCH_TOKENS)
    return {"accuracy": row.value, "answer_nats": row.details["answer_nats"], "loss": result.nats_per_token}
