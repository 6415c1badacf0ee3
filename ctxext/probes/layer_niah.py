"""Finds the depth of a model at which the answer becomes readable, by a linear classifier after each layer.

    B batch   E model width   L layers   N questions

A text holds one of a few near-identical numbers (data/near_numbers.py). At ONE token at its end, the residual stream
after each layer, and the change that the layer added to it, each go to their own classifier: standardised, logistic
regression, judged on questions that it has not seen ("Rethinking the Role of Efficient Attention in Hybrid
Architectures", arXiv 2606.15378, code: 10,000 texts of 16,000 tokens, 80/20 stratified, C = 0.1). The residual before
the first layer is that token's embedding, the same in every question: chance, by construction.

The paper reads the question's last token. A model whose tokens are digits does not need the last digit there, because
it first outputs the digits that all answers share. Hence `parting`, ours: the answer's shared tokens are fed in, and
the last of them is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ctxext.data.near_numbers import NearCase, near_cases
from ctxext.errors import ModelError
from ctxext.evals.haystacks import haystack
from ctxext.evals.item_runner import wilson
from ctxext.model.load import causal_lm, hidden_states
from ctxext.probes.probe_finding import Bars, ProbeFinding, Table
from ctxext.probes.probe_spec import LayerNiah
from ctxext.probes.subject import Subject
from ctxext.progress import CountProgress
from ctxext.units import counted

BATCH_TOKENS = 16_384
TOKEN = {"parting": "the last token before the answers differ", "question": "the question's last token"}


def measure(subject: Subject, spec: LayerNiah, progress: CountProgress) -> ProbeFinding:
    """Measures the accuracy of the residual after each layer and of each layer's change, on unseen questions."""
    assert spec.length is not None
    where, text = haystack(spec.data)
    cases = near_cases(
        subject.loaded.tokenizer,
        text,
        spec.length,
        classes=spec.classes,
        samples=spec.samples,
        parting=spec.at == "parting",
        seed=spec.seed,
    )
    layers = len(subject.kinds)
    steps = spec.samples + 2 * layers + 1
    states = _states(subject, cases, lambda done: progress(done, steps))
    labels = torch.tensor([case.label for case in cases])
    if not bool(states.isfinite().all()):
        raise ModelError("a residual is not finite", hint="probe the model in float32")
    found: dict[str, list[dict[str, Any]]] = {"residual": [], "change": []}
    done = spec.samples
    # states[0] is before the first layer, so it has no change.
    for layer in range(layers + 1):
        features = {"residual": states[layer]} | (
            {"change": states[layer].float() - states[layer - 1].float()} if layer else {}
        )
        for name, of in features.items():
            hits, n = readable(of, labels, spec)
            low, high = wilson(hits, n)
            found[name].append({"accuracy": hits / n, "hits": hits, "low": low, "high": high})
            progress(done := done + 1, steps)
    # The first residual is the embedding: report it separately, so that the rest has one entry per layer.
    embedding, *found["residual"] = found["residual"]
    facts = {
        "length": spec.length,
        "chance": 1 / spec.classes,
        "train": spec.samples - n,
        "test": n,
        "read_at": TOKEN[spec.at],
        "hidden_in": where,
        "layers": subject.letters,
        "embedding": embedding,
        **found,
    }
    note = f"accuracy before the first layer, on the embedding of the token: {embedding['accuracy']:.3f}"
    return ProbeFinding(facts, _bars(found, subject.letters, spec), (_table(facts, subject.letters),), (note,))


def readable(features: Tensor, labels: Tensor, spec: LayerNiah) -> tuple[int, int]:
    """Returns how many unseen rows of features [N,E] with labels [N] the classifier gets right, and their number.

    The split is stratified and the same for every layer: it depends on the labels and the seed only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    of = features.double().cpu().numpy()
    train, test = train_test_split(range(len(of)), test_size=spec.test, stratify=labels, random_state=spec.seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=spec.inverse_regularisation, max_iter=1000))
    classifier.fit(of[train], labels[train].numpy())
    return int((classifier.predict(of[test]) == labels[test].numpy()).sum()), len(test)


@torch.no_grad()
def _states(subject: Subject, cases: list[NearCase], progress: Any) -> Tensor:
    """Returns the residual stream [L+1,N,E] at the last token of each case, before the first layer and after each."""
    ids = torch.tensor([case.prompt_ids for case in cases])  # [N,T]
    step, parts = max(1, BATCH_TOKENS // ids.shape[1]), list[Tensor]()
    for begin in range(0, len(ids), step):
        with _last_tokens(subject.loaded.model) as kept:
            hidden_states(subject.loaded.model, ids[begin : begin + step].to(subject.loaded.device))
        parts.append(torch.stack(kept))
        progress(min(begin + step, len(ids)))
    return torch.cat(parts, 1)


@contextmanager
def _last_tokens(model: Any) -> Iterator[list[Tensor]]:
    """Yields a list that a forward fills: first layer's input, then each layer's output, at the last token, [B,E]."""
    kept: list[Tensor] = []
    layers = causal_lm(model).get_decoder().layers

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0][:, -1].cpu().clone())

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output[:, -1].cpu().clone())

    # Hooks run in layer order, so the list is in order too.
    handles = [layers[0].register_forward_pre_hook(before), *(layer.register_forward_hook(after) for layer in layers)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _bars(found: dict[str, list[dict[str, Any]]], letters: str, spec: LayerNiah) -> tuple[Bars, ...]:
    titles = {
        "residual": f"One of {spec.classes} numbers, read from the residual after each layer",
        "change": f"One of {spec.classes} numbers, read from what each layer adds",
    }
    labels = tuple(map(str, range(len(letters))))
    return tuple(
        Bars(
            name,
            titles[name],
            "layer",
            "accuracy",
            labels,
            tuple(one["accuracy"] for one in each),
            letters,
            level=1 / spec.classes,
            level_name="chance",
        )
        for name, each in found.items()
    )


def _table(facts: dict[str, Any], letters: str) -> Table:
    def shown(one: dict[str, Any]) -> str:
        return f"{one['accuracy']:.3f} ({one['low']:.3f} to {one['high']:.3f})"

    rows = [("embedding", "", shown(facts["embedding"]), "")]
    both = zip(facts["residual"], facts["change"], strict=True)
    rows += [(str(i), letters[i], shown(residual), shown(change)) for i, (residual, change) in enumerate(both)]
    caption = (
        f"accuracy on {counted(facts['test'], 'question')} at {facts['length']:,} tokens, 95% interval; chance "
        f"{facts['chance']:.3f}; read at {facts['read_at']}"
    )
    return Table(caption, ("after layer", "kind", "residual", "its change"), tuple(rows))
