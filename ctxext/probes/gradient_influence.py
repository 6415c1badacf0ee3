"""Measures how far back the last predictions reach: the gradient of their logits with respect to each input embedding.

    B batch   T tokens   E model width   V vocabulary

    G(distance) = || d (sum over V of the logits, averaged over the last positions) / d embedding at T-1-distance ||_2

G is the mean over texts ("Rethinking the Role of Efficient Attention in Hybrid Architectures", arXiv 2606.15378, code:
last 20 positions, 1000 texts of 8,192 tokens). The sum is linear in the head, whose rows are summed first, so no logits
are computed. A gradient shows what a small change of a token would do, not what the token does.

Memory: the layers' inputs [T,E] and what ONE layer keeps for its backward pass, because each layer is recomputed in
turn. (transformers' own recomputation works in training mode only, which would switch on the dropout of adapters.)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ctxext.errors import ModelError
from ctxext.model.load import causal_lm, hidden_states, output_weight
from ctxext.probes.probe_finding import Curve, Curves, ProbeFinding, Table
from ctxext.probes.probe_spec import GradientInfluence
from ctxext.probes.subject import Subject
from ctxext.probes.texts import text_rows
from ctxext.progress import CountProgress
from ctxext.units import counted

PER_DOUBLING = 4  # distance buckets for each doubling of the distance


def measure(subject: Subject, spec: GradientInfluence, progress: CountProgress) -> ProbeFinding:
    """Measures G by distance, in growing buckets, and the share of its sum from beyond each distance."""
    assert spec.length is not None
    rows = text_rows(subject.loaded.tokenizer, spec.data, spec.length, spec.samples, spec.seed)
    model = subject.loaded.model.requires_grad_(False)  # a probe trains nothing
    total = torch.zeros(spec.length, dtype=torch.float64)
    for number, row in enumerate(rows):
        total += influence(model, row[None].to(subject.loaded.device), spec.last)[0].cpu()
        progress(number + 1, spec.samples)
    g = (total / spec.samples).flip(0)  # [T] by distance
    if not bool(g.isfinite().all()):
        raise ModelError("a gradient is not finite", hint="probe the model in float32")
    edges = bucket_edges(spec.length)
    buckets = [
        {"start": start, "stop": stop, "influence": float(g[start:stop].mean())} for start, stop in pairwise(edges)
    ]
    # Shares are undefined where no gradient arrives at all.
    beyond = {str(d): float(g[d:].sum() / g.sum()) for d in _doublings(spec.length)} if g.sum() > 0 else {}
    facts = {
        "length": spec.length,
        "last": spec.last,
        "samples": spec.samples,
        "layers": subject.letters,
        "windows": sorted({kind.sliding_window for kind in subject.kinds if kind.sliding_window is not None}),
        "buckets": buckets,
        "share_beyond": beyond,
    }
    title = f"What the last {spec.last} predictions hear of a token, at {spec.length:,} tokens"
    points = [(_middle(b), b["influence"] or None) for b in buckets if b["start"] > 0]  # the axis is logarithmic
    line = Curve("gradient", tuple(x for x, _ in points), tuple(y for _, y in points))
    picture = Curves("influence", title, "tokens before the last", "norm of the gradient", (line,), True, True)
    return ProbeFinding(facts, (picture,), (_table(g, beyond, spec),), tuple(_notes(subject, spec)))


def influence(model: Any, ids: Tensor, last: int) -> Tensor:
    """Returns fp64 [B,T]: the norm of the gradient at each input embedding of ids [B,T], for each row separately."""
    decoder = causal_lm(model).get_decoder()
    calls: list[tuple[nn.Module, Tensor, dict[str, Any]]] = []

    # Record each layer's input and arguments in a forward without gradients.
    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((module, args[0], kwargs))

    parts = (*decoder.layers, decoder.norm)
    handles = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            gradient = torch.zeros_like(hidden_states(model, ids))  # [B,T,E]
    finally:
        for handle in handles:
            handle.remove()
    # The gradient at the final states is the sum of the head's rows, the same at each of the last positions.
    weight = output_weight(model)
    gradient[:, -last:] = weight.sum(0, dtype=torch.promote_types(weight.dtype, torch.float32)) / last
    # Go backward layer by layer, from the final norm to layer 0: recompute one layer with gradients, then free it.
    while calls:
        part, x, kwargs = calls.pop()
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = part(x, **kwargs)
        (gradient,) = torch.autograd.grad(y, x, gradient)
        del x, y
    return torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float64)


def bucket_edges(length: int) -> list[int]:
    """Returns where the distance buckets begin and the last one ends: 0, 1, 2 and so on, from 8 in growing steps."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / PER_DOUBLING))))
    return [*edges[:-1], length]


def _doublings(length: int) -> list[int]:
    return [1 << i for i in range((length - 1).bit_length())]


def _middle(bucket: dict[str, Any]) -> float:
    return (bucket["start"] + bucket["stop"] - 1) / 2


def _table(g: Tensor, beyond: dict[str, float], spec: GradientInfluence) -> Table:
    rows = [(f"{int(d):,}", f"{float(g[int(d)]):.3g}", f"{share:.4f}") for d, share in beyond.items()]
    caption = (
        f"gradient of the last {spec.last} logits, mean over {counted(spec.samples, 'text')} of {spec.length:,} tokens"
    )
    return Table(caption, ("tokens back", "norm", "share of the sum from there on"), tuple(rows))


def _notes(subject: Subject, spec: GradientInfluence) -> list[str]:
    return [
        f"distances below {spec.last} tokens include the effect of a token on its own prediction: compare greater ones",
        *_ends(subject, spec),
    ]


def _ends(subject: Subject, spec: GradientInfluence) -> list[str]:
    windows = [kind.sliding_window for kind in subject.kinds if kind.sliding_window is not None]
    if not windows:
        return []
    shown = ", ".join(f"{window:,}" for window in sorted(set(windows)))
    reach = sum(window - 1 for window in windows)
    if len(windows) < len(subject.kinds):
        return [
            f"a window ends at {shown} tokens, all sliding layers together at {reach:,}: beyond, full layers carry it"
        ]
    # The distance is from the last position; the first of the `last` positions reaches last - 1 tokens farther.
    return [f"no layer is full, so it is exactly zero beyond {reach + spec.last - 1:,} tokens back"]
