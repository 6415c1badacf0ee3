"""A certificate of what a model's attention sees, measured on the real model as it is launched, not on a mask.

causality         the embedding of token j is changed: no final hidden state before j moves, by a single bit
receptive field   one input of one layer's attention is changed: what enters o_proj moves exactly where the pattern
                  says, head by head; with the model's own queries, and with queries of zero, which weigh all visible
                  keys alike, so that a sharp softmax hides no key that is seen
documents         both in a row of two documents, when training masks documents
backend           each layer's output beside `naive_attention` on this model's own q, k and v
cached decoding   hidden states as ctxext's decoding reads a text (model/decode.py), token by token and in chunks,
                  beside those of a forward without a cache; inference only. Where RoPE follows the length of the text,
                  stock `generate` of transformers is measured too, and a note says how far it is off

What a layer should see is written down once more here (`_sees`), so that an error in ops/masks.py is found too.
Training runs as its loop does: arguments, dtype, train mode, checkpointing (whole rows); one row, forward only. torch
is imported in functions: refusals come first. Shapes: T tokens, E model width, H heads over K key/value heads, D head
dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.loader import build
from ctxext.errors import InputError
from ctxext.evals.cached_decoding import as_decoded, of_stock_generate, relative
from ctxext.evals.certificate import Certificate, Check
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.source import ModelSource, require_tokenizer, resolve
from ctxext.ops.masks import Pattern, document_starts, first_shifted_head, lower_bounds
from ctxext.progress import Progress, ignore
from ctxext.train import recompute
from ctxext.train.plan import plan_run
from ctxext.train.run import SPEC_FILE, plan_resumed
from ctxext.train.spec import FinetuneSpec, MemorySpec, ValidationSpec
from ctxext.units import counted, first_of, format_tokens

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST, LONGEST = 16, 2047  # tokens; longer only where a window asks for it. Odd: no block or group divides it
BEYOND_WINDOW = 67  # tokens of the row after the first W
BACKEND_TOLERANCE = {"float32": 5e-5, "bfloat16": 2e-2}  # of the layer's largest |v|
COMPARING = "ctxext_verify"  # the attention that measures itself, in AttentionInterface


@dataclass(frozen=True)
class Launch:
    """How the model is run. Lengths in tokens.

    T            of the measured row: a few windows and groups, at most ctx, and `LONGEST` unless a window is longer
    group_size   G as measured: where the row is too short for two of `planned_group`, in proportion to it
    sink_tokens  first tokens of a document that S²-Attn's queries also see; None: `auto`, measured on the loaded model
    """

    source: ModelSource
    attention: str
    ctx: int
    T: int
    group_size: int | None = None
    planned_group: int | None = None
    sink_tokens: int | None = 0
    document_mask: bool = False
    memory: MemorySpec = MemorySpec()
    dtype: str = "float32"
    backend: str = "auto"

    def pattern(self, layer: int) -> Pattern:
        """What this layer sees, by the model's config and the run's plan."""
        window = self.source.kinds[layer].sliding_window
        if window is not None or self.group_size is None:
            return Pattern(window)
        return Pattern(None, self.group_size, sink_tokens=self.sink_tokens or 0)

    @property
    def notes(self) -> tuple[str, ...]:
        T, plan = format_tokens(self.T), f"{self.attention} at ctx {format_tokens(self.ctx)} in {self.dtype}"
        plan += "" if self.document_mask or self.attention == "inference" else ", no document mask"
        found = [f"{pattern_text(self.source.kinds)}; {plan}, measured on {T} tokens"]
        if self.group_size != self.planned_group:
            found.append(f"groups of {self.planned_group:,} tokens are measured as groups of {self.group_size:,}")
        if short := sorted(W for W in _windows(self.source.kinds) if self.T <= W):
            found.append(f"{T} tokens do not reach beyond the window of {', '.join(map(str, short))}")
        usable = self.source.usable_length
        if self.attention == "inference" and self.ctx > usable:  # training at a ctx is what makes a model bear it
            found.append(
                f"warning: {self.source.name} bears {format_tokens(usable)} tokens, not {format_tokens(self.ctx)}: its "
                "attention sees what is certified, and what it makes of that beyond was never trained"
            )
        return tuple(found)


def plan_launch(model: str, *, ctx: int | None = None, attention: str | None = None) -> Launch:
    """Find the model and how it is launched; a run's group size, document mask and ctx are those of its spec.

    `model` is all that `resolve` takes, or the directory of an unfinished run: the model it trains, at its start.
    `attention` None is training for a run and inference for another model. Raises InputError and ModelError.
    """
    if attention not in (None, "training", "inference"):
        raise InputError(f"--attention {attention!r}: allowed are training, inference")
    if ctx is not None and ctx < SHORTEST:
        raise InputError(f"--ctx {ctx}: at least {SHORTEST} tokens are needed to tell one pattern from another")
    source, spec, untrained = _find(model)
    require_tokenizer(source.directory)
    attention = attention or ("training" if spec else "inference")
    ctx = ctx or (spec.ctx if spec else source.usable_length)
    # What a run validates at has no say in what its attention sees, and may be longer than this ctx.
    spec = replace(spec or FinetuneSpec(ctx=ctx), ctx=ctx, stages=(), validation=ValidationSpec())
    plan = plan_run(untrained or source, spec) if attention == "training" else None
    if plan and untrained is None:
        source = replace(plan.source, config=plan.config)
    G, W = plan.group_size if plan else None, max(_windows(source.kinds), default=0)
    T = min(ctx, max(min(LONGEST, max(3 * W + 5, 2 * (G or 0) + 7, 96)), W + BEYOND_WINDOW if W else 0))
    if plan is None:
        return Launch(source, attention, ctx, T)
    scaled = G if G is None or ctx == T or 2 * G + 7 <= T else max(2, G * T // ctx)
    masked, memory = spec.data.document_mask, replace(spec.memory, quantize="none", tiles=None)
    # A finished run says how many sink tokens it trained with; runs from before there were any have none.
    facts = source.manifest.facts if source.manifest else {}
    sinks = facts.get("sink_tokens", 0) if "sink_tokens" in facts or untrained else plan.sink_tokens
    return Launch(source, attention, ctx, T, scaled, G, sinks, masked, memory, plan.dtype, spec.attention.backend)


def _find(model: str) -> tuple[ModelSource, FinetuneSpec | None, ModelSource | None]:
    """(what is loaded, its run's spec if there is one, and what that run started from if it is not the first)."""
    if (Path(model) / SPEC_FILE).is_file() and not (Path(model) / manifests.FILE_NAME).exists():
        plan = plan_resumed(Path(model))
        return plan.source, plan.spec, None
    source = resolve(model)
    data = source.manifest.spec if source.manifest else {}
    if "rope_scaling" not in data:  # no output of a finetune run
        return source, None, None
    spec = build(FinetuneSpec, data | {"rope_scaling": "auto"}, source=str(source.path))  # its config.json has them
    return source, spec, source.base or source


def _windows(kinds: Sequence[LayerKind]) -> set[int]:
    return {kind.sliding_window for kind in kinds if kind.sliding_window is not None}


def verify(launch: Launch, *, device: str | None = None, progress: Progress = ignore) -> Certificate:
    """Load the model and run every check; one that fails is in the certificate, and nothing is raised for it."""
    import torch

    from ctxext.model.load import causal_lm, load_model
    from ctxext.train.sinks import first_token_shares, measured_row, measured_sinks

    loaded = load_model(launch.source, dtype=launch.dtype, device=device)
    if launch.sink_tokens is None:
        shares = first_token_shares(causal_lm(loaded.model), measured_row(loaded.tokenizer, launch.ctx))
        launch = replace(launch, sink_tokens=measured_sinks(shares))
    if launch.attention == "training":
        model = loaded.model.train()
        patterns = [launch.pattern(layer) for layer in range(len(launch.source.kinds))]
        recompute.enable(model, launch.memory, patterns)
    checks: list[Check] = []
    notes = [*launch.notes]
    with torch.no_grad():
        for number, row in enumerate(rows := _rows(loaded, launch), start=1):
            checks.append(_end_to_end(launch, row))
            for layer, (module, arguments) in enumerate(_layer_inputs(row)):
                progress(f"row {number} of {len(rows)}, layers", layer, len(launch.source.kinds))
                checks.append(_field(module, arguments, layer, launch, row))
            checks += _backend(launch, row)
        if launch.attention == "inference":
            first = rows[0]
            checks += as_decoded(first.model, first.ids, first.forward(), _windows(launch.source.kinds), launch.dtype)
            notes += of_stock_generate(first.model, first.ids)
    return Certificate(launch.source.name, launch.attention, launch.T, tuple(checks), tuple(notes))


def write_certificate(certificate: Certificate, launch: Launch, out: Path, *, force: bool = False) -> None:
    """certificate.json and ctxext.json, whether it passed or not."""
    spec = {
        name: getattr(launch, name)
        for name in ("attention", "ctx", "T", "planned_group", "group_size", "sink_tokens", "dtype", "backend")
    }
    parents = {"model": manifests.parent(launch.source.directory)}
    failed = [f"{check.name}, layer {check.layer}" for check in certificate.failed]
    facts = {"passed": not failed, "checks": len(certificate.checks), "failed": failed, "notes": [*certificate.notes]}
    with manifests.staged_output(out, force) as staging:
        (staging / "certificate.json").write_text(json.dumps(certificate.as_dict(), indent=2) + "\n", "utf-8")
        manifests.write(staging, manifests.new("verify", spec=spec, parents=parents, facts=facts))


@dataclass(frozen=True)
class _Row:
    """What is run: ids [1, T] through `forward`, which gives [1, T, E]; bounds: 0, where other documents start, T."""

    model: Any
    ids: Tensor
    forward: Callable[[], Tensor]
    bounds: tuple[int, ...]

    def document_of(self, j: int) -> tuple[int, int]:
        return next((start, end) for start, end in pairwise(self.bounds) if j < end)


def _rows(loaded: Any, launch: Launch) -> list[_Row]:
    """Held-out text as one document; for training with a document mask, also cut in two."""
    from ctxext.data.corpus import stdlib_documents
    from ctxext.model.load import causal_lm, hidden_states

    T, G, bounds, model = launch.T, launch.group_size, [(0, launch.T)], causal_lm(loaded.model)
    text = "".join(document.text for document in stdlib_documents("held-out"))[: 32 * T]  # no token is that long
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    ids = ids[:, :T].to(loaded.device)
    if launch.attention == "inference":
        return [_Row(model, ids, partial(hidden_states, model, ids), bounds[0])]
    if launch.document_mask:  # cut off the groups' edges, or a restart would not show
        bounds.append((0, T // 3 + 1 + (G is not None and (T // 3 + 1) % G == 0), T))
    starts = [document_starts(b, T) if launch.document_mask else None for b in bounds]  # on the CPU, as in the loop
    run = partial(hidden_states, model, ids, group_size=G, sink_tokens=launch.sink_tokens or 0, backend=launch.backend)
    return [_Row(model, ids, partial(run, document_starts=s), bound) for bound, s in zip(bounds, starts, strict=True)]


def _edges(row: _Row, windows: set[int], group: int | None) -> list[int]:
    """Tokens to change: in every document its ends and middle, and both sides of its windows' and groups' edges."""
    found = set[int]()
    for start, end in pairwise(row.bounds):
        offsets = {0, 1, (end - start) // 2, end - start - 1} | {W + i for W in windows for i in (-1, 0, 1)}
        if group is not None:
            first = group - group // 2  # tokens of the shifted heads' first group
            offsets |= {first - 1, first, group - 1, group, group + first, 2 * group - 1, 2 * group}
        found |= {start + offset for offset in offsets if offset < end - start}
    return sorted(found)


def _changed(vectors: Tensor, j: int, size: float) -> Tensor:
    """vectors [1, T, E] with noise of `size` times their RMS on token j's: the same for one j."""
    import torch

    noise = torch.randn(vectors.shape[-1], generator=torch.Generator().manual_seed(j)) * size
    changed = vectors.clone()
    changed[:, j] += (noise.to(vectors.device) * vectors.float().square().mean().sqrt()).to(vectors.dtype)
    return changed


def _judge(name: str, layer: int | None, edges: list[int], faults: Callable[[int], Tensor], good: str) -> Check:
    """Sum up faults(j) [T, heads]: 1 where a change at j moved what it must not, -1 where it failed to move."""
    wrong, first = 0, ""
    for j in edges:
        found = faults(j)
        wrong += int(found.count_nonzero())
        if wrong and not first:
            i, head = found.nonzero()[0].tolist()
            what = "moved, and must not see it" if found[i, head] > 0 else "did not move, and must see it"
            first = f"{j} changed: {i}{f' of head {head}' if layer is not None else ''} {what}"
    return Check(name, layer, not wrong, first or f"{good}, {counted(len(edges), 'token')} changed", wrong, 0)


def _end_to_end(launch: Launch, row: _Row) -> Check:
    """A changed embedding moves its own output, and none before it or in another document."""
    embeddings = row.model.get_input_embeddings()

    def run(j: int | None) -> Tensor:
        with embeddings.register_forward_hook(lambda _, given, out: out if j is None else _changed(out, j, 2.0)):
            return row.forward()[0]  # [T,E]

    base = run(None)

    def faults(j: int) -> Tensor:
        moved = (run(j) != base).any(-1, keepdim=True).cpu()  # [T,1]
        found = (moved & ~_sees(Pattern(), j, launch.T, row, 1, 1)).int()
        found[j] -= (~moved[j]).int()
        return found

    good = "nothing earlier and no other document moves" if len(row.bounds) > 2 else "nothing earlier moves"
    edges = _edges(row, _windows(launch.source.kinds), launch.group_size)
    return _judge("documents" if len(row.bounds) > 2 else "causality", None, edges, faults, good)


def _layer_inputs(row: _Row) -> list[tuple[Any, dict[str, Any]]]:
    """Each layer's attention module and the keyword arguments a forward of the row calls it with."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(module: Any, _: Any, named: dict[str, Any]) -> None:
        calls.append((module, named))

    hooks = [x.self_attn.register_forward_pre_hook(note, with_kwargs=True) for x in row.model.get_decoder().layers]
    row.forward()
    for hook in hooks:
        hook.remove()
    return calls


def _field(module: Any, arguments: dict[str, Any], layer: int, launch: Launch, row: _Row) -> Check:
    """One layer by itself: a change of input j moves exactly the outputs whose pattern holds j."""
    hidden, (H, K) = arguments["hidden_states"], (launch.source.shape.num_heads, launch.source.shape.num_kv_heads)
    pattern = launch.pattern(layer)

    def heads(hidden: Tensor, silent: bool) -> Tensor:
        seen: list[Tensor] = []
        silence = module.q_proj.register_forward_hook(lambda _, given, out: out * 0) if silent else nullcontext()
        with silence, module.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            module(**{**arguments, "hidden_states": hidden})
        return seen[0][0].unflatten(-1, (H, -1))  # [T,H,D]

    base = {silent: heads(hidden, silent) for silent in (False, True)}

    def faults(j: int) -> Tensor:
        changed = _changed(hidden, j, 8.0)
        own, silent = ((heads(changed, s) != base[s]).any(-1).cpu() for s in (False, True))  # [T,H]
        sees = _sees(pattern, j, launch.T, row, H, K)
        return ((own | silent) & ~sees).int() - (sees & ~silent).int()

    W, G = pattern.sliding_window, pattern.group_size
    good = "exactly all before" if G is None else f"exactly groups of {G}, half of the heads shifted by {G // 2}"
    if pattern.sink_tokens:
        good += f", and {first_of(pattern.sink_tokens, 'token')}"
    good = good if W is None else f"exactly a window of {W}"
    edges = _edges(row, set() if W is None else {W}, G)
    return _judge("documents" if len(row.bounds) > 2 else "receptive field", layer, edges, faults, good)


def _sees(pattern: Pattern, j: int, T: int, row: _Row, H: int, K: int) -> Tensor:
    """Which outputs see token j, [T,H] bool."""
    import torch

    i, (start, end) = torch.arange(T)[:, None].repeat(1, H), row.document_of(j)
    sees = (j <= i) & (i < min(end, j + (pattern.sliding_window or T)))
    if (G := pattern.group_size) is not None:
        s = (torch.arange(H) >= first_shifted_head(H, K)) * (G // 2)
        same_group = (i - start + s) // G == (j - start + s) // G
        sees &= same_group | (j - start < pattern.sink_tokens)
    return sees


def _backend(launch: Launch, row: _Row) -> list[Check]:
    """A forward in which each layer's attention is computed a second time by naive, one head at a time: it is O(T²)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from ctxext.ops.attention import naive_attention

    model, allowed, checks = row.model, BACKEND_TOLERANCE[launch.dtype], list[Check]()
    good = "of the largest |v|" + (", two documents" if len(row.bounds) > 2 else "")
    before, starts = model.config._attn_implementation, document_starts(row.bounds, launch.T)
    served = AttentionInterface()[before]

    def comparing(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **named: Any) -> Any:
        out, weights = served(module, q, k, v, mask, **named)
        pattern = launch.pattern(module.layer_idx)
        lo = lower_bounds(pattern, launch.T, document_starts=starts, device=q.device)
        how = {"scale": named.get("scaling"), "sink_tokens": pattern.sink_tokens, "document_starts": starts}
        (H, K), worst = (q.shape[1], k.shape[1]), 0.0
        for h, g in ((h, h * K // H) for h in range(H)):
            half = int(lo.shape[1] == 2 and h >= first_shifted_head(H, K))  # lo [1, 1 or 2, T]
            sink = None if (sinks := named.get("s_aux")) is None else sinks[h : h + 1]
            truth = naive_attention(q[:, [h]], k[:, [g]], v[:, [g]], lo[:, [half]], sink_logits=sink, **how)
            worst = max(worst, relative(out[:, :, [h]].transpose(1, 2) - truth, v))
        checks.append(Check("backend", module.layer_idx, worst <= allowed, good, worst, allowed))
        return out, weights

    AttentionInterface.register(COMPARING, comparing)
    AttentionMaskInterface.register(COMPARING, AttentionMaskInterface()[before])
    try:
        model.set_attn_implementation(COMPARING)
        row.forward()
    finally:
        model.set_attn_implementation(before)
    return checks
