"""Traces when a run's retrieval heads formed: the result's best heads, from the start through the checkpoints.

The score is attention mass (retrieval_heads.py); beside it is the entropy of the attention of the last 4 queries of
each prompt, in nats (arXiv 2606.15378, released code). The paper follows 4 heads through a pretraining; here it is a
finetune run, whose step 0 is the model that it started from, under the positions and the layout of the result.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ctxext.errors import InputError
from ctxext.evals.haystacks import haystack
from ctxext.probes.ablation import Head
from ctxext.probes.checkpoints import History, history, put
from ctxext.probes.probe_finding import Curve, Curves, ProbeFinding, Table
from ctxext.probes.probe_spec import KEEP_CHECKPOINTS, RetrievalTrace
from ctxext.probes.retrieval_heads import answer_attention, check_reach, questions, ranking, reachable
from ctxext.probes.subject import Subject
from ctxext.progress import CountProgress


def measure(subject: Subject, spec: RetrievalTrace, progress: CountProgress) -> ProbeFinding:
    """Measures the best heads' mass and entropy by step. The model in memory ends with the result's weights.

    Raises InputError for a run without checkpoints, and for more heads than can see an answer.
    """
    assert spec.length is not None
    notes: list[str] = []
    run = history(subject.source, notes.append)
    if not run.checkpoints:
        raise InputError(
            f"retrieval-trace: {subject.source.name} has no checkpoints left between its start and its end",
            hint=KEEP_CHECKPOINTS,
        )
    loaded = subject.loaded
    items = questions(loaded, spec.data, spec.length, spec.samples, spec.seed)
    reach = reachable(subject.kinds, items)
    check_reach("retrieval-trace: heads", spec.heads, reach, subject.heads)
    found: dict[int, Tensor] = {}  # [2,L,H] by step
    try:
        for number, state in enumerate(run.states, start=1):
            put(loaded.model, state)
            found[state.step] = answer_attention(loaded, items)
            progress(number, len(run.states))
    # Later probes use the same model in memory, so restore the result's weights in any case.
    finally:
        put(loaded.model, run.result)
    # The result decides which heads are followed.
    heads = ranking([found[run.result.step][0]], reach)[: spec.heads]
    return ProbeFinding(
        _facts(spec, subject, run, found, heads), _curves(spec, found, heads), (_table(found, heads),), tuple(notes)
    )


def _facts(
    spec: RetrievalTrace, subject: Subject, run: History, found: dict[int, Tensor], heads: list[Head]
) -> dict[str, Any]:
    return {
        "length": spec.length,
        "haystack": haystack(spec.data)[0],
        "layers": subject.letters,
        "result_step": run.result.step,
        "steps": list(found),
        "heads": [
            {
                "layer": layer,
                "head": head,
                "mass": [float(x[0, layer, head]) for x in found.values()],
                "entropy": [float(x[1, layer, head]) for x in found.values()],
            }
            for layer, head in heads
        ],
        "all_mass": [x[0].tolist() for x in found.values()],
    }


def _curves(spec: RetrievalTrace, found: dict[int, Tensor], heads: list[Head]) -> tuple[Curves, ...]:
    def lines(measured: int) -> tuple[Curve, ...]:
        return tuple(
            Curve(f"layer {i} head {h}", tuple(found), tuple(float(x[measured, i, h]) for x in found.values()))
            for i, h in heads
        )

    title = f"the result's best {len(heads)} heads, {spec.length:,} tokens"
    return (
        Curves("mass", f"Attention mass on the answer: {title}", "step", "share of the attention", lines(0)),
        Curves("entropy", f"Entropy of the last queries: {title}", "step", "nats", lines(1)),
    )


def _table(found: dict[int, Tensor], heads: list[Head]) -> Table:
    header = ("step", *(f"{layer}.{head} {what}" for layer, head in heads for what in ("mass", "entropy")))
    rows = [
        (str(step), *(f"{x[i, layer, head]:.3f}" for layer, head in heads for i in (0, 1))) for step, x in found.items()
    ]
    return Table(
        "the result's best heads (layer.head) by step: mass on the answer, entropy in nats", header, tuple(rows)
    )
