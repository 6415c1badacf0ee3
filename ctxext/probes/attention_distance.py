"""Measures how far each head looks: mean attended distance, mass on the first tokens, entropy; and how they grow.

    H heads   L layers   T tokens   r rows of queries

The sink is the mass on the first few tokens, whatever they are (Xiao et al. 2023, arXiv 2309.17453, names it). The
distance of a query at t is the mean of t - k under its attention; entropy is in nats. In a full layer without positions
both may grow with the text; a scale that grows with log t counters that (retrofit/scale.py; SWAN-GPT, arXiv
2504.08719). No T x T attention matrix is computed, only chosen rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxext.probes.probe_finding import Curve, Curves, Grid, ProbeFinding, Table
from ctxext.probes.probe_spec import SHORTEST, AttentionDistance
from ctxext.probes.subject import Subject, watch_rows
from ctxext.probes.texts import text_rows
from ctxext.progress import CountProgress
from ctxext.units import counted

MEASURED = ("distance", "sink", "entropy")


def measure(subject: Subject, spec: AttentionDistance, progress: CountProgress) -> ProbeFinding:
    """Measures every head at the length, and the growth of each full layer over `lengths`, as means over heads.

    The pictures at the length are grids of layers x heads.
    """
    assert spec.length is not None
    # By default: the length, its half, its quarter and its eighth, as far as they are not below SHORTEST.
    lengths = sorted(set(spec.lengths or [n for i in range(4) if (n := spec.length >> i) >= SHORTEST]) | {spec.length})
    texts = text_rows(subject.loaded.tokenizer, spec.data, max(lengths), spec.samples, spec.seed)
    found: dict[int, Tensor] = {}
    for number, length in enumerate(lengths):
        total = torch.zeros(3, len(subject.kinds), subject.heads, dtype=torch.float64)
        # The shorter texts are the beginnings of the longest ones.
        for sample, row in enumerate(texts[:, :length]):
            total += _one(subject, row[None], spec)
            progress(number * spec.samples + sample + 1, len(lengths) * spec.samples)
        found[length] = total / spec.samples
    at, letters = found[spec.length], subject.letters
    full = [layer for layer, kind in enumerate(subject.kinds) if kind.sliding_window is None]
    notes = [] if full else ["no layer is full, so the growth of attended distances over length is left out"]
    if subject.learned_sinks:
        notes.append(f"attention on a learned sink is counted as attention on the first {spec.sinks} tokens")
    return ProbeFinding(
        facts={
            "length": spec.length,
            "by_length": {str(n): dict(zip(MEASURED, x.tolist(), strict=True)) for n, x in found.items()},
            "layers": letters,
            "rows": spec.rows,
            "sink_tokens": spec.sinks,
        },
        pictures=(*_grids(at, letters, spec), *(_growth(found, full) if full else ())),
        tables=(_table(at, subject, spec),),
        notes=tuple(notes),
    )


def _one(subject: Subject, ids: Tensor, spec: AttentionDistance) -> Tensor:
    """Returns fp64 [3,L,H]: distance, sink mass and entropy of one text ids [1,T], means over its rows."""
    T = ids.shape[1]
    # Only the second half: queries near the beginning have few tokens to look at.
    at = torch.linspace(T // 2, T - 1, min(spec.rows, T - T // 2)).long()[None]  # [1,r]
    total = torch.zeros(3, len(subject.kinds), subject.heads, dtype=torch.float64)

    def take(layer: int, weights: Tensor, rows: slice) -> None:
        where = at[:, rows].to(weights.device)
        keys = torch.arange(weights.shape[-1], device=weights.device)
        back = (where[..., None] - keys).clamp(min=0).float()  # [1,r,T]; later keys have weight 0
        total[0, layer] += (weights * back[:, None]).sum((0, 2, 3)).double().cpu()
        total[1, layer] += weights[..., : spec.sinks].sum((0, 2, 3)).double().cpu()
        if subject.learned_sinks:  # learned sinks get the rest of each row, which then sums to less than 1
            total[1, layer] += (1 - weights.sum(-1)).sum((0, 2)).double().cpu()
        total[2, layer] += torch.special.entr(weights).sum((0, 2, 3)).double().cpu()

    watch_rows(subject.loaded.model, ids.to(subject.loaded.device), at, take)
    return total / at.shape[1]


def _grids(at: Tensor, letters: str, spec: AttentionDistance) -> list[Grid]:
    titles = {
        "distance": "mean attended distance, tokens",
        "sink": f"attention on the first {spec.sinks} tokens, share",
        "entropy": "entropy of the attention, nats",
    }
    rows, columns = (tuple(map(str, range(size))) for size in at.shape[1:])
    return [
        Grid(
            name,
            f"{titles[name]}, at {spec.length:,} tokens",
            "head",
            "layer",
            rows,
            columns,
            tuple(map(tuple, at[i].tolist())),
            letters,
            highest=1.0 if name == "sink" else None,
        )
        for i, name in enumerate(MEASURED)
    ]


def _growth(found: dict[int, Tensor], full: list[int]) -> list[Curves]:
    lengths = tuple(found)

    def lines(of: Any) -> tuple[Curve, ...]:
        return tuple(Curve(f"layer {i}", lengths, tuple(of(found[n], i, n) for n in lengths)) for i in full)

    axis = "length of the text, tokens"
    distance = lines(lambda x, i, n: float(x[0, i].mean()) / n)
    entropy = lines(lambda x, i, n: float(x[2, i].mean()))
    return [
        Curves(
            "growth-distance", "Full layers: attended distance over length", axis, "share of the length", distance, True
        ),
        Curves("growth-entropy", "Full layers: entropy of the attention", axis, "nats", entropy, True),
    ]


def _table(at: Tensor, subject: Subject, spec: AttentionDistance) -> Table:
    rows = []
    for layer, kind in enumerate(subject.kinds):
        distance, sink, entropy = (at[i, layer] for i in range(3))
        farthest = int(distance.argmax())
        rows.append(
            (
                str(layer),
                kind.letter,
                f"{distance.mean():.1f}",
                f"{farthest}: {distance[farthest]:.1f}",
                f"{sink.mean():.3f}",
                f"{entropy.mean():.2f}",
            )
        )
    caption = (
        f"attention of {spec.rows} queries in the second half of {counted(spec.samples, 'text')} of {spec.length:,} "
        "tokens; means over heads, and the head with the greatest distance"
    )
    header = ("layer", "kind", "distance", "farthest head", f"first {spec.sinks} tokens", "entropy, nats")
    return Table(caption, header, tuple(rows))
