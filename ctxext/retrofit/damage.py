"""What a layout costs before any training: the divergence of its predictions from the source's own.

All layouts of a model share their weights, so a layout is a chain of decoder layers, each of a kind (model/layout.py),
and two layouts that agree in their first layers share those layers' work. Many layouts are measured in one pass over
the layers: the hidden states of every distinct beginning go from layer to layer, and one layer's weights are in memory
at a time. With the 2 L layouts that differ from the source in one layer a pass applies L² + 2 L - 1 layers instead of
2 L², and what has to fit on the device is a layer, not a model; the hidden states wait on the host.

    n rows   T tokens of a row   E model width   V vocabulary   L layers   H heads   N positions that are compared

Everything is computed in fp32. There is no training here, and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ctxext.model.families import Config, first_layers, initial_value, new_tensors, normalise
from ctxext.model.frequencies import check_realised, rotaries
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind
from ctxext.model.shards import EMBEDDING
from ctxext.model.weights import HEAD
from ctxext.ops.attention import attention_rows
from ctxext.ops.masks import Pattern
from ctxext.progress import CountProgress, ignore
from ctxext.train.loss import chunk_of, token_losses

Layout = tuple[LayerKind, ...]
Weights = Callable[[str], Tensor | None]

STATE_BYTES = 8 << 30  # of hidden states on the host at a time, about; more layouts than fit are measured in turns
BATCH_TOKENS = 4096  # that go through a layer at a time
FIRST_BUCKET = 64  # positions 1..63; from there each bucket is as wide as all before it (evals/perplexity.py)
RETRIEVES = 0.1  # a head with more than this of its attention on the answer counts as one that retrieves


@dataclass(frozen=True)
class Samples:
    """Rows to compare predictions on: text first, then questions with their answers in place.

    ids      int64 [n,T]
    texts    how many of the rows are text
    answers  bool [n,T], where the NEXT token belongs to an answer; none in the text
    needles  bool [n,T], the tokens further up that hold the answer
    """

    ids: Tensor
    texts: int
    answers: Tensor
    needles: Tensor


@dataclass(frozen=True)
class Damage:
    """Mean KL(source || layout) in nats a token; None where there is nothing to average.

    text     over all positions of the text; `buckets` the same by position, as (start, stop, KL): a prediction made
             with start <= tokens before it < stop
    loss     cross entropy of the text above the source's. About `text` on what the model was trained on; on other
             text the two may order layouts differently, since departing from the source need not be to the worse
    answer   over the answers of the questions
    """

    text: float
    loss: float
    answer: float | None
    buckets: tuple[tuple[int, int, float], ...]

    def score(self, share: float) -> float:
        """The text's part and `share` times the answers'."""
        return self.text + share * (self.answer or 0.0)


@dataclass(frozen=True)
class Layers:
    """A model as one empty stock layer of each kind, and a reader of the weights to be put into it.

    decoders  a decoder of one layer for each kind, with its rotations and no norm at its end; weights on meta
    norm      the model's final norm, empty as well
    added     parameters of a layer that the source has not: biases 0, sinks that take nothing
    values    other values for weights of sliding layers, by their names in the checkpoint: sinks and their biases
    """

    config: Config
    source: Layout
    decoders: dict[LayerKind, Any]
    norm: nn.Module
    added: frozenset[str]
    read: Weights
    device: torch.device
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A weight of the checkpoint, fp32, on the device. Raises ModelError when there is none."""
        found = self.read(name)
        if found is None:
            raise ModelError(f"the checkpoint has no {name}")
        return found.to(self.device, torch.float32)

    @property
    def head(self) -> Tensor:
        return self.tensor(EMBEDDING if self.config["tie_word_embeddings"] else HEAD)


def open_layers(
    config: Config,
    source: Layout,
    kinds: Sequence[LayerKind],
    read: Weights,
    device: torch.device,
    *,
    target: str | None = None,
    biases: bool = False,
) -> Layers:
    """The layers of the (normalised) source config as `source` and as any of `kinds`, in stock classes.

    `source` are the kinds its own layers have. `read` gives a tensor by its name in the checkpoint, when it is called:
    model/shards.py's `tensor_reader` streams, a state dict's `get` holds everything. `target` and `biases` are those of
    `hybrid_config`. Raises ModelError for a kind that the target class does not have.
    """
    decoders, first, L = {}, first_layers(config, 1), config["num_hidden_layers"]
    for kind in dict.fromkeys([*source, *kinds]):
        one = normalise(first_layers(hybrid_config(config, [kind] * L, target, biases=biases), 1))
        hf_config = CONFIG_MAPPING[one["model_type"]].from_dict(one)
        hf_config._attn_implementation = attention.register()
        with init_empty_weights(include_buffers=False):
            model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)](hf_config)
        check_realised(model, one)
        decoder = model.get_decoder().eval()
        norm, decoder.norm = decoder.norm, nn.Identity()
        for rotary in rotaries(decoder):
            rotary.to(device)
        decoders[kind] = decoder
    added = frozenset(name.removeprefix("model.layers.0.") for name in new_tensors(first, one))
    return Layers(config, source, decoders, norm, added, read, device)


def final_states(
    layers: Layers, ids: Tensor, layouts: Sequence[Layout], progress: Callable[[], None] = lambda: None
) -> dict[Layout, Tensor]:
    """The hidden states [n,T,E] after the last norm of rows ids [n,T], for each layout, on the CPU."""
    embedded = nn.functional.embedding(ids.to(layers.device), layers.tensor(EMBEDDING)).cpu()
    states: dict[Layout, Tensor] = {(): embedded}
    for index in range(layers.config["num_hidden_layers"]):
        after: dict[Layout, Tensor] = {}
        with weights_of_layer(layers, index):
            for prefix, kinds in _branches(layouts, index).items():
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
    """The damage of each layout; `truth` [n,T,E] are the source's final states (`source_states`).

    Layouts are measured together as far as their hidden states fit in `state_bytes`, about, those that begin alike in
    one turn; two at least.
    """
    groups = _turns(layouts, max(2, state_bytes // truth.nbytes))
    total = sum(len(kinds) for group in groups for i in range(len(group[0])) for kinds in _branches(group, i).values())
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    positions = samples.answers.clone()  # [n,T]: what is compared
    positions[: samples.texts, :-1] = True  # the last token's prediction is of nothing that is in the row
    labels, found = samples.ids.roll(-1, 1)[positions], dict[Layout, Damage]()
    for group in groups:
        states = final_states(layers, samples.ids, group, one_more)
        apart = _apart(truth[positions], [states[layout][positions] for layout in group], labels, layers)
        for layout, values in zip(group, apart, strict=True):
            found[layout] = _damage(values, samples)
    return [found[layout] for layout in layouts]


@torch.no_grad()
def source_states(layers: Layers, ids: Tensor) -> Tensor:
    """The final states [n,T,E] of the source itself, which every layout is compared with."""
    return final_states(layers, ids, [layers.source])[layers.source]


def answer_loss(layers: Layers, samples: Samples, truth: Tensor) -> float | None:
    """The source's own loss at the answers, nats a token: whether it can do what it is asked. None: none are asked."""
    if not samples.answers.any():
        return None
    labels = samples.ids.roll(-1, 1)[samples.answers].to(layers.device)
    return float(token_losses(truth[samples.answers].to(layers.device), layers.head, labels).mean())


@torch.no_grad()
def head_scores(layers: Layers, samples: Samples) -> Tensor | None:
    """The retrieval-head scores of the source, fp32 [L,H]: the attention mass that the last token of the question puts
    on the tokens that hold the answer, mean over the questions (arXiv 2606.15378; FACTS of its code: the position
    before the answer, not the entropy and not the trace through training). None where there are no questions.
    """
    if not samples.answers.any():
        return None
    ids, needles = samples.ids[samples.texts :], samples.needles[samples.texts :].to(layers.device)
    last = samples.answers[samples.texts :].int().argmax(1).to(layers.device)  # [n]: the one before the answer
    states = nn.functional.embedding(ids.to(layers.device), layers.tensor(EMBEDDING)).cpu()
    scores = []
    for index, kind in enumerate(layers.source):
        masses: list[Tensor] = []
        with weights_of_layer(layers, index):
            states = apply_layer(
                layers, kind, states, lambda rows, m=masses: partial(_mass, m, last[rows], needles[rows])
            )
        scores.append(torch.cat(masses).mean(0))
    return torch.stack(scores)


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
    """Add to `masses` what [B,H] of the attention of query `at` [B] falls on the `wanted` keys [B,T]."""
    chosen = query[torch.arange(len(at), device=at.device), :, at][:, :, None]  # [B,H,1,D]
    share = attention_rows(chosen, key, at[:, None], sliding_window=pattern.sliding_window, scale=scaling)[:, :, 0]
    masses.append((share * wanted[:, None]).sum(-1).cpu())


@contextmanager
def weights_of_layer(layers: Layers, index: int) -> Iterator[None]:
    """Layer `index`'s weights in the layers of every kind, the same tensors in all, and gone afterwards."""
    # The checkpoint's weights, and what the class has besides.
    empty = dict(next(iter(layers.decoders.values())).layers[0].named_parameters())
    tensors = {}
    for name, parameter in empty.items():
        if name in layers.added:
            tensors[name] = torch.full(parameter.shape, initial_value(name), device=layers.device)
        else:
            tensors[name] = layers.tensor(f"model.layers.{index}.{name}")
    # Sliding layers have fitted values in place of some of them.
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
    """The layer that is loaded, as `kind`, over states [n,T,E]; `watch(rows)` watches its attention to those rows."""
    decoder, after = layers.decoders[kind], torch.empty_like(before)
    for rows in row_batches(before):
        watching = {} if watch is None else {"watch": watch(rows)}
        states = before[rows].to(layers.device)
        after[rows] = decoder(inputs_embeds=states, use_cache=False, **watching).last_hidden_state.cpu()
    return after


def row_batches(states: Tensor) -> Iterator[slice]:
    step = max(1, BATCH_TOKENS // states.shape[1])
    return (slice(start, start + step) for start in range(0, len(states), step))


def _branches(layouts: Sequence[Layout], index: int) -> dict[Layout, list[LayerKind]]:
    """Each distinct beginning of `index` layers, with the kinds that follow it."""
    branches: dict[Layout, dict[LayerKind, None]] = {}
    for layout in layouts:
        branches.setdefault(layout[:index], {})[layout[index]] = None
    return {prefix: list(kinds) for prefix, kinds in branches.items()}


def _turns(layouts: Sequence[Layout], most: int) -> list[list[Layout]]:
    """The distinct layouts, those that begin alike together, in groups of at most `most`."""
    distinct = sorted(set(layouts), key=lambda layout: [(kind.use_rope, kind.sliding_window or 0) for kind in layout])
    return [distinct[start : start + most] for start in range(0, len(distinct), most)]


def _apart(truth: Tensor, others: Sequence[Tensor], labels: Tensor, layers: Layers) -> Tensor:
    """How far predictions from final states [N,E] are from those of `truth`, for each of `others`, fp32
    [len(others),2,N]: KL(truth || other), and how much less probable `other` thinks the label, in nats.
    """
    found, head = torch.empty(len(others), 2, len(truth)), layers.head
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
    """The means of what `_apart` found [2,N]: first all positions of the text, then those of the answers."""
    T = samples.ids.shape[1] - 1
    text, loss = values[:, : samples.texts * T].double().view(2, samples.texts, T).mean(1)  # [T] each
    answers = values[0, samples.texts * T :].double()
    buckets = []
    for _, group in groupby(range(T), key=lambda position: max(0, ((position + 1) // FIRST_BUCKET).bit_length())):
        places = list(group)
        buckets.append((places[0] + 1, places[-1] + 2, float(text[places].mean())))
    return Damage(
        float(text.mean()), float(loss.mean()), float(answers.mean()) if len(answers) else None, tuple(buckets)
    )
