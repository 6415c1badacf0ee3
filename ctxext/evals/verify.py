"""A certificate of what a model's attention sees, measured on the real model as it is launched, not on a mask.

Shapes: T tokens of one row, E model width, H query heads, D head dim, W window, G group.

causality         the embedding of token j is changed; no final hidden state before j may move, by a single bit
receptive field   one input of one layer's attention is changed; what enters o_proj may move exactly where the layer's
                  pattern says, head by head. Twice: with the model's own queries, and with queries of zero, which
                  weigh all visible keys alike, so that a sharp softmax cannot hide a key that is seen
documents         the same in a row of two documents, layer by layer and end to end (training with a document mask)
backend           each layer's output beside `naive_attention` on this model's own q, k and v
cached decoding   hidden states with a cache, token by token and in chunks, beside those without (inference)

What a layer should see is written down once more here, as predicates, so that an error in ops/masks.py is an error
here too. Training runs as the loop does: its keyword arguments, dtype, train mode, gradient checkpointing; forward
only. Not done: gradients, and lengths beyond `LONGEST`; see `Launch`. torch is imported inside the functions, so that
refusals come before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.loader import build
from ctxext.config.output import staged_output
from ctxext.errors import InputError
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.positions import Auto
from ctxext.model.source import ModelSource, require_tokenizer, resolve
from ctxext.ops.masks import Pattern, document_starts, first_shifted_head, lower_bounds
from ctxext.train.plan import plan_run
from ctxext.train.run import SPEC_FILE, plan_resumed
from ctxext.train.spec import FinetuneSpec
from ctxext.units import format_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ctxext.model.load import LoadedModel

ATTENTIONS = ("training", "inference")
SHORTEST, LONGEST = 16, 2047  # tokens; longer only where a window asks for it. Odd: no block or group divides it
BEYOND_WINDOW = 67  # tokens after the first that no longer sees token 0
BACKEND_TOLERANCE = {"float32": 5e-5, "bfloat16": 2e-2, "float16": 3e-3}  # of the largest |v| of the layer
CACHE_TOLERANCE = {"float32": 5e-4, "bfloat16": 1e-1, "float16": 2e-2}  # of the largest |final hidden state|
COMPARING = "ctxext_verify"  # a name transformers' AttentionInterface gets while backend and naive are compared

Progress = Callable[[str, int, int], None]  # (what, done, in all)


@dataclass(frozen=True)
class Check:
    """One thing measured. `layer` None: end to end. `measured` may not exceed `allowed`.

    For causality, receptive field and documents: the outputs that moved and should not, or stayed and should not.
    """

    name: str
    layer: int | None
    passed: bool
    detail: str
    measured: float
    allowed: float


@dataclass(frozen=True)
class Certificate:
    """Every check of one launch. T is the tokens of the measured row; `notes` say where it differs from the launch."""

    model: str
    attention: str
    T: int
    checks: tuple[Check, ...]
    layout: str
    ctx: int
    group_size: int | None
    dtype: str
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def rows(self) -> list[list[str]]:
        """Lines for a screen under `HEADER`: layers of which the same can be said share one, with the worst figure."""
        groups: dict[tuple[str, bool, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.name, check.passed, check.detail), []).append(check)
        return [
            [
                name,
                _ranges([check.layer for check in checks]),
                "pass" if passed else "FAIL",
                _figure(max((check.measured for check in checks), key=lambda x: (math.isnan(x), x))),
                _figure(checks[0].allowed),
                detail,
            ]
            for (name, passed, detail), checks in groups.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a figure that is not finite is null."""
        checks = [
            asdict(check) | {"measured": check.measured if math.isfinite(check.measured) else None}
            for check in self.checks
        ]
        return asdict(self) | {"passed": self.passed, "notes": list(self.notes), "checks": checks}


HEADER = ("check", "layer", "result", "measured", "allowed", "what")


@dataclass(frozen=True)
class Launch:
    """How the model is run. Lengths in tokens.

    T            of the row: enough for a few windows and groups, at most ctx, and `LONGEST` unless a window is longer
    group_size   G as measured; `planned_group` is the run's own, of which it keeps the proportion to the row
    """

    source: ModelSource
    attention: str
    ctx: int
    T: int
    group_size: int | None
    planned_group: int | None
    document_mask: bool
    checkpointing: bool
    dtype: str

    @property
    def notes(self) -> tuple[str, ...]:
        found = []
        if self.group_size != self.planned_group:
            found.append(
                f"groups of {format_tokens(self.planned_group or 0)} tokens at ctx {format_tokens(self.ctx)} are "
                f"measured as groups of {self.group_size} at {format_tokens(self.T)}"
            )
        hidden = sorted({W for W in _windows(self.source.kinds) if self.T <= W})
        if hidden:
            found.append(f"window {', '.join(map(str, hidden))} is not reached in {format_tokens(self.T)} tokens")
        if self.attention == "training" and not self.document_mask:
            found.append("data.document_mask is false: packed documents see each other, as asked for")
        return tuple(found)


def plan_launch(model: str, *, ctx: int | None = None, attention: str | None = None) -> Launch:
    """Find the model and how it is launched; a run's group size, document mask and ctx are those of its spec.

    `model` is all that `resolve` takes, and the directory of an unfinished run (the model it trains, with its
    positions). `attention` is training for a run unless given, inference for any other model. Raises InputError and
    ModelError for what cannot be run so.
    """
    if attention not in (None, *ATTENTIONS):
        raise InputError(f"--attention {attention!r}: allowed are {', '.join(ATTENTIONS)}")
    if ctx is not None and ctx < SHORTEST:
        raise InputError(f"--ctx {ctx}: at least {SHORTEST} tokens are needed to tell one pattern from another")
    source, spec, trained = _find(model)
    attention = attention or ("training" if spec else "inference")
    require_tokenizer(source.directory)
    if attention == "inference":
        ctx = ctx or (spec.ctx if spec else source.usable_length)
        return Launch(source, attention, ctx, _length(ctx, source.kinds, None), None, None, False, False, "float32")
    spec = replace(spec or FinetuneSpec(ctx=source.usable_length), **({"ctx": ctx} if ctx else {}))
    plan = plan_run(trained, spec)
    if trained is source:  # nothing is trained yet: the model as a run would start with it
        source = replace(plan.source, config=plan.config)
    T = _length(spec.ctx, source.kinds, plan.group_size)
    group = _scaled_group(plan.group_size, T, spec.ctx)
    dtype = str(plan.dtype)
    mask, checkpointing = spec.data.document_mask, spec.gradient_checkpointing
    return Launch(source, attention, spec.ctx, T, group, plan.group_size, mask, checkpointing, dtype)


def _find(model: str) -> tuple[ModelSource, FinetuneSpec | None, ModelSource]:
    """(what is loaded, the run's spec if it is a run, the model a plan is made from)."""
    path = Path(model)
    if (path / SPEC_FILE).is_file() and not (path / manifests.FILE_NAME).exists():
        plan = plan_resumed(path)
        return plan.source, plan.spec, plan.source
    source = resolve(model)
    manifest = source.manifest
    if manifest is None or manifest.kind not in ("finetune", "model") or "ctx" not in manifest.spec:
        return source, None, source
    spec = build(FinetuneSpec, manifest.spec, source=str(source.directory / manifests.FILE_NAME))
    spec = replace(spec, rope_scaling=Auto(), original_length=None)  # its positions are in its config.json
    return source, spec, source.base or replace(source)


def _windows(kinds: Sequence[LayerKind]) -> list[int]:
    return [kind.sliding_window for kind in kinds if kind.sliding_window is not None]


def _length(ctx: int, kinds: Sequence[LayerKind], group: int | None) -> int:
    W = max(_windows(kinds), default=0)
    return min(ctx, max(min(LONGEST, max(3 * W + 5, 2 * (group or 0) + 7, 96)), W + BEYOND_WINDOW if W else 0))


def _scaled_group(group: int | None, T: int, ctx: int) -> int | None:
    """G in proportion to a row shorter than ctx, odd if it was odd; as it is where the row holds two groups."""
    if group is None or T == ctx or 2 * group + 7 <= T:
        return group
    scaled = max(2, group * T // ctx)
    return scaled + (scaled - group) % 2


def verify(launch: Launch, *, device: str | None = None, progress: Progress | None = None) -> Certificate:
    """Load the model and run every check. A check that fails is in the certificate; nothing is raised for it."""
    import torch

    from ctxext.model.load import load_model

    loaded = load_model(launch.source, dtype=launch.dtype, device=device)
    _set_mode(loaded.model, launch)
    kinds, checks = launch.source.kinds, list[Check]()
    with torch.no_grad():
        whole, *packed = rows = list(_rows(loaded, launch))
        for row in rows:
            checks += _end_to_end(loaded, launch, row)
            inputs = _layer_inputs(loaded, row)
            for layer, (module, arguments) in enumerate(inputs):
                if progress:
                    progress(f"{row.name}, layer", layer, len(inputs))
                checks.append(_field(module, arguments, layer, kinds[layer], launch, row))
            del inputs
        checks += _backend(loaded, launch, packed[0] if packed else whole)
        if launch.attention == "inference":
            checks += _cached(loaded, launch, whole)
    return Certificate(
        model=launch.source.name,
        attention=launch.attention,
        T=launch.T,
        checks=tuple(checks),
        layout=pattern_text(kinds),
        ctx=launch.ctx,
        group_size=launch.group_size,
        dtype=launch.dtype,
        notes=launch.notes,
    )


def write_certificate(certificate: Certificate, launch: Launch, out: Path, *, force: bool = False) -> None:
    """certificate.json and ctxext.json, whether it passed or not."""
    with staged_output(out, force) as staging:
        text = json.dumps(certificate.as_dict(), indent=2, allow_nan=False)
        (staging / "certificate.json").write_text(text + "\n", "utf-8")
        asked = {"attention": launch.attention, "ctx": launch.ctx, "group_size": launch.planned_group}
        facts = {
            "passed": certificate.passed,
            "checks": len(certificate.checks),
            "failed": [f"{check.name}, layer {check.layer}" for check in certificate.failed],
            "T": launch.T,
            "notes": list(certificate.notes),
        }
        parents = {"model": manifests.parent(launch.source.directory)}
        manifests.write(staging, manifests.new("verify", spec=asked, parents=parents, facts=facts))


@dataclass(frozen=True)
class _Row:
    """What is run: ids [1, T], the keyword arguments of the launch, and where each of its documents starts."""

    name: str
    ids: Tensor
    arguments: dict[str, Any]
    bounds: tuple[int, ...]

    def start_of(self, j: int) -> int:
        return max(bound for bound in self.bounds if bound <= j)


def _rows(loaded: LoadedModel, launch: Launch) -> Iterator[_Row]:
    """Held-out text as one document; for training with a document mask, a second row cut in two."""
    import torch

    from ctxext.data.corpus import stdlib_documents

    T, ids = launch.T, list[int]()
    for document in stdlib_documents("held-out"):
        ids += loaded.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= T:
            break
    tokens = torch.tensor([ids[:T]], device=loaded.device)
    if launch.attention == "inference":
        yield _Row("one document", tokens, {}, (0,))
        return
    G, cut = launch.group_size, launch.T // 3 + 1
    cut += 1 if G and cut % G == 0 else 0  # groups must restart: a cut on a group's edge would not show it
    for name, bounds in (("one document", (0,)), ("two documents", (0, cut))):
        starts = document_starts(bounds, T) if launch.document_mask else None  # on the CPU, as the loop has it
        yield _Row(name, tokens, {"group_size": G, "document_starts": starts}, bounds)
        if not launch.document_mask:
            return


def _set_mode(model: Any, launch: Launch) -> None:
    """Train mode and gradient checkpointing, where the run has them; the forward then goes the same way."""
    if launch.attention == "training":
        model.train()
        if launch.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})


def _edges(row: _Row, windows: Sequence[int], group: int | None) -> list[int]:
    """The tokens to perturb: ends and middle of every document, and both sides of its window's and groups' edges."""
    T = row.ids.shape[1]
    found = {0, T - 1}
    for start, end in zip(row.bounds, (*row.bounds[1:], T), strict=True):
        offsets = {0, 1, (end - start) // 2, end - start - 1}
        for W in set(windows):
            offsets |= {W - 1, W, W + 1}
        if group is not None:
            first = group - group // 2  # tokens of the shifted heads' first group
            offsets |= {first - 1, first, group - 1, group, group + first, 2 * group - 1, 2 * group}
        found |= {start + offset for offset in offsets if 0 <= offset < end - start}
    return sorted(found)


def _shift(like: Tensor, j: int, size: float) -> Tensor:
    """A change of one token's vector: random, always the same for one j, `size` times the vectors' RMS."""
    import torch

    noise = torch.randn(like.shape[-1], generator=torch.Generator().manual_seed(j)).to(like)
    return size * like.float().square().mean().sqrt().to(like.dtype) * noise


def _end_to_end(loaded: LoadedModel, launch: Launch, row: _Row) -> list[Check]:
    """Causality for one document; for two, that the second does not move when the first does."""
    from ctxext.model.load import causal_lm, hidden_states

    embeddings = causal_lm(loaded.model).get_input_embeddings()

    def run(j: int | None) -> Tensor:
        def change(module: Any, arguments: Any, out: Tensor) -> Tensor:
            if j is None:
                return out
            out = out.clone()
            out[:, j] += _shift(out, j, 2.0)
            return out

        handle = embeddings.register_forward_hook(change)
        try:
            return hidden_states(loaded.model, row.ids, **row.arguments)[0]  # [T,E]
        finally:
            handle.remove()

    edges, T = _edges(row, _windows(launch.source.kinds), launch.group_size), row.ids.shape[1]
    base, wrong, first = run(None), 0, ""
    for j in edges:
        moved = (run(j) != base).any(-1).tolist()  # [T]
        start = row.start_of(j)
        end = min((bound for bound in row.bounds if bound > j), default=T)
        bad = [i for i in range(T) if moved[i] and not start <= i < end or moved[i] and i < j]
        bad += [] if moved[j] else [j]
        wrong += len(bad)
        if bad and not first:
            first = f"token {j} changed: output {bad[0]} {'moved' if moved[bad[0]] else 'did not move'}"
    if len(row.bounds) == 1:
        return [Check("causality", None, not wrong, first or f"{len(edges)} tokens changed, none before", wrong, 0)]
    good = f"{len(edges)} tokens changed, the other document stayed"
    return [Check("documents", None, not wrong, first or good, wrong, 0)]


def _layer_inputs(loaded: LoadedModel, row: _Row) -> list[tuple[Any, dict[str, Any]]]:
    """Each layer's attention module and the keyword arguments it was called with in a forward of the row."""
    from ctxext.model.load import causal_lm, hidden_states

    calls: list[tuple[Any, dict[str, Any]]] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, arguments, named: calls.append((module, named)), with_kwargs=True
        )
        for layer in causal_lm(loaded.model).get_decoder().layers
    ]
    try:
        hidden_states(loaded.model, row.ids, **row.arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _heads(module: Any, arguments: dict[str, Any], hidden: Tensor, H: int, silent: bool) -> Tensor:
    """What one layer's attention hands to o_proj, [T,H,D]; `silent`: with queries of zero."""
    seen: list[Tensor] = []
    handles = [module.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))]
    if silent:
        handles.append(module.q_proj.register_forward_hook(lambda _, given, out: out * 0))
    try:
        module(**{**arguments, "hidden_states": hidden})
    finally:
        for handle in handles:
            handle.remove()
    return seen[0][0].unflatten(-1, (H, -1))


def _visible(kind: LayerKind, group: int | None, j: int, row: _Row, heads: tuple[int, int]) -> Tensor:
    """Which outputs may see token j, [T,H] bool: the patterns as predicates."""
    import torch

    (H, K), T, start = heads, row.ids.shape[1], row.start_of(j)
    i = torch.arange(T)
    end = min((bound for bound in row.bounds if bound > j), default=T)
    seen = ((i >= j) & (i < end))[:, None].repeat(1, H)
    if kind.sliding_window is not None:
        return seen & (i - j < kind.sliding_window)[:, None]
    if group is None:
        return seen
    shift = torch.zeros(H, dtype=torch.int64)
    shift[first_shifted_head(H, K) :] = group // 2
    return seen & ((i[:, None] - start + shift) // group == (j - start + shift) // group)


def _field(
    module: Any, arguments: dict[str, Any], layer: int, kind: LayerKind, launch: Launch, row: _Row
) -> Check:
    """One layer by itself: a change at j moves exactly the outputs whose pattern holds j."""
    shape, hidden = launch.source.shape, arguments["hidden_states"]
    H, group = shape.num_heads, None if kind.sliding_window is not None else launch.group_size
    base = {silent: _heads(module, arguments, hidden, H, silent) for silent in (False, True)}
    wrong, first = 0, ""
    edges = _edges(row, _windows([kind]), group)
    for j in edges:
        changed = hidden.clone()
        changed[:, j] += _shift(hidden, j, 8.0)
        own, silent = (
            (_heads(module, arguments, changed, H, silent) != base[silent]).any(-1).cpu() for silent in (False, True)
        )
        expected = _visible(kind, group, j, row, (H, shape.num_kv_heads))
        bad = ((own | silent) & ~expected) | (~silent & expected)  # [T,H]
        wrong += int(bad.sum())
        if bad.any() and not first:
            i, head = bad.nonzero()[0].tolist()
            what = "did not move, and sees it" if expected[i, head] else "moved, and must not see it"
            first = f"input {j} changed: output {i} of head {head} {what}"
    name = "receptive field" if len(row.bounds) == 1 else "documents"
    return Check(name, layer, not wrong, first or f"{_described(kind, group)}, {len(edges)} inputs", wrong, 0)


def _described(kind: LayerKind, group: int | None) -> str:
    if kind.sliding_window is not None:
        return f"exactly a window of {kind.sliding_window}"
    return "exactly all before" if group is None else f"exactly groups of {group}, half of the heads {group // 2} on"


def _backend(loaded: LoadedModel, launch: Launch, row: _Row) -> list[Check]:
    """A forward in which every layer's attention is computed by naive too, on the same q, k and v."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from ctxext.model.attention import left_padding
    from ctxext.model.load import causal_lm, hidden_states

    allowed, checks = BACKEND_TOLERANCE[launch.dtype], list[Check]()

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor) -> None:
        kind = launch.source.kinds[layer]
        group = None if kind.sliding_window is not None else launch.group_size
        worst = _naive_difference(q, k, v, out, Pattern(kind.sliding_window, group), row, scale)
        worst /= float(v.abs().max()) or 1.0
        checks.append(Check("backend", layer, worst <= allowed, "naive's, of the largest |v|", worst, allowed))

    inner = causal_lm(loaded.model)
    AttentionInterface.register(COMPARING, _attend_and_record)
    AttentionMaskInterface.register(COMPARING, left_padding)
    implementation = inner.config._attn_implementation
    try:
        inner.set_attn_implementation(COMPARING)
        hidden_states(loaded.model, row.ids, **row.arguments, record=record, implementation=implementation)
    finally:
        inner.set_attn_implementation(implementation)
    return checks


def _attend_and_record(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """The attention that is registered under `implementation`, its inputs and output handed to `record`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    record, implementation = named.pop("record"), named.pop("implementation")
    out, weights = ALL_ATTENTION_FUNCTIONS[implementation](module, query, key, value, attention_mask, **named)
    record(module.layer_idx, query, key, value, named.get("scaling"), out.transpose(1, 2))
    return out, weights


def _naive_difference(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, pattern: Pattern, row: _Row, scale: float | None
) -> float:
    """The largest |out - naive|, one head at a time: naive's memory is O(T²) for each."""
    from ctxext.ops.attention import naive_attention

    (H, T), K = q.shape[1:3], k.shape[1]
    lo = lower_bounds(pattern, T, document_starts=document_starts(row.bounds, T), device=q.device)  # [1,1 or 2,T]
    worst = 0.0
    for h in range(H):
        half = int(lo.shape[1] == 2 and h >= first_shifted_head(H, K))
        g = h * K // H
        truth = naive_attention(
            q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1], lo[:, half : half + 1], scale=scale
        )
        difference = float((out[:, h : h + 1].float() - truth.float()).abs().max())
        worst = difference if math.isnan(difference) else max(worst, difference)
    return worst


def _cached(loaded: LoadedModel, launch: Launch, row: _Row) -> list[Check]:
    """The row in pieces over a growing cache; steps of one token at both ends and across each window's edge."""
    from ctxext.model.load import causal_lm, hidden_states

    T, allowed, checks = launch.T, CACHE_TOLERANCE[launch.dtype], list[Check]()
    whole = hidden_states(loaded.model, row.ids)
    scale = float(whole.abs().max())
    near = (0, *(W for W in _windows(launch.source.kinds) if W < T), T)
    steps = {t for edge in set(near) for t in range(edge - 12, edge + 13) if 0 < t < T}
    for name, cuts in (("token by token", steps), ("in chunks", {T // 4 + 1, T // 4 + 3, T // 2, T - T // 5})):
        cache, worst = None, 0.0
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), T], strict=True):
            decoder = causal_lm(loaded.model).get_decoder()
            out = decoder(input_ids=row.ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            difference = float((out.last_hidden_state - whole[:, begin:end]).abs().max()) / scale
            worst = difference if math.isnan(difference) else max(worst, difference)
        detail = f"{name}, of the largest |hidden state|"
        checks.append(Check("cached decoding", None, worst <= allowed, detail, worst, allowed))
    return checks


def _ranges(layers: Sequence[int | None]) -> str:
    """`0-3, 5`, or `end to end`."""
    text: list[str] = []
    numbers = sorted(layer for layer in layers if layer is not None)
    for number in numbers:
        if number - 1 in numbers:
            text[-1] = f"{text[-1].split('-')[0]}-{number}"
        else:
            text.append(str(number))
    return ", ".join(text) or "end to end"


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1e}"
