"""Moves the first token's part in attention into learned sinks and biases: in closed form, without training.

Many pretrained models put much of each head's attention on the first token (StreamingLLM, arXiv 2309.17453). A sliding
window hides it, and the model breaks. GraniteSWA has a learned sink for each head: one more entry in the softmax, with
its own logit s and the value zero (ops/backends/sink_logits.py).

The first token's logit hardly depends on the query, so that it can be a constant. Its value v0 is not zero; biases
compensate for that. With p the share of the sink and o the output of attention over the window alone:

    wanted                  p v0 + (1 - p) o  =  v0 + (1 - p) (o - v0)
    s                       the mean over the queries beyond the window of scale * q . k0, with RoPE as in the source
    v_proj.bias   -= v0     the weights of a softmax sum to 1, so attention gives o - v0
    o_proj.bias   += W_o v0 (the heads of v0 concatenated)

This is exact for a model whose first token has a constant logit, except for the first W tokens of a text: they see both
the first token itself and the sink. The first token's own output stays v0. The derivation and its use are ours.

Only layers that put at least LAYER_SHARE of their attention on the first token get a sink. In the others the first
token is an ordinary one: its value differs from text to text. A constant in its place would change the first token's
own output, and with it the layers above that do rely on this token. SmolLM2-135M relies on it from layer 12 on, and a
little in layers 3 to 9. With sinks in its layers 0 to 2 as well, one text of eight lost 0.7 nats a token
within its first window (LOG.md).

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
from ctxext.machine.gpu import default_device
from ctxext.model.convert import ConversionPlan, FittedSinks, may_fit_sinks
from ctxext.model.ids import check_ids
from ctxext.model.layout import LayerKind
from ctxext.model.load import load_tokenizer
from ctxext.model.shards import EMBEDDING, tensor_reader
from ctxext.model.weights import only_pickles
from ctxext.ops.masks import Pattern
from ctxext.ops.naive_attention import attention_rows
from ctxext.retrofit.calibration import joined
from ctxext.retrofit.damage import Layers, Samples, apply_layer, measure, open_layers, weights_of_layer
from ctxext.train.sink_tokens import QUERY_STRIDE, SINK_SHARE

LAYER_SHARE = 0.02  # of a layer's attention on the first token, from which it gets a sink; ours
TOKENS, ROW_TOKENS = 4096, 1024  # calibration text in total and per row; rows are longer for a large window
Say = Callable[[str], None]


@dataclass(frozen=True)
class FirstToken:
    """The attention of the source to its first token.

    For each layer: its share of the attention (mean over heads and over the later half of the queries), logits [H] from
    the queries beyond the window, and values [K,D]. `states` are the source's final states [n,T,E].
    """

    shares: tuple[float, ...]
    logits: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    states: Tensor

    @property
    def share(self) -> float:
        """The mean share over the layers."""
        return sum(self.shares) / len(self.shares)


def fit_sinks(
    plan: ConversionPlan, *, say: Say = lambda line: None, calibration: str = EMBEDDED, device: str | None = None
) -> FittedSinks | None:
    """Fits sinks and biases for the sliding layers of a conversion.

    Returns None if the model does not rely on its first token, or if no window hides it from any query of the
    calibration rows. The loss of the text above the source's is measured before and after. If the class has no sinks
    the result is None, and `say` gets a warning that names the class with sinks and, for windows up to half of a row,
    the loss. Weights that exist only as pickles are not read: None.

    Raises ModelError for missing weights and for a token without a row, InputError for a `calibration` that cannot be
    read or has less than two windows.
    """
    source, windows = plan.source, {kind.sliding_window for kind in plan.kinds} - {None}
    window = min(windows, default=None)
    where = torch.device(device or default_device())
    # No window that hides anything, or no weights that can be streamed.
    if window is None or window >= source.usable_length or only_pickles(source.directory):
        return None
    if not plan.config.family.sinks:
        _warn(plan, window, say, where)
        return None
    # One pass over the source shows whether the model relies on its first token.
    ids = _rows(plan, window, calibration)
    least = min(2 * window, _row_tokens(plan, window))
    if calibration != EMBEDDED and ids.shape[1] < least:
        raise InputError(
            f"--calibration {calibration}: {ids.shape[1]:,} tokens; fitting sinks for windows of {window:,} needs at "
            f"least {least:,}",
            hint="give more text, leave --calibration out, or add --sinks none",
        )
    if ids.shape[1] <= window:
        say(f"sinks: the calibration text has {ids.shape[1]:,} tokens and fits in a window of {window:,}: none needed")
        return None
    check_ids([int(ids.max())], source.config.shape.vocab_size, source.name)
    # All that follows needs the weights; they are streamed layer by layer.
    layers = open_conversion(plan, plan.kinds, where)
    first = first_token(layers, ids, window)
    if not first.share >= SINK_SHARE:  # NaN included
        say(f"{first.share:.1%} of the attention is on the first token: no sinks are needed")
        return None
    values = sink_values(layers, plan.kinds, first)
    if not values:
        return None
    # The loss under the layout without and with sinks, on the text that they were fitted to.
    before, after = (_loss(fitted, ids, plan, first) for fitted in (layers, replace(layers, values=values)))
    facts = {
        "first_token_share": first.share,
        "layers": [i for i in range(len(plan.kinds)) if f"{_attention(i)}sinks" in values],
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
    """Reports the cost of windows for a model that relies on its first token but has no sinks. Reads one row."""
    source, ids = plan.source, _rows(plan, ROW_TOKENS // 2, EMBEDDED)[:1]
    if int(ids.max()) >= source.config.shape.vocab_size or ids.shape[1] < 8:
        return
    layers = open_conversion(plan, plan.kinds, device)
    first = first_token(layers, ids, min(window, ids.shape[1] // 2))
    if not first.share >= SINK_SHARE:  # NaN included
        return
    line = f"warning: {first.share:.0%} of the attention is on the first token, which windows of {window:,} hide"
    if 2 * window <= ids.shape[1]:
        line += f": {_loss(layers, ids, plan, first):+.3f} nats a token before training"
    say(line + "; --class granite_swa avoids it" * ("granite_swa" in source.config.family.targets))


def _loss(layers: Layers, ids: Tensor, plan: ConversionPlan, first: FirstToken) -> float:
    """The loss of rows ids [n,T] under the plan's layout minus the source's, nats a token."""
    none = torch.zeros_like(ids, dtype=torch.bool)
    return measure(layers, Samples(ids, len(ids), none, none), [plan.kinds], first.states)[0].loss


def open_conversion(plan: ConversionPlan, kinds: Sequence[LayerKind], device: torch.device) -> Layers:
    """Returns a conversion's layers as in the source and as any of `kinds`, with biases if sinks may be fitted."""
    source, target = plan.source, str(plan.config.family.name)
    biases = may_fit_sinks(plan)
    reader = tensor_reader(source.directory)
    return open_layers(source.config, source.kinds, kinds, reader, device, target=target, biases=biases)


def sinks_of_windows(
    plan: ConversionPlan, layers: Layers, window: LayerKind, calibration: str = EMBEDDED
) -> dict[str, Tensor]:
    """Returns `sink_values` of every layer, each as if it were `window`. The planner measures sliding layers with them.

    Empty if the class has no sinks, if none are wanted or needed, and for a source that already has windows.
    """
    slides = any(kind.sliding_window is not None for kind in layers.source)
    if not may_fit_sinks(plan) or slides or window.sliding_window is None:
        return {}
    ids = _rows(plan, window.sliding_window, calibration)
    if ids.shape[1] <= window.sliding_window:
        return {}
    first = first_token(layers, ids, window.sliding_window)
    return sink_values(layers, [window] * len(layers.source), first) if first.share >= SINK_SHARE else {}


def _rows(plan: ConversionPlan, window: int, calibration: str) -> Tensor:
    """Calibration text [n,T]. Each row begins with the tokens that the tokenizer puts before a text.

    T is long enough for queries beyond the window, but shorter if there is less text.
    """
    tokenizer = load_tokenizer(plan.source.directory)
    begin = torch.tensor(framing(tokenizer)[0], dtype=torch.int64)
    # About TOKENS tokens in all, at least one row.
    T = _row_tokens(plan, window)
    count = max(1, TOKENS // T)
    ids = joined(read_documents(calibration), tokenizer, count * T)
    # Leave room for the beginning, so that a row has T tokens.
    own = min(T - len(begin), len(ids))
    rows = ids[: len(ids) // own * own].view(-1, own)[:count]
    return torch.cat((begin.expand(len(rows), -1), rows), dim=1)


def _row_tokens(plan: ConversionPlan, window: int) -> int:
    """The length of rows of calibration text, if there is enough text."""
    return min(plan.source.usable_length, max(ROW_TOKENS, window + ROW_TOKENS // 2))


@torch.no_grad()
def first_token(layers: Layers, ids: Tensor, window: int) -> FirstToken:
    """Runs one pass of the source over rows ids [n,T], T longer than the window, and returns the FirstToken."""
    states = nn.functional.embedding(ids.to(layers.device), layers.tensor(EMBEDDING)).cpu()
    shares, logits, values = list[float](), list[Tensor](), list[Tensor]()
    for index, kind in enumerate(layers.source):
        seen = min(ids.shape[1], kind.sliding_window or ids.shape[1])
        found: list[tuple[float, Tensor]] = []
        with weights_of_layer(layers, index):
            layer = layers.decoders[kind].layers[0]
            # The first token sees only itself, so that its value does not depend on the rest of a row; average over
            # rows.
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
    """Appends to `found` the share of the first token, and its logits [n,H].

    The logits are means over queries window <= q < seen of q [n,H,T,D].
    """
    (H, _, D), K = query.shape[1:], key.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    to_first = key[:, :, :1].repeat_interleave(H // K, dim=1)  # [n,H,1,D]
    # Logits of the queries from which the window would hide the first token.
    row = (query[:, :, min(window, seen - 1) : seen] * to_first).sum(-1).mean(-1) * scale
    at = torch.arange(seen // 2, seen, QUERY_STRIDE, device=query.device).expand(len(query), -1)
    weights = attention_rows(query[:, :, at[0]], key, at, sliding_window=pattern.sliding_window, scale=scale)
    found.append((weights[..., 0].mean().item(), row.cpu()))


def narrows(kind: LayerKind, source: LayerKind) -> bool:
    """Whether a layer's window hides tokens that the source's own layer sees."""
    window = kind.sliding_window
    return window is not None and (source.sliding_window is None or source.sliding_window > window)


def sink_values(layers: Layers, kinds: Sequence[LayerKind], first: FirstToken) -> dict[str, Tensor]:
    """Returns the tensors of all layers that rely on the first token and whose window is narrower than the source's.

    They are sinks [H], v_proj.bias [K D] and o_proj.bias [E], fp32, by their names in the checkpoint.
    """
    values: dict[str, Tensor] = {}
    for index, (kind, source) in enumerate(zip(kinds, layers.source, strict=True)):
        if not narrows(kind, source) or not first.shares[index] >= LAYER_SHARE:  # NaN included
            continue
        name = _attention(index)
        v0, logits = first.values[index], first.logits[index]
        of_heads = v0.repeat_interleave(len(logits) // len(v0), dim=0)  # [H,D]
        # v0 of each query head (K heads repeated to H), through o_proj.
        moved = layers.tensor(f"{name}o_proj.weight").cpu() @ of_heads.reshape(-1)
        values[f"{name}sinks"] = logits
        values[f"{name}v_proj.bias"] = _bias(layers, index, "v_proj", v0.numel()) - v0.reshape(-1)
        values[f"{name}o_proj.bias"] = _bias(layers, index, "o_proj", len(moved)) + moved
    return values


def _attention(index: int) -> str:
    """The prefix of a layer's attention tensors in the checkpoint."""
    return f"model.layers.{index}.self_attn."


def _bias(layers: Layers, index: int, name: str, size: int) -> Tensor:
    """The source's own bias; zeros if it has none."""
    own = layers.read(f"{_attention(index)}{name}.bias")
    return torch.zeros(size) if own is None else own.float()
