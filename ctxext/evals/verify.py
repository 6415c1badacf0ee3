"""Certifies what a model's attention sees, measured on the model as it is launched and not on a mask.

causality         changes the embedding of token j: no final hidden state before j may change by a single bit
receptive field   changes one input of one layer's attention: the input of o_proj must change exactly where the pattern
                  says, head by head. Measured with the model's own queries, and with queries of zero, which weigh all
                  visible keys alike, so that a sharp softmax hides no visible key
documents         runs both checks on a row of two documents, when training masks documents
backend           compares each layer's output with `naive_attention` on the model's own q, k and v
cached decoding   compares the hidden states of ctxext's decoding (model/decode.py), token by token and in chunks, with
                  those of a forward without a cache; inference only. Where RoPE follows the length of the text, stock
                  `generate` of transformers is measured too, and a note reports how large its error is

`_sees` states the expected pattern of a layer a second time, independently of ops/masks.py, so that an error there is
found too. Training runs as the training loop runs it: same arguments, dtype, train mode and checkpointing (whole rows);
one row, forward only. Functions import torch themselves, so that bad arguments are refused before torch loads. Shapes:
T tokens, E model width, H heads over K key/value heads, D head dim.
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
from ctxext.model.companions import require_tokenizer
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.source import ModelSource, resolve
from ctxext.ops.masks import Pattern, document_starts, first_shifted_head, lower_bounds
from ctxext.progress import Progress, ignore
from ctxext.train import recompute
from ctxext.train.finetune_spec import FinetuneSpec, MemorySpec, ValidationSpec
from ctxext.train.run_directory import SPEC_FILE, plan_resumed
from ctxext.train.run_plan import plan_run
from ctxext.units import counted, first_of, format_tokens

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST, LONGEST = 16, 2047  # tokens; a large window makes the row longer. Odd: no block or group divides it
BEYOND_WINDOW = 67  # tokens of the row after the first W
BACKEND_TOLERANCE = {"float32": 5e-5, "bfloat16": 2e-2}  # of the layer's largest |v|
COMPARING = "ctxext_verify"  # name in AttentionInterface of the attention that compares itself with naive


@dataclass(frozen=True)
class VerifyRun:
    """How the model is run. Lengths in tokens.

    T            measured row: a few windows and groups; at most ctx, and `LONGEST` unless a window is longer
    group_size   G as measured: where the row is too short for two of `planned_group`, G is reduced in proportion
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
        """Returns what this layer should see, by the model's config and the run's plan."""
        window = self.source.kinds[layer].sliding_window
        if window is not None or self.group_size is None:
            return Pattern(window)
        return Pattern(None, self.group_size, sink_tokens=self.sink_tokens or 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """Returns what is launched, and how the measured row differs from it."""
        T, plan = format_tokens(self.T), f"{self.attention} at ctx {format_tokens(self.ctx)} in {self.dtype}"
        plan += "" if self.document_mask or self.attention == "inference" else ", no document mask"
        found = [f"{pattern_text(self.source.kinds)}; {plan}, measured on {T} tokens"]
        if self.group_size != self.planned_group:
            found.append(f"groups of {self.planned_group:,} tokens are measured as groups of {self.group_size:,}")
        if short := sorted(W for W in _windows(self.source.kinds) if self.T <= W):
            found.append(f"{T} tokens are not longer than the window of {', '.join(map(str, short))}")
        usable = self.source.usable_length
        if self.attention == "inference" and self.ctx > usable:  # for training this is normal: it extends the context
            found.append(
                f"warning: ctx {format_tokens(self.ctx)} is beyond the usable length of {self.source.name}, "
                f"{format_tokens(usable)}: the check is of the pattern; the model was not trained on such distances"
            )
        return tuple(found)


def plan_launch(model: str, *, ctx: int | None = None, attention: str | None = None) -> VerifyRun:
    """Finds the model and how it is launched; for a run, group size, document mask and ctx come from its spec.

    `model` is anything that `resolve` takes, or the directory of an unfinished run: then the model that the run trains,
    at its start. `attention` None means training for a run and inference for any other model. Raises InputError and
    ModelError.
    """
    if attention not in (None, "training", "inference"):
        raise InputError(f"--attention {attention!r}: allowed are training, inference")
    if ctx is not None and ctx < SHORTEST:
        raise InputError(f"--ctx {ctx}: at least {SHORTEST} tokens are needed to distinguish patterns")
    source, spec, untrained = _find(model)
    require_tokenizer(source.directory)
    attention = attention or ("training" if spec else "inference")
    ctx = ctx or (spec.ctx if spec else source.usable_length)
    # Only this ctx is certified, so drop the stages. Validation does not change what the attention sees, and its
    # lengths may exceed this ctx.
    spec = replace(spec or FinetuneSpec(ctx=ctx), ctx=ctx, stages=(), validation=ValidationSpec())
    plan = plan_run(untrained or source, spec) if attention == "training" else None
    # A finished run has its positions already. Any other model gets those that the plan would train it with.
    if plan and untrained is None:
        source = replace(plan.source, config=plan.config)
    # The row should reach beyond the largest window W and hold two groups of G and a few tokens more. It has at most
    # LONGEST tokens, unless W needs more.
    G, W = plan.group_size if plan else None, max(_windows(source.kinds), default=0)
    T = min(ctx, max(min(LONGEST, max(3 * W + 5, 2 * (G or 0) + 7, 96)), W + BEYOND_WINDOW if W else 0))
    if plan is None:
        return VerifyRun(source, attention, ctx, T)
    # If the row is shorter than two groups, measure a smaller group: the same share of T that G is of ctx.
    scaled = G if G is None or ctx == T or 2 * G + 7 <= T else max(2, G * T // ctx)
    # Measure whole rows of unquantized weights.
    masked, memory = spec.data.document_mask, replace(spec.memory, quantize="none", tiles=None)
    # The manifest of a finished run records its number of sink tokens; runs of versions without sink tokens have 0.
    facts = source.manifest.facts if source.manifest else {}
    sinks = facts.get("sink_tokens", 0) if "sink_tokens" in facts or untrained else plan.sink_tokens
    return VerifyRun(source, attention, ctx, T, scaled, G, sinks, masked, memory, plan.dtype, spec.attention.backend)


def _find(model: str) -> tuple[ModelSource, FinetuneSpec | None, ModelSource | None]:
    """Returns (the model to load, its run's spec or None, the model that a finished run started from or None)."""
    if (Path(model) / SPEC_FILE).is_file() and not (Path(model) / manifests.FILE_NAME).exists():
        plan = plan_resumed(Path(model))
        return plan.source, plan.spec, None
    source = resolve(model)
    data = source.manifest.spec if source.manifest else {}
    if "rope_scaling" not in data:  # not the output of a finetune run
        return source, None, None
    # The positions come from the result's config.json, so the spec needs no scaling of its own.
    spec = build(FinetuneSpec, data | {"rope_scaling": "auto"}, source=str(source.path))
    return source, spec, source.base or source


def _windows(kinds: Sequence[LayerKind]) -> set[int]:
    return {kind.sliding_window for kind in kinds if kind.sliding_window is not None}


def verify(launch: VerifyRun, *, device: str | None = None, progress: Progress = ignore) -> Certificate:
    """Loads the model and runs every check. A failed check is recorded in the certificate; it raises nothing."""
    import torch

    from ctxext.model.load import causal_lm, load_model
    from ctxext.train.sink_tokens import first_token_shares, measured_row, measured_sinks

    loaded = load_model(launch.source, dtype=launch.dtype, device=device)
    # `auto` is a property of the loaded weights: measure it as a training run does at its start.
    if launch.sink_tokens is None:
        shares = first_token_shares(causal_lm(loaded.model), measured_row(loaded.tokenizer, launch.ctx))
        launch = replace(launch, sink_tokens=measured_sinks(shares))
    # Set train mode and gradient checkpointing as training does: both decide which attention code runs.
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
        # An inference launch has exactly one row.
        if launch.attention == "inference":
            first = rows[0]
            checks += as_decoded(first.model, first.ids, first.forward(), _windows(launch.source.kinds), launch.dtype)
            notes += of_stock_generate(first.model, first.ids)
    return Certificate(launch.source.name, launch.attention, launch.T, tuple(checks), tuple(notes))


def write_certificate(certificate: Certificate, launch: VerifyRun, out: Path, *, force: bool = False) -> None:
    """Writes certificate.json and ctxext.json, whether the checks passed or not."""
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
    """A row to run: ids [1, T]; `forward` returns [1, T, E]; bounds: 0, the starts of further documents, T."""

    model: Any
    ids: Tensor
    forward: Callable[[], Tensor]
    bounds: tuple[int, ...]

    def document_of(self, j: int) -> tuple[int, int]:
        return next((start, end) for start, end in pairwise(self.bounds) if j < end)


def _rows(loaded: Any, launch: VerifyRun) -> list[_Row]:
    """Returns held-out text as one document; for training with a document mask, also cut into two documents."""
    from ctxext.data.corpus import stdlib_documents
    from ctxext.model.load import causal_lm, hidden_states

    T, G, bounds, model = launch.T, launch.group_size, [(0, launch.T)], causal_lm(loaded.model)
    text = "".join(document.text for document in stdlib_documents("held-out"))[: 32 * T]  # no token is that long
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    ids = ids[:, :T].to(loaded.device)
    # Inference runs stock arguments only: no document starts, no groups, no sinks.
    if launch.attention == "inference":
        return [_Row(model, ids, partial(hidden_states, model, ids), bounds[0])]
    # Cut about a third in, but not at a group edge: there a group that fails to restart would look correct.
    if launch.document_mask:
        bounds.append((0, T // 3 + 1 + (G is not None and (T // 3 + 1) % G == 0), T))
    starts = [document_starts(b, T) if launch.document_mask else None for b in bounds]  # on the CPU, as in the loop
    run = partial(hidden_states, model, ids, group_size=G, sink_tokens=launch.sink_tokens or 0, backend=launch.backend)
    return [_Row(model, ids, partial(run, document_starts=s), bound) for bound, s in zip(bounds, starts, strict=True)]


def _edges(row: _Row, windows: set[int], group: int | None) -> list[int]:
    """Returns the tokens to change: each document's ends and middle, and both sides of window and group edges."""
    found = set[int]()
    for start, end in pairwise(row.bounds):
        offsets = {0, 1, (end - start) // 2, end - start - 1} | {W + i for W in windows for i in (-1, 0, 1)}
        if group is not None:
            first = group - group // 2  # length in tokens of the shifted heads' first group
            offsets |= {first - 1, first, group - 1, group, group + first, 2 * group - 1, 2 * group}
        found |= {start + offset for offset in offsets if offset < end - start}
    return sorted(found)


def _changed(vectors: Tensor, j: int, size: float) -> Tensor:
    """Adds noise of `size` times the RMS of vectors [1, T, E] to token j; the noise is the same for the same j."""
    import torch

    noise = torch.randn(vectors.shape[-1], generator=torch.Generator().manual_seed(j)) * size
    changed = vectors.clone()
    changed[:, j] += (noise.to(vectors.device) * vectors.float().square().mean().sqrt()).to(vectors.dtype)
    return changed


def _judge(name: str, layer: int | None, edges: list[int], faults: Callable[[int], Tensor], good: str) -> Check:
    """Builds a Check from faults(j) [T, heads]: 1 where an output must not change, -1 where it failed to change."""
    wrong, first = 0, ""
    for j in edges:
        found = faults(j)
        wrong += int(found.count_nonzero())
        # Only the first fault goes into the text; the number of all faults is in `measured`.
        if wrong and not first:
            i, head = found.nonzero()[0].tolist()
            what = "changed, but must not see it" if found[i, head] > 0 else "did not change, but must see it"
            first = f"{j} changed: {i}{f' of head {head}' if layer is not None else ''} {what}"
    return Check(name, layer, not wrong, first or f"{good}, {counted(len(edges), 'token')} changed", wrong, 0)


def _end_to_end(launch: VerifyRun, row: _Row) -> Check:
    """Checks that a changed embedding changes its own output, and none before it or in another document."""
    embeddings = row.model.get_input_embeddings()

    def run(j: int | None) -> Tensor:
        with embeddings.register_forward_hook(lambda _, given, out: out if j is None else _changed(out, j, 2.0)):
            return row.forward()[0]  # [T,E]

    base = run(None)

    def faults(j: int) -> Tensor:
        moved = (run(j) != base).any(-1, keepdim=True).cpu()  # [T,1]
        # Full causal attention bounds what may change. Outputs after j need not change, so only j itself must.
        found = (moved & ~_sees(Pattern(), j, launch.T, row, 1, 1)).int()
        found[j] -= (~moved[j]).int()
        return found

    good = "no earlier output and no other document changes" if len(row.bounds) > 2 else "no earlier output changes"
    edges = _edges(row, _windows(launch.source.kinds), launch.group_size)
    return _judge("documents" if len(row.bounds) > 2 else "causality", None, edges, faults, good)


def _layer_inputs(row: _Row) -> list[tuple[Any, dict[str, Any]]]:
    """Returns each layer's attention module and the keyword arguments that a forward of the row passes to it."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(module: Any, _: Any, named: dict[str, Any]) -> None:
        calls.append((module, named))

    hooks = [x.self_attn.register_forward_pre_hook(note, with_kwargs=True) for x in row.model.get_decoder().layers]
    row.forward()
    for hook in hooks:
        hook.remove()
    return calls


def _field(module: Any, arguments: dict[str, Any], layer: int, launch: VerifyRun, row: _Row) -> Check:
    """Checks one layer alone: a change of input j changes exactly the outputs whose pattern contains j."""
    hidden, (H, K) = arguments["hidden_states"], (launch.source.shape.num_heads, launch.source.shape.num_kv_heads)
    pattern = launch.pattern(layer)

    def heads(hidden: Tensor, silent: bool) -> Tensor:
        seen: list[Tensor] = []
        silence = module.q_proj.register_forward_hook(lambda _, given, out: out * 0) if silent else nullcontext()
        with silence, module.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            module(**{**arguments, "hidden_states": hidden})
        return seen[0][0].unflatten(-1, (H, -1))  # [T,H,D]

    # With zero queries (silent) all visible keys get the same weight, so every visible change must show.
    base = {silent: heads(hidden, silent) for silent in (False, True)}

    def faults(j: int) -> Tensor:
        # A change outside the pattern is a fault in either mode. A missing change is judged with zero queries alone,
        # because a sharp softmax of the model's own queries may hide a visible key.
        changed = _changed(hidden, j, 8.0)
        own, silent = ((heads(changed, s) != base[s]).any(-1).cpu() for s in (False, True))  # [T,H]
        sees = _sees(pattern, j, launch.T, row, H, K)
        return ((own | silent) & ~sees).int() - (sees & ~silent).int()

    W, G = pattern.sliding_window, pattern.group_size
    good = (
        "exactly all earlier tokens" if G is None else f"exactly groups of {G}, half of the heads shifted by {G // 2}"
    )
    if pattern.sink_tokens:
        good += f", and {first_of(pattern.sink_tokens, 'token')}"
    good = good if W is None else f"exactly a window of {W}"
    edges = _edges(row, set() if W is None else {W}, G)
    return _judge("documents" if len(row.bounds) > 2 else "receptive field", layer, edges, faults, good)


def _sees(pattern: Pattern, j: int, T: int, row: _Row, H: int, K: int) -> Tensor:
    """Returns which outputs must see token j, bool [T,H]. Deliberately does not use ops/masks.py."""
    import torch

    i, (start, end) = torch.arange(T)[:, None].repeat(1, H), row.document_of(j)
    sees = (j <= i) & (i < min(end, j + (pattern.sliding_window or T)))
    if (G := pattern.group_size) is not None:
        s = (torch.arange(H) >= first_shifted_head(H, K)) * (G // 2)
        same_group = (i - start + s) // G == (j - start + s) // G
        sees &= same_group | (j - start < pattern.sink_tokens)
    return sees


def _backend(launch: VerifyRun, row: _Row) -> list[Check]:
    """Recomputes each layer's attention in a forward with naive_attention, one head at a time: it is O(T²)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from ctxext.ops.naive_attention import naive_attention

    model, allowed, checks = row.model, BACKEND_TOLERANCE[launch.dtype], list[Check]()
    good = "of the largest |v|" + (", two documents" if len(row.bounds) > 2 else "")
    before, starts = model.config._attn_implementation, document_starts(row.bounds, launch.T)
    # The wrapper calls the attention that the model uses now and compares its output.
    served = AttentionInterface()[before]

    def comparing(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **named: Any) -> Any:
        out, weights = served(module, q, k, v, mask, **named)
        pattern = launch.pattern(module.layer_idx)
        lo = lower_bounds(pattern, launch.T, document_starts=starts, device=q.device)
        how = {"scale": named.get("scaling"), "sink_tokens": pattern.sink_tokens, "document_starts": starts}
        (H, K), worst = (q.shape[1], k.shape[1]), 0.0
        # Query head h reads key/value head g. With S² groups, `lo` has one row for each half of the heads.
        for h, g in ((h, h * K // H) for h in range(H)):
            half = int(lo.shape[1] == 2 and h >= first_shifted_head(H, K))  # lo [1, 1 or 2, T]
            sink = None if (sinks := named.get("s_aux")) is None else sinks[h : h + 1]
            truth = naive_attention(q[:, [h]], k[:, [g]], v[:, [g]], lo[:, [half]], sink_logits=sink, **how)
            worst = max(worst, relative(out[:, :, [h]].transpose(1, 2) - truth, v))
        checks.append(Check("backend", module.layer_idx, worst <= allowed, good, worst, allowed))
        return out, weights

    # transformers looks up the mask function under the same name, so register the one of the current attention too.
    AttentionInterface.register(COMPARING, comparing)
    AttentionMaskInterface.register(COMPARING, AttentionMaskInterface()[before])
    try:
        model.set_attn_implementation(COMPARING)
        row.forward()
    finally:
        model.set_attn_implementation(before)
    return checks
