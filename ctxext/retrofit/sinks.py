"""The first token's part in attention, moved into learned sinks and biases: in closed form, without training.

Many pretrained models put much of each head's attention on the first token (StreamingLLM, arXiv 2309.17453). A sliding
window hides it, and the model breaks. GraniteSWA has a learned sink for each head: one more entry in the softmax, with
a logit s of its own and the value zero (ops/backends/sink_logits.py).

The first token's logit hardly depends on the query, so that it can be a constant. Its value v0 is not zero, which
biases make up for. With p the share of the sink and o what attention over the window alone gives,

    wanted                  p v0 + (1 - p) o  =  v0 + (1 - p) (o - v0)
    s                       the mean over the queries beyond the window of scale * q . k0, RoPE as it is there
    v_proj.bias   -= v0     the weights of a softmax sum to 1, so attention gives o - v0
    o_proj.bias   += W_o v0 (the heads of v0 one after the other)

This is exact for a model whose first token has a constant logit, but for the first W tokens of a text: they see the
first token itself and the sink. The first token's own output stays v0. The derivation and its use are ours.

Full layers keep sinks that take nothing. No gradient is computed: one pass over the source, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.data.prompts import framing
from ctxext.errors import InputError
from ctxext.model.convert import ConversionPlan, FittedSinks, may_fit_sinks
from ctxext.model.families import FAMILIES
from ctxext.model.ids import check_ids
from ctxext.model.layout import LayerKind
from ctxext.model.load import load_tokenizer
from ctxext.model.shards import EMBEDDING, tensor_reader
from ctxext.model.weights import only_pickles
from ctxext.ops.attention import attention_rows
from ctxext.ops.masks import Pattern
from ctxext.retrofit.calibration import joined
from ctxext.retrofit.damage import Layers, Samples, apply_layer, measure, open_layers, weights_of_layer
from ctxext.train.sinks import EVERY, HANGS

TOKENS, ROW_TOKENS = 4096, 1024  # of calibration text in all and of a row; rows are longer where a window is large
Say = Callable[[str], None]


@dataclass(frozen=True)
class FirstToken:
    """What the source does with its first token: for each layer its share of the attention (mean over heads and over
    the later half of the queries), logits [H] of the queries beyond the window, and values [K,D]."""

    shares: tuple[float, ...]
    logits: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    states: Tensor

    @property
    def share(self) -> float:
        return sum(self.shares) / len(self.shares)


def fit_sinks(
    plan: ConversionPlan, *, say: Say = lambda line: None, calibration: str = EMBEDDED, device: str | None = None
) -> FittedSinks | None:
    """Sinks and biases for the sliding layers of a conversion; None where the model does not hang on its first token,
    or where no window hides it from any query of the calibration rows.

    The loss of the text above the source's is measured before and after. Where the class has no sinks the result is
    None, and `say` gets a warning with the class that has them; for windows up to half of a row, with the loss too.
    Weights that are pickles alone are not read: None. Raises ModelError for weights that are not there and for a token
    without a row, InputError for a `calibration` that cannot be read or has less than two windows.
    """
    source, windows = plan.source, {kind.sliding_window for kind in plan.kinds} - {None}
    window = min(windows, default=None)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if window is None or window >= source.usable_length or only_pickles(source.directory):
        return None
    if not FAMILIES[plan.config["model_type"]].sinks:
        _warn(plan, window, say, where)
        return None
    # Does the model hang on its first token? One pass over the source says.
    ids = _rows(plan, window, calibration)
    least = min(2 * window, _row_tokens(plan, window))
    if calibration != EMBEDDED and ids.shape[1] < least:
        raise InputError(
            f"--calibration {calibration}: {ids.shape[1]:,} tokens; to fit sinks for windows of {window:,} it has to "
            f"have {least:,}",
            hint="give more text, leave --calibration out, or add --sinks none",
        )
    if ids.shape[1] <= window:
        say(f"sinks: the calibration text has {ids.shape[1]:,} tokens, a window {window:,}: nothing is hidden in it")
        return None
    check_ids([int(ids.max())], source.config["vocab_size"], source.name)
    layers = open_conversion(plan, plan.kinds, where)
    first = first_token(layers, ids, window)
    if not first.share >= HANGS:  # NaN included
        say(f"{first.share:.1%} of the attention is on the first token: no sinks are needed")
        return None
    values = sink_values(layers, plan.kinds, first)
    if not values:
        return None
    # The loss under the layout without and with them, on the text that they were fitted to.
    before, after = (_loss(fitted, ids, plan, first) for fitted in (layers, replace(layers, values=values)))
    facts = {
        "first_token_share": first.share,
        "layers": [
            i for i, (kind, own) in enumerate(zip(plan.kinds, source.kinds, strict=True)) if _narrows(kind, own)
        ],
        "loss_without": before,
        "loss_with": after,
        "calibration": calibration,
        "tokens": ids.numel(),
        "source_biases": layers.read("model.layers.0.self_attn.v_proj.bias") is not None,
    }
    rows = [
        ("sinks", f"fitted in {len(facts['layers'])} layers; {first.share:.0%} of the attention is on the first token"),
        ("loss above the source", f"{before:+.3f} without sinks, {after:+.3f} with them (nats a token, untrained)"),
    ]
    return FittedSinks(values, facts, rows)


def _warn(plan: ConversionPlan, window: int, say: Say, device: torch.device) -> None:
    """Say what windows cost a model that hangs on its first token, where the class has no sinks. One row is read."""
    source, ids = plan.source, _rows(plan, ROW_TOKENS // 2, EMBEDDED)[:1]
    if int(ids.max()) >= source.config["vocab_size"] or ids.shape[1] < 8:
        return
    layers = open_conversion(plan, plan.kinds, device)
    first = first_token(layers, ids, min(window, ids.shape[1] // 2))
    if not first.share >= HANGS:  # NaN included
        return
    line = f"warning: {first.share:.0%} of the attention is on the first token, which windows of {window:,} hide"
    if 2 * window <= ids.shape[1]:
        line += f": {_loss(layers, ids, plan, first):+.3f} nats a token before training"
    say(line + "; --class granite_swa avoids it" * ("granite_swa" in FAMILIES[source.config["model_type"]].targets))


def _loss(layers: Layers, ids: Tensor, plan: ConversionPlan, first: FirstToken) -> float:
    """The loss of rows ids [n,T] under the plan's layout, above the source's, nats a token."""
    none = torch.zeros_like(ids, dtype=torch.bool)
    return measure(layers, Samples(ids, len(ids), none, none), [plan.kinds], first.states)[0].loss


def open_conversion(plan: ConversionPlan, kinds: Sequence[LayerKind], device: torch.device) -> Layers:
    """A conversion's layers, as the source has them and as any of `kinds`; with biases where sinks may be fitted."""
    source, target = plan.source, str(plan.config["model_type"])
    biases = may_fit_sinks(plan)
    reader = tensor_reader(source.directory)
    return open_layers(source.config, source.kinds, kinds, reader, device, target=target, biases=biases)


def sinks_of_windows(
    plan: ConversionPlan, layers: Layers, window: LayerKind, calibration: str = EMBEDDED
) -> dict[str, Tensor]:
    """`sink_values` of every layer, each as if it were `window`: what the planner measures sliding layers with.

    Empty where the class has no sinks, where none are wanted or needed, and for a source that has windows of its own.
    """
    slides = any(kind.sliding_window is not None for kind in layers.source)
    if not may_fit_sinks(plan) or slides or window.sliding_window is None:
        return {}
    ids = _rows(plan, window.sliding_window, calibration)
    if ids.shape[1] <= window.sliding_window:
        return {}
    first = first_token(layers, ids, window.sliding_window)
    return sink_values(layers, [window] * len(layers.source), first) if first.share >= HANGS else {}


def _rows(plan: ConversionPlan, window: int, calibration: str) -> Tensor:
    """Calibration text [n,T], each row beginning as the tokenizer begins a text, with queries beyond the window.

    T is less where there is less text.
    """
    tokenizer = load_tokenizer(plan.source.directory)
    begin = torch.tensor(framing(tokenizer)[0], dtype=torch.int64)
    T = _row_tokens(plan, window)
    count = max(1, TOKENS // T)
    ids = joined(read_documents(calibration), tokenizer, count * T)
    own = min(T - len(begin), len(ids))
    rows = ids[: len(ids) // own * own].view(-1, own)[:count]
    return torch.cat((begin.expand(len(rows), -1), rows), dim=1)


def _row_tokens(plan: ConversionPlan, window: int) -> int:
    """How long rows of calibration text are, where there is enough text."""
    return min(plan.source.usable_length, max(ROW_TOKENS, window + ROW_TOKENS // 2))


@torch.no_grad()
def first_token(layers: Layers, ids: Tensor, window: int) -> FirstToken:
    """One pass of the source over rows ids [n,T], T beyond the window."""
    states = nn.functional.embedding(ids.to(layers.device), layers.tensor(EMBEDDING)).cpu()
    shares, logits, values = list[float](), list[Tensor](), list[Tensor]()
    for index, kind in enumerate(layers.source):
        seen = min(ids.shape[1], kind.sliding_window or ids.shape[1])
        found: list[tuple[float, Tensor]] = []
        with weights_of_layer(layers, index):
            layer = layers.decoders[kind].layers[0]
            first = layer.self_attn.v_proj(layer.input_layernorm(states[:, 0].to(layers.device)))
            values.append(first.mean(0).view(-1, layer.self_attn.head_dim).cpu())  # [K,D]
            watch = partial(_watch, found, window, seen)
            states = apply_layer(layers, kind, states, lambda rows, watch=watch: watch)
        shares.append(sum(share for share, _ in found) / len(found))
        logits.append(torch.cat([row for _, row in found]).mean(0))
    layers.norm.load_state_dict({"weight": layers.tensor("model.norm.weight")}, assign=True)
    return FirstToken(tuple(shares), tuple(logits), tuple(values), layers.norm(states.to(layers.device)).cpu())


def _watch(
    found: list[tuple[float, Tensor]],
    window: int,
    seen: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    pattern: Pattern,
    scaling: float | None,
) -> None:
    """Add the share of the first token, and its logits [n,H], mean over queries window <= q < seen, of q [n,H,T,D]."""
    (H, _, D), K = query.shape[1:], key.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    to_first = key[:, :, :1].repeat_interleave(H // K, dim=1)  # [n,H,1,D]
    row = (query[:, :, min(window, seen - 1) : seen] * to_first).sum(-1).mean(-1) * scale
    at = torch.arange(seen // 2, seen, EVERY, device=query.device).expand(len(query), -1)
    weights = attention_rows(query[:, :, at[0]], key, at, sliding_window=pattern.sliding_window, scale=scale)
    found.append((weights[..., 0].mean().item(), row.cpu()))


def _narrows(kind: LayerKind, source: LayerKind) -> bool:
    """Whether a layer's window hides tokens that the source's own layer sees."""
    window = kind.sliding_window
    return window is not None and (source.sliding_window is None or source.sliding_window > window)


def sink_values(layers: Layers, kinds: Sequence[LayerKind], first: FirstToken) -> dict[str, Tensor]:
    """Tensors of the layers among `kinds` whose window is narrower than the source's, if that has one: sinks [H],
    v_proj.bias [K D], o_proj.bias [E], fp32."""
    values: dict[str, Tensor] = {}
    for index, (kind, source) in enumerate(zip(kinds, layers.source, strict=True)):
        if not _narrows(kind, source):
            continue
        name = f"model.layers.{index}.self_attn."
        v0, logits = first.values[index], first.logits[index]
        of_heads = v0.repeat_interleave(len(logits) // len(v0), dim=0)  # [H,D]
        moved = layers.tensor(f"{name}o_proj.weight").cpu() @ of_heads.reshape(-1)
        values[f"{name}sinks"] = logits
        values[f"{name}v_proj.bias"] = _bias(layers, index, "v_proj", v0.numel()) - v0.reshape(-1)
        values[f"{name}o_proj.bias"] = _bias(layers, index, "o_proj", len(moved)) + moved
    return values


def _bias(layers: Layers, index: int, name: str, size: int) -> Tensor:
    """The source's own bias; zeros where it has none."""
    own = layers.read(f"model.layers.{index}.self_attn.{name}.bias")
    return torch.zeros(size) if own is None else own.float()
