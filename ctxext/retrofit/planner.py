"""The layer planner: calibration text and questions, the damage of each layer and of each choice, and the report.

It runs forward passes only, without training, and so measures the damage of a layout before healing. How well a layout
heals is a different question. Whether the order of damages is the same after healing is not claimed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.data.files import distinct, recorded
from ctxext.errors import DataError, InputError, ModelError
from ctxext.machine.gpu import default_device
from ctxext.model.convert import ConversionPlan
from ctxext.model.ids import check_ids
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.load import load_tokenizer
from ctxext.model.source import ModelSource
from ctxext.model.weights import only_pickles
from ctxext.ops.cost import forward_flops, kv_cache_bytes
from ctxext.progress import CountProgress, Progress, ignore
from ctxext.retrofit.calibration import joined
from ctxext.retrofit.damage import MIN_SHARE, Damage, Layers, Samples, answer_loss, head_scores, measure, source_states
from ctxext.retrofit.fitted_sinks import open_conversion, sinks_of_windows
from ctxext.retrofit.layers import FIXED, Full, Request, fixed_choices, search, strongest
from ctxext.retrofit.retrieval import MAX_ANSWER_LOSS, MIN_QUESTIONS, with_questions
from ctxext.units import counted, format_bytes, format_flops, format_tokens

ANSWER_SHARE = 0.05  # weight in a score, as if one token in twenty were retrieved. A convention, not a measurement
READ_AHEAD = 8  # so many times the calibration tokens are read, so that rows come from several documents


@dataclass(frozen=True)
class LayerFacts:
    """Measurements of one layer in the source.

    `window`: the damage of giving this layer the window, with all else unchanged. `full`: the damage of making it a
    full layer of the layout (without RoPE if that layer has none). Both are None if layers are chosen by their heads.
    `heads`: the retrieval scores of its heads.
    """

    layer: int
    window: Damage | None
    full: Damage | None
    heads: tuple[float, ...] | None


@dataclass(frozen=True)
class Measured:
    """One choice of full layers: its damage and its cost. Bytes and FLOPs are of one row of `length` tokens."""

    full: Full
    names: tuple[str, ...]
    damage: Damage
    score: float
    kv_bytes: int
    kv_share: float
    flops: int


@dataclass(frozen=True)
class LayerPlan:
    """The planner's choice and all measurements. `share` is the weight of the answers' divergence in a score."""

    kinds: tuple[LayerKind, ...]
    chosen: Measured
    measured: tuple[Measured, ...]
    layers: tuple[LayerFacts, ...]
    request: Request
    texts: int
    questions: int
    share: float
    source_answer_loss: float | None
    exhaustive: bool
    seconds: float
    read: tuple[dict[str, Any], ...] = ()  # of the calibration text (data/files.py, Reading)

    HEADER = ("full layers", "k", "KV cache", "share", "forward", "text", "answers", "score", "loss", "")
    EXPLAIN = ("layer", "window: text", "answers", "as full: text", "answers", "best head", f"heads > {MIN_SHARE}")

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        return {
            **asdict(self),
            "kinds": pattern_text(self.kinds),
            "measured": [asdict(choice) for choice in self.measured],
        }

    def facts(self) -> dict[str, Any]:
        """Returns the part for the conversion's manifest; everything is in retrofit.json."""
        return {
            "full_layers": list(self.chosen.full),
            "score": self.chosen.score,
            "damage": asdict(self.chosen.damage),
            "measured": len(self.measured),
            "exhaustive": self.exhaustive,
            "calibration": self.request.calibration,
            "read": list(self.read),
            "answer_share": self.share,
        }

    def frontier(self) -> list[Measured]:
        """Returns the best choice of each number of full layers, and every fixed pattern, ordered by KV cache."""
        best = {len(c.full): c for c in sorted(self.measured, key=lambda c: (-c.score, c.full))}
        shown = {choice.full: choice for choice in (*best.values(), *(c for c in self.measured if c.names))}
        return sorted(shown.values(), key=lambda c: (c.kv_bytes, c.score))

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table of choices, for HEADER."""
        return [
            (
                ",".join(map(str, c.full)) or "none",
                str(len(c.full)),
                format_bytes(c.kv_bytes),
                f"{100 * c.kv_share:.1f}%",
                format_flops(c.flops),
                f"{c.damage.text:.4f}",
                _shown(c.damage.answer),
                f"{c.score:.4f}",
                f"{c.damage.loss:+.4f}",
                ", ".join([*(["chosen"] if c.full == self.chosen.full else []), *c.names]),
            )
            for c in self.frontier()
        ]

    def explain(self) -> list[tuple[str, ...]]:
        """Returns the table of layers, for EXPLAIN."""
        return [
            (
                str(facts.layer),
                *(
                    _shown(value)
                    for alone in (facts.window, facts.full)
                    for value in ((alone.text, alone.answer) if alone else (None, None))
                ),
                _shown(max(facts.heads) if facts.heads else None),
                str(sum(score > MIN_SHARE for score in facts.heads)) if facts.heads else "-",
            )
            for facts in self.layers
        ]

    def notes(self) -> list[str]:
        """Returns sentences about how the measurements were made."""
        r = self.request
        where = "the embedded corpus's training part" if r.calibration == EMBEDDED else r.calibration
        how = "all possible ones" if self.exhaustive else "greedy, with swaps"
        if r.method == "retrieval":
            how = "the choice and fixed patterns of as many full layers"
        lines = [
            f"{len(self.measured)} layouts measured ({how}) on {self.texts} x {r.row_tokens} tokens of {where}, and on "
            f"{counted(self.questions, 'passkey')} in it",
            "text, answers: KL to the source's predictions; loss: on text, above the source's; nats a token, "
            f"before any healing; KV cache and forward are for {format_tokens(r.length)} tokens",
        ]
        if r.method == "retrieval":
            lines.append(
                "chosen: the layers whose heads attend most to the passkeys, summed over the heads (--explain)"
            )
        if not r.full:
            lines.append("no full layer: the model can retrieve nothing further back than the window")
        if self.source_answer_loss is None:
            return [*lines, f"no passkeys: they do not fit in {r.row_tokens} tokens, so retrieval was not measured"]
        if not self.share:
            return [
                *lines,
                f"the source's own loss at the answers is {self.source_answer_loss:.2f} nats a token: it does not "
                "retrieve, so that the score counts text only",
            ]
        return [*lines, f"score = text + {self.share:g} x answers"]


def choose_layers(
    plan: ConversionPlan,
    request: Request,
    *,
    progress: Progress = ignore,
    say: Callable[[str], None] = lambda line: None,
    device: str | None = None,
) -> LayerPlan:
    """Chooses the full layers of a conversion by measuring. `say` gets a report of the text that was read.

    Raises DataError for too little text, ModelError for weights that cannot be streamed and for a token without a row.
    """
    began = time.monotonic()
    # The two kinds of layers of the new layout.
    source, window = plan.source, LayerKind(True, plan.hybrid.sliding_window)
    full = LayerKind(plan.hybrid.full_letter == "F", None)
    _refuse_pickles(source)
    where = torch.device(device or default_device())
    with recorded() as began_reading:
        samples = calibration_samples(load_tokenizer(source.directory), request, window.sliding_window or 0)
    read = distinct(began_reading)
    for line in (line for one in read for line in one.lines()):
        say(f"calibration: {line}")
    # All ids need a row in the embeddings; rows may be shorter than requested if the text is short.
    check_ids([int(samples.ids.max())], source.config.shape.vocab_size, source.name)
    request = replace(request, row_tokens=samples.ids.shape[1])
    layers = open_conversion(plan, [window, full], where)
    progress("the source itself", 0, 1)
    # The final states of the source, which every layout is compared with.
    truth = source_states(layers, samples.ids)
    # A conversion would fit sinks to sliding layers, so that they are measured with them.
    if values := sinks_of_windows(plan, layers, window, request.calibration):
        say("sliding layers are measured with fitted sinks")
        layers = replace(layers, values=values)
    # Answers count only if the source itself can retrieve them.
    loss = answer_loss(layers, samples, truth)
    share = ANSWER_SHARE if loss is not None and loss <= MAX_ANSWER_LOSS else 0.0
    L, found = len(source.kinds), dict[Full, Damage]()

    def score(choices: Sequence[Full]) -> list[float]:
        layouts = [tuple(full if i in choice else window for i in range(L)) for choice in choices]
        damages = measure(layers, samples, layouts, truth, lambda *n: progress("layouts", *n))
        found.update(zip(choices, damages, strict=True))
        return [damage.score(share) for damage in damages]

    if request.method == "retrieval":
        facts = retrieval_facts(layers, samples, loss, source.name)
        result = strongest(L, request.full, [sum(each.heads or ()) for each in facts], score)
    else:
        facts = layer_facts(layers, samples, truth, window, full, lambda *n: progress("each layer by itself", *n))
        # First estimates for the search: how much each layer gains by staying full.
        gains = [each.window.score(share) - each.full.score(share) for each in facts if each.window and each.full]
        result = search(L, request.full, gains, score)
    measured = tuple(_measured(plan, request, choice, found[choice], share) for choice in result.measured)
    return LayerPlan(
        kinds=tuple(full if i in result.best else window for i in range(L)),
        chosen=next(choice for choice in measured if choice.full == result.best),
        measured=measured,
        layers=facts,
        request=request,
        texts=samples.texts,
        questions=len(samples.ids) - samples.texts,
        share=share,
        source_answer_loss=loss,
        exhaustive=result.exhaustive,
        seconds=round(time.monotonic() - began, 2),
        read=tuple(one.as_dict() for one in read),
    )


def _refuse_pickles(source: ModelSource) -> None:
    if only_pickles(source.directory):
        raise ModelError(
            f"{source.name}: the planner needs safetensors files, and this model has only pickled weights",
            hint="give --full-layers by number, or save the model as safetensors first",
        )


def layer_facts(
    layers: Layers,
    samples: Samples,
    truth: Tensor,
    window: LayerKind,
    full: LayerKind,
    progress: CountProgress = ignore,
) -> tuple[LayerFacts, ...]:
    """Measures each layer alone: the damage of the 2 L layouts that differ in one layer, and its heads."""
    L, heads = len(layers.source), head_scores(layers, samples)
    changed = [(*layers.source[:i], kind, *layers.source[i + 1 :]) for kind in (window, full) for i in range(L)]
    damage = measure(layers, samples, changed, truth, progress)
    return tuple(
        LayerFacts(i, damage[i], damage[L + i], None if heads is None else tuple(heads[i].tolist())) for i in range(L)
    )


def retrieval_facts(layers: Layers, samples: Samples, loss: float | None, name: str) -> tuple[LayerFacts, ...]:
    """Returns the retrieval scores of each layer's heads. `loss` is the source's own at the answers.

    Raises InputError if the source does not retrieve the passkeys: its heads then show nothing.
    """
    heads = head_scores(layers, samples)
    if heads is None or loss is None or loss > MAX_ANSWER_LOSS:
        why = "they do not fit in its rows" if loss is None else f"its loss at the answers is {loss:.2f} nats a token"
        raise InputError(
            f"--full-layers retrieval: {name} does not retrieve passkeys: {why}", hint="use --full-layers auto"
        )
    return tuple(LayerFacts(i, None, None, tuple(row.tolist())) for i, row in enumerate(heads))


def calibration_samples(tokenizer: Any, request: Request, window: int) -> Samples:
    """Returns rows of text, evenly spread over the text that is read, and passkeys hidden in that text.

    There are as many passkeys as rows, at least MIN_QUESTIONS. They are at all depths that are further from the
    question than the window, if a row is long enough. Raises DataError for text shorter than two windows (or than one
    row, if that is less): such text would show nothing of what a window hides.
    """
    T, source = request.row_tokens, request.calibration
    documents = read_documents(source)
    ids = joined(documents, tokenizer, READ_AHEAD * request.tokens)
    if len(ids) < min(2 * window, T):
        raise DataError(
            f"--calibration {source}: {format_tokens(len(ids))} tokens; a window of {format_tokens(window)} can be "
            f"measured in texts of at least {format_tokens(min(2 * window, T))}",
            hint="give longer text, or a smaller --sliding-window",
        )
    # Rows of T tokens at evenly spaced places of the text.
    T = min(T, len(ids))
    places = len(ids) // T
    count = min(places, request.tokens // T)
    text = torch.stack([ids[(i * places // count) * T :][:T] for i in range(count)])
    return with_questions(text, tokenizer, ids.tolist(), window, max(MIN_QUESTIONS, count))


def _measured(plan: ConversionPlan, request: Request, choice: Full, damage: Damage, share: float) -> Measured:
    source, at = plan.source, request.length
    windows = [None if i in choice else plan.hybrid.sliding_window for i in range(len(source.kinds))]
    size = kv_cache_bytes(source.shape, windows, at, plan.value_bytes)
    whole = kv_cache_bytes(source.shape, [kind.sliding_window for kind in source.kinds], at, plan.value_bytes)
    names = [name for name, full in fixed_choices(len(windows), request.full).items() if full == choice]
    patterns = [name.replace("N", plan.hybrid.full_letter) for name in names if name in FIXED]
    flops = forward_flops(source.shape, [(window, None) for window in windows], at)
    return Measured(choice, tuple(patterns or names[:1]), damage, damage.score(share), size, size / whole, flops)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
