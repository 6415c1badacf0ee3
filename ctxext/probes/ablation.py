"""What a model loses without some of its heads: the best of a ranking, against as many others drawn at random.

The control is that of arXiv 2404.15574: masking its retrieval heads broke retrieval, masking random heads did not. The
questions are others than those that heads are ranked by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ctxext.data.cases import private_random
from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.evals.engine import Job, Ledger, run_job
from ctxext.evals.haystacks import GRASS, haystack
from ctxext.evals.passkey import job as passkeys
from ctxext.evals.perplexity import EncodedText, encode, perplexity
from ctxext.evals.spec import FIVE_DEPTHS, Passkey
from ctxext.model.attention import Intervention, intervening
from ctxext.model.load import LoadedModel, causal_lm
from ctxext.probes.finding import Table
from ctxext.probes.spec import RetrievalHeads
from ctxext.units import counted

Head = tuple[int, int]  # layer, head
LOSS_TOKENS = 16_384  # of text, or twice the length
BATCH_TOKENS = 8192  # that are run at once, or one row
PROTOCOL = "truncate"  # evals/perplexity.py's cheapest: the same text is scored with every set of heads
MEASURES = ("accuracy", "answer_nats", "loss")


def without(loaded: LoadedModel, heads: Sequence[Head]) -> AbstractContextManager[None]:
    """While the block lasts, `heads` of the model give zeros."""
    layers = {layer: Intervention(masked=tuple(h for i, h in heads if i == layer)) for layer, _ in heads}
    return intervening(causal_lm(loaded.model).get_decoder(), layers)


def ablate(
    loaded: LoadedModel, spec: RetrievalHeads, top: Sequence[Head], shape: tuple[int, int], done: Callable[[], None]
) -> tuple[dict[str, Any], Table]:
    """Passkeys and the loss of held-out text with nothing masked, with `top`, and with `spec.draws` draws of as many
    heads of the others; `shape` is (layers, heads). `done` is called after each of these."""
    K, rng = len(top), private_random("ablate", spec.seed)
    others = [(i, h) for i in range(shape[0]) for h in range(shape[1]) if (i, h) not in set(top)]
    sets = {"nothing": [], f"top {K}": list(top)}
    sets |= {f"random {K}, draw {i}": sorted(rng.sample(others, K)) for i in range(1, spec.draws + 1)}
    texts, asked = _texts(loaded, spec), _asked(loaded, spec)
    found: dict[str, dict[str, Any]] = {}
    for name, heads in sets.items():
        with without(loaded, heads):
            found[name] = {"masked": [list(head) for head in heads], **_measured(loaded, spec, asked, texts)}
        done()
    runs = list(found.items())
    means = {what: sum(one[what] for _, one in runs[2:]) / spec.draws for what in MEASURES}
    table = Table(
        f"heads masked: {counted(len(asked.items), 'passkey')} at {spec.length:,} tokens in {haystack(spec.data)[0]}, "
        f"others than those that rank the heads, and the loss of {_text_of(spec)} (windows side by side)",
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
    return {"heads": K, "cases": len(asked.items), "protocol": PROTOCOL, "random_mean": means, "runs": found}, table


def _text_of(spec: RetrievalHeads) -> str:
    """What the loss is of; not of grass, whose loss says only that it was learned by heart."""
    return EMBEDDED if spec.data == GRASS else spec.data


def _texts(loaded: LoadedModel, spec: RetrievalHeads) -> list[EncodedText]:
    source = _text_of(spec)
    documents = read_documents(source, split="held-out" if source == EMBEDDED else None)
    return encode(documents, loaded.tokenizer, max_tokens=max(LOSS_TOKENS, 2 * (spec.length or 0)))


def _asked(loaded: LoadedModel, spec: RetrievalHeads) -> Job:
    assert spec.length is not None
    cases = math.ceil(spec.samples / len(FIVE_DEPTHS))
    return passkeys(loaded, Passkey(lengths=(spec.length,), data=spec.data, cases=cases, seed=spec.seed + 1), Path())


def _measured(loaded: LoadedModel, spec: RetrievalHeads, asked: Job, texts: Sequence[EncodedText]) -> dict[str, Any]:
    assert spec.length is not None
    row = run_job(asked, Ledger(), BATCH_TOKENS, lambda *_: None)[0]
    result = perplexity(loaded, texts, spec.length, protocol=PROTOCOL, tokens_per_batch=BATCH_TOKENS)
    return {"accuracy": row.value, "answer_nats": row.details["answer_nats"], "loss": result.nats_per_token}
