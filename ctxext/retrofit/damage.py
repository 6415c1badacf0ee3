"""Measures the damage of a layout before any training: the divergence of its predictions from those of the source.

All layouts of a model share their weights. A layout is a chain of decoder layers, each of a kind (model/layout.py), and
two layouts with the same first layers share the computation of these layers. Many layouts are measured in one pass over
the layers: the hidden states of every distinct prefix go from layer to layer, and only one layer's weights are in
memory at a time. For the 2 L layouts that differ from the source in one layer, a pass applies L² + 2 L - 1 layers
instead of 2 L². Only one layer has to fit on the device, not the model; the hidden states are stored on the host.

    n rows   T tokens of a row   E model width   V vocabulary   L layers   H heads   N positions that are compared

All computation is in fp32. There is no training here, and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from ctxext.errors import ModelError
from ctxext.model import attention
from ctxext.model.frequencies import check_realised, rotaries
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind
from ctxext.model.model_config import ModelConfig, initial_value, new_tensors
from ctxext.model.shards import EMBEDDING
from ctxext.model.weights import HEAD
from ctxext.ops.masks import Pattern
from ctxext.ops.naive_attention import attention_rows
from ctxext.progress import CountProgress, ignore
from ctxext.train.loss import chunk_of, token_losses

Layout = tuple[LayerKind, ...]
Weights = Callable[[str], Tensor | None]

STATE_BYTES = 8 << 30  # hidden states on the host at a time, about; further layouts are measured in later groups
BATCH_TOKENS = 4096  # tokens per forward of a layer
FIRST_BUCKET = 64  # positions 1..63; each later bucket is as wide as all before it (evals/perplexity.py)
MIN_SHARE = 0.1  # a head with a larger share of attention on the answer counts as a retrieval head


@dataclass(frozen=True)
class Samples:
    """Rows for the comparison of predictions: text first, then questions with their answers in place.

    ids      int64 [n,T]
    texts    how many of the rows are text
    answers  bool [n,T], True where the NEXT token belongs to an answer; False in the text
    needles  bool [n,T], True for the earlier tokens that contain the answer
    """

    ids: Tensor
    texts: int
    answers: Tensor
    needles: Tensor


@dataclass(frozen=True)
class Damage:
    """Mean KL(source || layout) in nats a token; None where there is nothing to average.

    text     over all positions of the text
    buckets  the same by position, as (start, stop, KL): predictions with start <= number of preceding tokens < stop
    loss     cross entropy of the text minus the source's. Close to `text` on text like the training data. On other text
             the two may order layouts differently, since a difference from the source is not always worse
    answer   over the answers of the questions
    """

    text: float
    loss: float
    answer: float | None
    buckets: tuple[tuple[int, int, float], ...]

    def score(self, share: float) -> float:
        """Returns the damage on the text plus `share` times the damage on the answers."""
        return self.text + share * (self.answer or 0.0)


@dataclass(frozen=True)
class Layers:
    """A model as one empty stock layer of each kind, and a reader for the weights to load into it.

    decoders  one-layer decoders by kind, with their rotations and without a final norm; weights on the meta device
    norm      the model's final norm, also empty
    added     names of layer parameters that the source does not have: biases of 0, sinks that take nothing
    values    replacement weights for sliding layers, by their names in the checkpoint: sinks and their biases
    """

    config: ModelConfig
    source: Layout
    decoders: dict[LayerKind, Any]
    norm: nn.Module
    added: frozenset[str]
    read: Weights
    device: torch.device
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Returns a weight of the checkpoint, fp32, on the device. Raises ModelError if there is none."""
        found = self.read(name)
        if found is None:
            raise ModelError(f"the checkpoint has no {name}")
        return found.to(self.device, torch.float32)

    @property
    def head(self) -> Tensor:
        """The weight of the output head [V,E], fp32."""
        return self.tensor(EMBEDDING if self.config.shape.tied else HEAD)


def open_layers(
    config: ModelConfig,
    source: Layout,
    kinds: Sequence[LayerKind],
    read: Weights,
    device: torch.device,
    *,
    target: str | None = None,
    biases: bool = False,
) -> Layers:
    """Returns the layers of a source config, as `source` and as any of `kinds`, in stock classes.

    `source` are the kinds of the source's own layers. `read` returns a tensor by its checkpoint name when it is called:
    `tensor_reader` of model/shards.py streams from disk, a state dict's `get` holds all in memory. `target` and
    `biases` are arguments of `hybrid_config`. Raises ModelError for a kind that the target class does not support.
    """
    decoders, first, L = {}, config.first_layers(1), config.shape.num_layers
    for kind in dict.fromkeys([*source, *kinds]):
        # A model of one layer of this kind, with weights on meta: only the rotations are real.
        one = hybrid_config(config, [kind] * L, target, biases=biases).first_layers(1)
        hf_config = CONFIG_MAPPING[one.family.name].from_dict(deepcopy(one.fields))
        hf_config._attn_implementation = attention.register()
        with init_empty_weights(include_buffers=False):
            model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)](hf_config)
        check_realised(model, one)
        decoder = model.get_decoder().eval()
        # The final norm follows the last layer only; final_states applies it.
        norm, decoder.norm = decoder.norm, nn.Identity()
        for rotary in rotaries(decoder):
            rotary.to(device)
        decoders[kind] = decoder
    added = frozenset(name.removeprefix("model.layers.0.") for name in new_tensors(first, one))
    return Layers(config, source, decoders, norm, added, read, device)


def final_states(
    layers: Layers, ids: Tensor, layouts: Sequence[Layout], progress: Callable[[], None] = lambda: None
) -> dict[Layout, Tensor]:
    """Returns the hidden states [n,T,E] after the final norm for rows ids [n,T], for each layout, on the CPU."""
    embedded = nn.functional.embedding(ids.to(layers.device), layers.tensor(EMBEDDING)).cpu()
    # Hidden states by prefix of layer kinds. All layouts share the empty prefix, the embeddings.
    states: dict[Layout, Tensor] = {(): embedded}
    for index in range(layers.config.shape.num_layers):
        after: dict[Layout, Tensor] = {}
        with weights_of_layer(layers, index):
            for prefix, kinds in _branches(layouts, index).items():
                # Drop the states of a prefix once its successors are computed, to save host memory.
                before = states.pop(prefix)
                for kind in kinds:
                    after[(*prefix, kind)] = apply_layer(layers, kind, before)
                    progress()
        states = after
    layers.norm.load_state_dict({"weight": layers.tensor("model.norm.weight")}, assign=True)
    for state in states.values():
        for rows in row_batches(state):
            state[rows] = layers.norm(state[rows].to(layers.device)).cpu()
    return states


@torch.no_grad()
def measure(
    layers: Layers,
    samples: Samples,
    layouts: Sequence[Layout],
    truth: Tensor,
    progress: CountProgress = ignore,
    state_bytes: int = STATE_BYTES,
) -> list[Damage]:
    """Returns the damage of each layout. `truth` [n,T,E] are the source's final states (`source_states`).

    Layouts are measured together while their hidden states fit into `state_bytes`, approximately; at least two at a
    time. Layouts with the same first layers share a group where possible.
    """
    groups = _groups(layouts, max(2, state_bytes // truth.nbytes))
    # The number of layer applications in all groups, for the progress.
    total = sum(len(kinds) for group in groups for i in range(len(group[0])) for kinds in _branches(group, i).values())
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    positions = samples.answers.clone()  # [n,T], the compared positions
    positions[: samples.texts, :-1] = True  # the last token has no next token in its row
    # The label of a position is the next token.
    labels, found = samples.ids.roll(-1, 1)[positions], dict[Layout, Damage]()
    for group in groups:
        states = final_states(layers, samples.ids, group, one_more)
        apart = _distances(truth[positions], [states[layout][positions] for layout in group], labels, layers)
        for layout, values in zip(group, apart, strict=True):
            found[layout] = _damage(values, samples)
    return [found[layout] for layout in layouts]


@torch.no_grad()
def source_states(layers: Layers, ids: Tensor) -> Tensor:
    """Returns the final states [n,T,E] of the source itself, with which every layout is compared."""
    return final_states(layers, ids, [layers.source])[layers.source]


def answer_loss(layers: Layers, samples: Samples, truth: Tensor) -> float | None:
    """Returns the source's own loss at the answers in nats a token; None without questions.

    It shows whether the source can answer the questions at all.
    """
    if not samples.answers.any():
        return None
    labels = samples.ids.roll(-1, 1)[samples.answers].to(layers.device)
    return float(token_losses(truth[samples.answers].to(layers.device), layers.head, labels).mean())


@torch.no_grad()
def head_scores(layers: Layers, samples: Samples) -> Tensor | None:
    """Returns the retrieval-head scores of the source, fp32 [L,H]; None without questions.

    A score is the attention mass that the last token of the question puts on the tokens with the answer, averaged over
    the questions (arXiv 2606.15378; second-hand, from its code: the position before the answer, not the entropy and not
    the trace through training).
    """
    return None if not samples.answers.any() else head_scores_and_states(layers, samples)[0]


@torch.no_grad()
def head_scores_and_states(layers: Layers, samples: Samples) -> tuple[Tensor, Tensor]:
    """Returns `head_scores` and the source's final states [n,T,E] of the questions, from one pass."""
    ids, needles = samples.ids[samples.texts :], samples.needles[samples.texts :].to(layers.device)
    # argmax finds the first True: the position that predicts the first answer token.
    last = samples.answers[samples.texts :].int().argmax(1).to(layers.device)  # [n], the position before the answer
    states = nn.functional.embedding(ids.to(layers.device), layers.tensor(EMBEDDING)).cpu()
    scores = []
    for index, kind in enumerate(layers.source):
        masses: list[Tensor] = []
        with weights_of_layer(layers, index):
            states = apply_layer(
                layers, kind, states, lambda rows, m=masses: partial(_mass, m, last[rows], needles[rows])
            )
        scores.append(torch.cat(masses).mean(0))
    layers.norm.load_state_dict({"weight": layers.tensor("model.norm.weight")}, assign=True)
    return torch.stack(scores), layers.norm(states.to(layers.device)).cpu()


def _mass(
    masses: list[Tensor],
    at: Tensor,
    wanted: Tensor,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    pattern: Pattern,
    scaling: float | None,
) -> None:
    """Appends to `masses` the attention mass [B,H] of the queries at `at` [B] on the `wanted` keys [B,T]."""
    # Attention rows of one query per sequence, not the whole T x T matrix.
    chosen = query[torch.arange(len(at), device=at.device), :, at][:, :, None]  # [B,H,1,D]
    share = attention_rows(chosen, key, at[:, None], sliding_window=pattern.sliding_window, scale=scaling)[:, :, 0]
    masses.append((share * wanted[:, None]).sum(-1).cpu())


@contextmanager
def weights_of_layer(layers: Layers, index: int) -> Iterator[None]:
    """Loads layer `index`'s weights into the layers of all kinds, sharing tensors, and frees them afterwards."""
    # The checkpoint's weights, and initial values for parameters that only the new class has.
    empty = dict(next(iter(layers.decoders.values())).layers[0].named_parameters())
    tensors = {}
    for name, parameter in empty.items():
        if name in layers.added:
            tensors[name] = torch.full(parameter.shape, initial_value(name), device=layers.device)
        else:
            tensors[name] = layers.tensor(f"model.layers.{index}.{name}")
    # Sliding layers use fitted values for some of them.
    fitted = {name: layers.values.get(f"model.layers.{index}.{name}") for name in empty}
    sliding = tensors | {name: value.to(layers.device) for name, value in fitted.items() if value is not None}
    for kind, decoder in layers.decoders.items():
        decoder.layers[0].load_state_dict(tensors if kind.sliding_window is None else sliding, assign=True)
    del tensors, sliding, fitted
    try:
        yield
    finally:
        for decoder in layers.decoders.values():
            decoder.layers[0].to("meta")


def apply_layer(
    layers: Layers, kind: LayerKind, before: Tensor, watch: Callable[[slice], Callable[..., None]] | None = None
) -> Tensor:
    """Applies the loaded layer, as `kind`, to states [n,T,E]. `watch(rows)` returns a callback for their attention."""
    decoder, after = layers.decoders[kind], torch.empty_like(before)
    for rows in row_batches(before):
        watching = {} if watch is None else {"watch": watch(rows)}
        states = before[rows].to(layers.device)
        after[rows] = decoder(inputs_embeds=states, use_cache=False, **watching).last_hidden_state.cpu()
    return after


def row_batches(states: Tensor) -> Iterator[slice]:
    """Yields the rows of states [n,T,E] in slices of at most BATCH_TOKENS tokens, at least one row each."""
    step = max(1, BATCH_TOKENS // states.shape[1])
    return (slice(start, start + step) for start in range(0, len(states), step))


def _branches(layouts: Sequence[Layout], index: int) -> dict[Layout, list[LayerKind]]:
    """Each distinct prefix of `index` layers, with the kinds that follow it."""
    branches: dict[Layout, dict[LayerKind, None]] = {}
    for layout in layouts:
        branches.setdefault(layout[:index], {})[layout[index]] = None
    return {prefix: list(kinds) for prefix, kinds in branches.items()}


def _groups(layouts: Sequence[Layout], most: int) -> list[list[Layout]]:
    """The distinct layouts in groups of at most `most`; layouts with the same first layers are next to each other."""
    distinct = sorted(set(layouts), key=lambda layout: [(kind.use_rope, kind.sliding_window or 0) for kind in layout])
    return [distinct[start : start + most] for start in range(0, len(distinct), most)]


def _distances(truth: Tensor, others: Sequence[Tensor], labels: Tensor, layers: Layers) -> Tensor:
    """The distance of predictions from final states `others` to those from `truth` [N,E], fp32 [len(others),2,N].

    The first is KL(truth || other), the second the loss of the label under `other` minus that under `truth`, in nats.
    """
    found, head = torch.empty(len(others), 2, len(truth)), layers.head
    # Logits are computed in chunks of c positions, since [N,V] would not fit.
    chunk = chunk_of(head)
    for start in range(0, len(truth), chunk):
        rows = slice(start, start + chunk)
        label = labels[rows, None].to(layers.device)  # [c,1]
        meant = log_softmax(truth[rows].to(layers.device) @ head.t(), -1)  # [c,V]
        for values, other in zip(found, others, strict=True):
            given = log_softmax(other[rows].to(layers.device) @ head.t(), -1)
            values[0, rows] = kl_div(given, meant, reduction="none", log_target=True).sum(-1).cpu()
            values[1, rows] = (meant.gather(-1, label) - given.gather(-1, label))[:, 0].cpu()
    return found


def _damage(values: Tensor, samples: Samples) -> Damage:
    """The means of the values [2,N] from `_distances`: first all positions of the text, then those of the answers."""
    T = samples.ids.shape[1] - 1
    text, loss = values[:, : samples.texts * T].double().view(2, samples.texts, T).mean(1)  # [T] each
    answers = values[0, samples.texts * T :].double()
    buckets = []
    # Bucket widths double: 1..63, 64..127, 128..255 and so on.
    for _, group in groupby(range(T), key=lambda position: max(0, ((position + 1) // FIRST_BUCKET).bit_length())):
        places = list(group)
        buckets.append((places[0] + 1, places[-1] + 2, float(text[places].mean())))
    return Damage(
        float(text.mean()), float(loss.mean()), float(answers.mean()) if len(answers) else None, tuple(buckets)
    )
