"""Plans the teacher of a run from files alone: which model, its cost, and all refusals. No torch.

`self` is the model's own frozen weights under the layout and positions of their pretraining (model/relayout.py). No
second model is in memory, and the comparison shows exactly what the conversion changed. Therefore the frozen weights
must not change, and must be the pretrained ones.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ctxext.data.documents import SELF
from ctxext.errors import InputError
from ctxext.model.model_config import ModelConfig
from ctxext.model.positions import Auto
from ctxext.model.source import ModelSource, original_config, resolve
from ctxext.ops import cost
from ctxext.ops.logits import distillation_chunk
from ctxext.train.finetune_spec import DistillSpec, FinetuneSpec, Objective
from ctxext.units import format_tokens

STRETCHING = ("dynamic", "longrope")  # RoPE types whose frequencies depend on how long a row is


@dataclass(frozen=True)
class Teacher:
    """A planned teacher.

    source  a separate model; None: self
    config  the config that it runs with
    length  tokens of a document that it was trained for; it teaches nothing beyond them
    """

    source: ModelSource | None
    config: ModelConfig
    length: int
    description: str


def plan_teacher(source: ModelSource, spec: FinetuneSpec) -> Teacher | None:
    """Returns the teacher of a run, None for a run without a teacher.

    Raises InputError for a teacher that cannot teach this model, and for `data: self` when the model is no longer the
    pretrained one.
    """
    if any(part.source == SELF for part in spec.data.parts):
        # The model samples its training text in its original layout; this raises if that is not known.
        original_config(source)
    if spec.distill is None:
        return None
    _check_layers(spec)
    if spec.distill.teacher == SELF:
        teacher = _self(source, spec, spec.distill)
    else:
        teacher = _other(source, spec.distill)
    # Frequencies that depend on the row length would differ from those that the teacher was trained with.
    kind = teacher.config.rope.get("rope_type")
    if spec.ctx > teacher.length and kind in STRETCHING:
        raise InputError(
            f"distill.teacher: its {kind} RoPE changes beyond {format_tokens(teacher.length)} tokens, and in rows of "
            f"{format_tokens(spec.ctx)} it would compute something else",
            hint=f"distil at --ctx {teacher.length}, then train at the longer context without a teacher",
        )
    return teacher


def _self(source: ModelSource, spec: FinetuneSpec, distill: DistillSpec) -> Teacher:
    if spec.tuning == "full":
        raise InputError(
            "distill.teacher: self with tuning: full is not possible: the teacher's weights would change in training",
            hint="use tuning: lora, or give the path of another teacher",
        )
    config, length = original_config(source), spec.original_length or source.usable_length
    # Without a change, the KL and the layer errors are zero from the start.
    unchanged = config == source.config and isinstance(spec.rope_scaling, Auto) and spec.ctx <= length
    if unchanged and not any(objective.ce for objective in distill.objectives):
        raise InputError(
            f"{source.name} was not converted: it would be its own teacher, and there is nothing to learn",
            hint="convert it first with ctxext convert, or use another preset",
        )
    before = "conversion" if source.kind == "conversion" else "this training (it was not converted)"
    text = f"itself before {before}, to {format_tokens(length)} tokens; no second model in memory"
    if spec.memory.quantize != "none":
        text += f"; in {spec.memory.quantize}: the teacher is the quantised model, not the stored one"
    return Teacher(None, config, length, text)


def _other(source: ModelSource, distill: DistillSpec) -> Teacher:
    found = resolve(distill.teacher, weights=False)  # a plan needs no weights
    mine, theirs = source.config.shape.vocab_size, found.config.shape.vocab_size
    if mine != theirs:
        raise InputError(
            f"distill.teacher: {found.name} has {theirs:,} tokens, {source.name} {mine:,}: their vocabularies differ",
            hint="give a teacher with the same tokenizer",
        )
    # Layer-by-layer errors need the same number of layers and the same width.
    sizes = [(s.shape.num_layers, s.shape.hidden_size) for s in (source, found)]
    if any(objective.hidden or objective.attention for objective in distill.objectives) and sizes[0] != sizes[1]:
        raise InputError(
            f"distill.objectives: hidden and attention need layers of one size: {source.name} has {sizes[0][0]} layers "
            f"of {sizes[0][1]}, {found.name} {sizes[1][0]} of {sizes[1][1]}",
            hint="use kl and ce",
        )
    text = f"{found.name}, to {format_tokens(found.usable_length)} tokens"
    return Teacher(found, found.config, found.usable_length, text)


def _check_layers(spec: FinetuneSpec) -> None:
    """Raises InputError if `hidden` or `attention` need layer outputs that the memory options do not provide."""
    assert spec.distill is not None
    if not any(objective.hidden or objective.attention for objective in spec.distill.objectives):
        return
    tiles, k = spec.memory.tiles, spec.memory.checkpoint
    if tiles is not None or int(k) > 1:
        given = f"tiles: {tiles}" if tiles is not None else f"checkpoint: {k}"
        raise InputError(
            f"distill.objectives: hidden and attention need every layer's output, which memory.{given} does not keep",
            hint="use kl and ce, or memory.checkpoint: true without tiles",
        )


def objective_at(objectives: Sequence[Objective], step: int, steps: int) -> Objective:
    """Returns the objective of `step` (from 0) of `steps`. Each has its share, rounded, and at least one step."""
    # The end of each objective in steps, by its cumulative share.
    ends = [steps * end / sum(o.share for o in objectives) for end in accumulate(o.share for o in objectives)]
    last = len(objectives) - 1
    # Where each objective after the first starts: at least one step for each one before it and each one after it.
    starts = [max(i + 1, min(round(end), steps - last + i)) for i, end in enumerate(ends[:-1])]
    return objectives[bisect.bisect_right(starts, step)]


def teacher_flops(teacher: Teacher, source: ModelSource, T: int, *, mask: bool) -> int:
    """Returns the FLOPs of the teacher's forward for a row of T tokens.

    With a document mask the teacher sees the whole row in pieces of its own length; without one, only the first piece.
    """
    shape = (teacher.source or source).shape
    whole, rest = divmod(T, teacher.length)
    # Attention is quadratic, so that pieces cost less than one long row.
    pieces = [teacher.length] * whole + ([rest] if rest else [])
    layers: list[cost.Layer] = [(None, None)] * shape.num_layers
    return sum(cost.forward_flops(shape, layers, piece) for piece in (pieces if mask else pieces[:1]))


def teacher_bytes(teacher: Teacher, source: ModelSource, spec: FinetuneSpec, tokens: int, item_bytes: int) -> int:
    """Returns the memory in bytes that a teacher adds; the logits of the loss are in `logits_bytes`.

    These are its last hidden states and, for a separate model, its weights. A KL holds the states twice, the second
    time padded to the row. A `hidden` objective also holds those of every layer and, for the backward pass, their fp32
    differences from the student's. `tokens` are the tokens of one forward.
    """
    assert spec.distill is not None
    shape = (teacher.source or source).shape
    entry = 0  # bytes of an entry of a hidden state, in the objective that holds the most
    for objective in spec.distill.objectives:
        kl, hidden = bool(objective.kl), bool(objective.hidden)
        entry = max(entry, item_bytes * (kl + (kl or hidden)) + hidden * shape.num_layers * (item_bytes + 4))
    weights = cost.parameter_count(shape) * item_bytes if teacher.source else 0
    return weights + entry * tokens * shape.hidden_size


def logits_bytes(source: ModelSource, spec: FinetuneSpec, tokens: int, *, gpu: bool) -> int | None:
    """Returns the bytes of the logits that the loss of a run with a teacher holds at once; None without a teacher.

    For each token of a chunk (train/distill.py) these are five fp32 entries of the vocabulary with a KL (log q, log p,
    p, their difference and its product with p), and three without (log q, q and the weighted q).
    """
    if spec.distill is None:
        return None
    V = source.shape.vocab_size
    entries = 5 if any(objective.kl for objective in spec.distill.objectives) else 3
    return min(distillation_chunk(V, gpu=gpu), tokens) * V * 4 * entries


def teacher_weights(teacher: Teacher | None, spec: FinetuneSpec) -> ModelSource | None:
    """Returns a separate teacher with its weight files, fetched from the hub if necessary.

    None for `self` and for a run without a teacher.
    """
    if teacher is None or teacher.source is None or spec.distill is None:
        return None
    return resolve(spec.distill.teacher)


def absolute(teacher: str) -> str:
    """Returns a teacher's path as an absolute one, because a run may be resumed from another directory."""
    return str(Path(teacher).absolute()) if teacher != SELF and Path(teacher).exists() else teacher
