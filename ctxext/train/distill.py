"""The loss of a model that learns from a teacher: KL of its predictions, errors of its layers, and cross entropy.

The teacher runs on whole rows with dense attention and without gradients. Its output is used for the tokens within its
trained length of their document's start. Where a document is longer, the teacher starts a new document every `length`
tokens, which costs T times that length instead of T squared. Its output there is not used: these tokens learn from the
text.

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
from ctxext.ops.logits import distillation_chunk
from ctxext.train.finetune_spec import Objective
from ctxext.train.loss import IGNORED, stored_gradients


class TeacherModel(NamedTuple):
    """The teacher's model, and the length in tokens that it was trained for.

    Not an nn.Module, since its modules may be the student's, which ZeRO already manages.
    """

    model: Any
    length: int


class Lesson(NamedTuple):
    """A teacher's output for rows: states [b,n,E] after the last norm and, if requested, each layer's output."""

    states: Tensor
    layers: list[Tensor]  # each [b,n,E]


def distilled_loss(
    student: Any,
    head: Any,
    teacher: TeacherModel,
    objective: Objective,
    ids: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    **attention: Any,
) -> Tensor:
    """Returns the objective's errors, summed over the labels [b,T] that count; fp32 scalar.

    `head` (`DistilledHead`) is called with the states of both models. `token_weights` [b,T] multiply the errors of
    every term. `attention` goes to the student's layers. Raises ModelError where a layer does not show its output.
    """
    # Every scored token is either taught by the teacher or, further into its document, learned from the text.
    within = _within(labels, attention.get("document_starts"), teacher.length)  # [b,T]
    scored = labels != IGNORED
    taught = within & scored  # [b,T]
    beyond = scored & ~within  # [b,T]
    if token_weights is not None:
        taught, beyond = taught * token_weights, beyond * token_weights
    loss = torch.zeros((), dtype=torch.float32, device=ids.device)
    if objective.attention:
        loss = loss + objective.attention * _attention_errors(student, teacher, ids, taught, attention)
    # Decided by shape, not by the labels of this rank, so that all ranks run the same forward passes.
    needs_text = bool(objective.beyond) and ids.shape[1] > teacher.length
    if not (objective.kl or objective.ce or objective.hidden or needs_text):
        return loss
    lesson = None
    if objective.kl or objective.hidden:
        lesson = _lesson(teacher, ids, attention, layers=bool(objective.hidden))
    # The hooks end before the backward pass, so that a recomputed layer is not recorded twice.
    with _outputs(causal_lm(student).get_decoder().layers if objective.hidden else []) as outputs:
        states = hidden_states(student, ids, **attention)  # [b,T,E]
    if objective.hidden:
        assert lesson is not None
        if len(outputs) != len(lesson.layers):
            raise ModelError(f"{len(outputs)} of {len(lesson.layers)} layers recorded their output")
        errors = [_relative(out, true, taught) for out, true in zip(outputs, lesson.layers, strict=True)]
        loss = loss + objective.hidden * torch.stack(errors).mean()
    # The weight of each token's cross entropy and KL.
    ce = objective.ce * taught + objective.beyond * beyond  # [b,T]
    kl = objective.kl * taught  # [b,T]
    teacher_states = None if lesson is None or not objective.kl else lesson.states
    return loss + head(states, teacher_states, labels, ce, kl, objective.top_k)


class DistilledHead(nn.Module):
    """Applies the student's and the teacher's head to their states, chunk by chunk, without calling the head modules.

    So ZeRO-3 gathers the heads' weights around this module (train/zero.py).
    """

    def __init__(self, student: Any, teacher: TeacherModel):
        super().__init__()
        self.weights = partial(output_weight, student), partial(output_weight, teacher.model)

    def forward(
        self, states: Tensor, teacher_states: Tensor | None, labels: Tensor, ce: Tensor, kl: Tensor, top_k: int | None
    ) -> Tensor:
        """Returns `distillation_loss` of the states of both models under their own heads."""
        # states [b,T,E], teacher_states [b,n,E] or None; labels, ce, kl [b,T]
        mine, theirs = (weight() for weight in self.weights)
        # The teacher may see fewer tokens of a row. Zero-pad; the KL weight is 0 for these tokens.
        if teacher_states is not None:
            teacher_states = pad(teacher_states, (0, 0, 0, states.shape[1] - teacher_states.shape[1])).flatten(0, 1)
        rows = states.flatten(0, 1), mine, teacher_states, theirs, labels.flatten(), ce.flatten(), kl.flatten()
        return distillation_loss(*rows, top_k=top_k)


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_states: Tensor | None,
    teacher_weight: Tensor,
    labels: Tensor,
    ce: Tensor,
    kl: Tensor,
    *,
    top_k: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Returns the sum of ce · (-log q[label]) + kl · KL(p || q), in nats; holds the logits of one chunk at a time.

    q = softmax(hidden weightᵀ) is the student's, p = softmax(teacher_states teacher_weightᵀ) the teacher's, both in
    fp32; hidden and teacher_states [N,E] (teacher_states None: no KL), weights [V,E], labels, ce and kl [N]. With
    `top_k` the KL is over the teacher's k most probable tokens and one entry for all others, a lower bound of the full
    KL. Gradients go to hidden and, where it trains, to weight. As in train/loss.py, they are computed in the forward
    pass.
    """
    chunk = chunk or distillation_chunk(weight.shape[0], gpu=weight.device.type != "cpu")
    # Apply autocast's dtype here and switch it off inside, since the operation chooses its own dtypes.
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        loss: Tensor = _Distillation.apply(hidden, weight, teacher_states, teacher_weight, labels, ce, kl, top_k, chunk)
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_states: Tensor | None, teacher_weight: Tensor, labels: Tensor,
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
            label = labels[rows, None].clamp(min=0)  # an IGNORED label has weight 0, but gather needs a valid index
            loss -= (text * z.gather(-1, label)).sum()
            # Gradient of the logits [c,V]: (ce + kl) q - kl target - ce onehot(label).
            if teacher_states is None:
                grad = text * z.exp()
            else:
                y = (teacher_states[rows] @ theirs.to(teacher_states.dtype).t()).float().log_softmax(-1)  # [c,V] log p
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
            del z, grad  # free them before the next chunk allocates its own
        ctx.gradients = dhidden, None if dweight is None else dweight.to(weight.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*stored_gradients(ctx, grad), *[None] * 7)


def _divergence(y: Tensor, z: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Returns KL(p || q) of each row [c] from y = log p and z = log q [c,V], and the target [c,V].

    The gradient of the KL with respect to q's logits is q - target.
    """
    p = y.exp()
    if top_k is None or top_k >= y.shape[1]:
        return (p * (y - z)).sum(-1), p
    best, index = y.topk(top_k, dim=-1)  # [c,k]
    own = z.gather(-1, index)  # [c,k]
    # The mass of all other tokens, in logarithms: 1 - sum(best) rounds to 0 where the student is sure, and it is a
    # divisor below.
    y_rest, z_rest = (x.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True) for x in (y, z))  # [c,1]
    kl = (best.exp() * (best - own)).sum(-1) + (y_rest.exp() * (y_rest - z_rest))[:, 0]
    return kl, (z - z_rest + y_rest).exp().scatter_(-1, index, best.exp())


def _within(labels: Tensor, document_starts: Tensor | None, length: int) -> Tensor:
    """Whether each token [b,T] lies within `length` of its document's start, or of the row's start without a mask."""
    position = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return position < length if document_starts is None else position - document_starts.to(labels.device) < length


def taught_rows(
    teacher: TeacherModel, ids: Tensor, attention: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor | str]]:
    """Returns the teacher's ids [b,n] and attention arguments: dense, with no document longer than its trained length.

    Without document starts the rows are cut to that length. With them, longer documents are divided into pieces.
    """
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
    """The mean over the layers of the error of the student's attention, given the teacher's input to the layer.

    The student's attention is computed during the teacher's forward pass, layer by layer, and again in the backward
    pass: only each layer's input is kept.
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

    # On the teacher, `note` records a layer's input [b,n,E]. After its attention, `compare` runs the student's.
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
    """Yields a list that collects the layers' outputs within the block, in order; later recomputation adds none."""
    seen = list[Tensor]()
    handles = [layer.register_forward_hook(lambda module, arguments, output: seen.append(output)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: Tensor, true: Tensor, taught: Tensor) -> Tensor:
    """Squared error of found [b,T,E] from true [b,n,E], summed over taught [b,T], over the mean square of true; fp32.

    Each row has its own mean, so that the sum does not depend on how rows are divided into micro-batches and ranks.
    """
    n = true.shape[1]
    counts = taught[:, :n, None].float()
    error = ((found[:, :n].float() - true.float()) ** 2 * counts).sum((1, 2))  # [b]
    size = (true.float() ** 2 * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)
    return (error / size.clamp(min=torch.finfo(torch.float32).tiny)).sum()
