"""The loss of a model that learns from a teacher: KL of its predictions, errors of its layers, and cross entropy.

The teacher sees whole rows with dense attention and no gradients. It is asked about the tokens within its trained
length of their document's start; where a document goes on beyond, it starts anew every so many tokens, which costs
T times that length instead of T squared, and what it says there is not used: those tokens learn from the text.

Shapes: b sequences, T tokens, n <= T tokens that the teacher sees, N = b n, E model width, V vocabulary, L layers, c
tokens of a chunk of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ctxext.errors import ModelError
from ctxext.model.load import causal_lm, hidden_states, output_weight
from ctxext.model.relayout import rotations
from ctxext.train.loss import IGNORED, chunk_of, handed_down
from ctxext.train.spec import Objective


class TeacherModel(NamedTuple):
    """Who teaches, and within how many tokens. No nn.Module: its modules may be the student's, and ZeRO knows those."""

    model: Any
    length: int


class Lesson(NamedTuple):
    """What a teacher says of a row: states [b,n,E] after the last norm and, if asked, each layer's output [b,n,E]."""

    states: Tensor
    layers: list[Tensor]


def distilled_loss(
    student: Any, head: Any, teacher: TeacherModel, objective: Objective, ids: Tensor, labels: Tensor, **attention: Any
) -> Tensor:
    """The objective's errors, summed over the labels [b,T] that count; fp32 scalar.

    `head` (`DistilledHead`) is called with what both say. `attention` goes to the student's layers.
    """
    within = _within(labels, attention.get("document_starts"), teacher.length)  # [b,T]
    scored = labels != IGNORED
    taught = within & scored
    beyond = scored & ~within
    loss = torch.zeros((), dtype=torch.float32, device=ids.device)
    if objective.attention:
        loss = loss + objective.attention * _attention_errors(student, teacher, ids, taught, attention)
    needs_text = bool(objective.beyond) and ids.shape[1] > teacher.length  # by shape: all ranks must decide alike
    if not (objective.kl or objective.ce or objective.hidden or needs_text):
        return loss
    lesson = None
    if objective.kl or objective.hidden:
        lesson = _lesson(teacher, ids, attention, layers=bool(objective.hidden))
    with _outputs(causal_lm(student).get_decoder().layers if objective.hidden else []) as outputs:
        states = hidden_states(student, ids, **attention)  # [b,T,E]
    if objective.hidden:
        assert lesson is not None
        if len(outputs) != len(lesson.layers):
            raise ModelError(f"{len(outputs)} of {len(lesson.layers)} layers showed their output")
        errors = [_relative(out, true, taught) for out, true in zip(outputs, lesson.layers, strict=True)]
        loss = loss + objective.hidden * torch.stack(errors).mean()
    ce = objective.ce * taught + objective.beyond * beyond  # [b,T]
    kl = objective.kl * taught
    said = None if lesson is None or not objective.kl else lesson.states
    return loss + head(states, said, labels, ce, kl, objective.top_k)


class DistilledHead(nn.Module):
    """The two heads upon their states, chunk by chunk; their weights are used without the modules that hold them.

    So it is this module for which ZeRO-3 gathers them (train/zero.py).
    """

    def __init__(self, student: Any, teacher: TeacherModel):
        super().__init__()
        self.weights = partial(output_weight, student), partial(output_weight, teacher.model)

    def forward(
        self, states: Tensor, said: Tensor | None, labels: Tensor, ce: Tensor, kl: Tensor, top_k: int | None
    ) -> Tensor:
        mine, theirs = (weight() for weight in self.weights)
        if said is not None:  # the teacher may see less of a row: no KL there, but a place to stand
            said = pad(said, (0, 0, 0, states.shape[1] - said.shape[1])).flatten(0, 1)
        rows = states.flatten(0, 1), mine, said, theirs, labels.flatten(), ce.flatten(), kl.flatten()
        return distillation_loss(*rows, top_k=top_k)


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    said: Tensor | None,
    teacher_weight: Tensor,
    labels: Tensor,
    ce: Tensor,
    kl: Tensor,
    *,
    top_k: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum of ce · (-log q[label]) + kl · KL(p || q), in nats, never holding the logits of more than a chunk.

    q = softmax(hidden weightᵀ) is the student's, p = softmax(said teacher_weightᵀ) the teacher's, both in fp32; hidden
    and said [N,E] (said None: no KL), weights [V,E], labels, ce and kl [N]. With `top_k` the KL is over the teacher's k
    most probable tokens and one entry for all others, a lower bound of the whole. Gradients go to hidden and, where it
    trains, weight; they are taken in the forward pass, as those of train/loss.py.
    """
    chunk = chunk or max(16, chunk_of(weight) // 2)  # two vocabularies are held at a time
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        loss: Tensor = _Distillation.apply(hidden, weight, said, teacher_weight, labels, ce, kl, top_k, chunk)
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, said: Tensor | None, teacher_weight: Tensor, labels: Tensor,
        ce: Tensor, kl: Tensor, top_k: int | None, chunk: int
    ) -> Tensor:  # fmt: skip
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        matrix, theirs = weight.to(hidden.dtype), teacher_weight
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            z = (hidden[rows] @ matrix.t()).float().log_softmax(-1)  # [c,V] log q
            text, taught = ce[rows, None].float(), kl[rows, None].float()  # [c,1]
            label = labels[rows, None].clamp(min=0)
            loss -= (text * z.gather(-1, label)).sum()
            if said is None:
                grad = text * z.exp()
            else:
                y = (said[rows] @ theirs.to(said.dtype).t()).float().log_softmax(-1)  # [c,V] log p
                divergence, target = _divergence(y, z, top_k)
                loss += (taught[:, 0] * divergence).sum()
                grad = z.exp_().mul_(text + taught).sub_(target.mul_(taught))
                del y, target
            grad.scatter_add_(-1, label, -text)
            grad = grad.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(grad, matrix, out=dhidden[rows])
            if dweight is not None:
                dweight += grad.t() @ hidden[rows]
            del z, grad  # before the next chunk's are made
        ctx.gradients = dhidden, None if dweight is None else dweight.to(weight.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*handed_down(ctx, grad), *[None] * 7)


def _divergence(y: Tensor, z: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """KL(p || q) of each row, from log p and log q [c,V], and what q's gradient q - target has to reach, [c,V]."""
    p = y.exp()
    if top_k is None or top_k >= y.shape[1]:
        return (p * (y - z)).sum(-1), p
    best, index = y.topk(top_k, dim=-1)  # [c,k]
    own = z.gather(-1, index)
    # the mass of the rest in logarithms: 1 - sum of the best is 0 where the student is sure, and would be divided by
    y_rest, z_rest = (x.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True) for x in (y, z))  # [c,1]
    kl = (best.exp() * (best - own)).sum(-1) + (y_rest.exp() * (y_rest - z_rest))[:, 0]
    return kl, (z - z_rest + y_rest).exp().scatter_(-1, index, best.exp())


def _within(labels: Tensor, document_starts: Tensor | None, length: int) -> Tensor:
    """Which tokens [b,T] lie within `length` of their document's start, or of the row's where rows are one."""
    position = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return position < length if document_starts is None else position - document_starts.to(labels.device) < length


def taught_rows(
    teacher: TeacherModel, ids: Tensor, attention: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor | str]]:
    """Ids [b,n] and attention arguments for the teacher: dense, and no document longer than it was trained for."""
    starts, own = attention.get("document_starts"), {"backend": attention.get("backend", "auto")}
    if starts is None:
        return ids[:, : teacher.length], own
    position = torch.arange(ids.shape[1], device=starts.device)
    return ids, own | {"document_starts": position - (position - starts) % teacher.length}


@torch.no_grad()
def _lesson(teacher: TeacherModel, ids: Tensor, attention: dict[str, Any], *, layers: bool) -> Lesson:
    ids, own = taught_rows(teacher, ids, attention)
    with _outputs(causal_lm(teacher.model).get_decoder().layers if layers else []) as outputs:
        states = hidden_states(teacher.model, ids, **own)
    return Lesson(states, outputs)


def _attention_errors(
    student: Any, teacher: TeacherModel, ids: Tensor, taught: Tensor, attention: dict[str, Any]
) -> Tensor:
    """The mean over the layers of what the student's attention misses, given the teacher's input to the layer.

    The student's attention is computed while the teacher's forward passes by, and again in the backward pass: what
    is kept is each layer's input.
    """
    decoder, errors = causal_lm(student).get_decoder(), list[Tensor]()
    inputs: dict[int, Tensor] = {}
    ids, own = taught_rows(teacher, ids, attention)
    taught = taught[:, : ids.shape[1]]
    if attention.get("document_starts") is None:
        attention = {name: value for name, value in attention.items() if name != "document_starts"}

    def note(index: int, module: Any, arguments: tuple[Any, ...]) -> None:
        inputs[index] = arguments[0]

    def compare(index: int, module: Any, arguments: Any, output: Any) -> None:
        layer, x = decoder.layers[index], inputs.pop(index)

        def attend(x: Tensor) -> Tensor:
            h: Tensor = layer.self_attn(
                hidden_states=layer.input_layernorm(x),
                position_embeddings=rotations(decoder, x)(index),
                attention_mask=None,
                **attention,
            )[0]
            return _relative(h, output[0], taught)

        with torch.enable_grad():
            errors.append(checkpoint(attend, x, use_reentrant=False, preserve_rng_state=False))

    layers = causal_lm(teacher.model).get_decoder().layers
    handles = [layer.register_forward_pre_hook(partial(note, i)) for i, layer in enumerate(layers)]
    handles += [layer.self_attn.register_forward_hook(partial(compare, i)) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            hidden_states(teacher.model, ids, **own)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(errors).mean()


@contextmanager
def _outputs(layers: Any) -> Iterator[list[Tensor]]:
    """What the layers give within the block, in order; a layer that is computed again later is not seen."""
    seen = list[Tensor]()
    handles = [layer.register_forward_hook(lambda module, arguments, output: seen.append(output)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: Tensor, true: Tensor, taught: Tensor) -> Tensor:
    """Squared error of found [b,T,E] from true [b,n,E], summed over taught [b,T], over the mean square of true; fp32.

    Each row has its own mean, so that rows add up alike in whatever micro-batches and on whatever ranks they are.
    """
    n = true.shape[1]
    counts = taught[:, :n, None].float()
    error = ((found[:, :n].float() - true.float()) ** 2 * counts).sum((1, 2))  # [b]
    size = (true.float() ** 2 * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)
    return (error / size.clamp(min=torch.finfo(torch.float32).tiny)).sum()
