"""Measures how far training moved Wq and Wk: their distance, head by head, to other weights of the run.

|Wq - Wq'|| and ||Wk - Wk'|| are Frobenius norms of a head's rows in fp32, with adapters folded in (W + scale B A); the
relative distance is divided by ||W'||. "q + k" is the paper's: the mean over heads of their sum (arXiv 2606.15378,
released code), each query head with the key head that it reads. Norms on q and k (qwen3) and biases are left out.
Weights are read from files, one projection at a time; no model runs.

    L layers   H query heads   K key heads   S states of the run
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxext.probes.checkpoints import history, projection
from ctxext.probes.probe_finding import Curve, Curves, Grid, ProbeFinding, Table
from ctxext.probes.probe_spec import QkDistance
from ctxext.probes.subject import Subject
from ctxext.progress import CountProgress

KINDS = ("absolute", "relative")


def measure(subject: Subject, spec: QkDistance, progress: CountProgress) -> ProbeFinding:
    """Measures the distance from the run's start to its result, by head, and of every step to `spec.to`.

    The first are grids, the second curves.
    """
    notes: list[str] = []
    source = subject.source
    run = history(source, notes.append)
    if not run.checkpoints:
        notes.append("the run has no checkpoints between its start and its end, so only these two are compared")
    # The grids compare start and result, whichever of the two is the reference `to`; `far` is the other one.
    to = run.start if spec.to == "base" else run.result
    far = run.states.index(run.result if spec.to == "base" else run.start)
    L, heads = len(subject.kinds), {"q": source.shape.num_heads, "k": source.shape.num_kv_heads}
    found = {of: torch.zeros(2, len(run.states), L, count, dtype=torch.float64) for of, count in heads.items()}
    for layer in range(L):
        for of, count in heads.items():
            name = f"model.layers.{layer}.self_attn.{of}_proj"
            target = projection(run, to, source, name)
            # Read one projection at a time, at every state: the whole model is never in memory.
            size = _norms(target, count)
            for i, state in enumerate(run.states):
                apart = _norms(projection(run, state, source, name) - target, count)
                found[of][0, i, layer] = apart
                found[of][1, i, layer] = apart / size.clamp(min=torch.finfo(torch.float32).tiny)
        progress(layer + 1, L)
    steps = [state.step for state in run.states]
    means = {of: x.mean((2, 3)) for of, x in found.items()}  # [2,S]
    means["q + k"] = means["q"] + means["k"]
    grids = {kind: {of: found[of][i, far].tolist() for of in heads} for i, kind in enumerate(KINDS)}
    return ProbeFinding(
        facts={
            "to": spec.to,
            "layers": subject.letters,
            "steps": steps,
            "result_step": run.result.step,
            "by_step": {kind: {of: x[i].tolist() for of, x in means.items()} for i, kind in enumerate(KINDS)},
            "start_to_result": grids,
        },
        pictures=(
            *(_grid(of, kind, found[of][i, far], subject.letters) for i, kind in enumerate(KINDS) for of in heads),
            *(_curves(kind, steps, {of: x[i] for of, x in means.items()}, spec) for i, kind in enumerate(KINDS)),
        ),
        tables=(_table(steps, means, spec),),
        notes=tuple(notes),
    )


def _norms(weight: Tensor, heads: int) -> Tensor:
    """Returns the norm fp64 [heads] of each head's rows of weight [heads D,E]."""
    return weight.double().view(heads, -1).norm(dim=1)


def _grid(of: str, kind: str, cells: Tensor, letters: str) -> Grid:
    rows, columns = (tuple(map(str, range(size))) for size in cells.shape)
    title = f"W{of} between the run's start and its result, {kind} distance"
    values = tuple(map(tuple, cells.tolist()))
    return Grid(
        f"{of}-{kind}", title, "query head" if of == "q" else "key head", "layer", rows, columns, values, letters
    )


def _curves(kind: str, steps: list[int], means: dict[str, Tensor], spec: QkDistance) -> Curves:
    lines = tuple(Curve(of, tuple(steps), tuple(x.tolist())) for of, x in means.items())
    title = f"Wq and Wk to the run's {'start' if spec.to == 'base' else 'result'}, mean over heads"
    return Curves(f"{kind}-by-step", title, "step", f"{kind} distance", lines)


def _table(steps: list[int], means: dict[str, Tensor], spec: QkDistance) -> Table:
    caption = f"distance of Wq and Wk to the run's {'start' if spec.to == 'base' else 'result'}, means over heads"
    header = ("step", *(f"{of}, {kind}" for kind in KINDS for of in means))
    rows = [
        (str(step), *(f"{means[of][k, i]:.4g}" for k in range(len(KINDS)) for of in means))
        for i, step in enumerate(steps)
    ]
    return Table(caption, header, tuple(rows))
