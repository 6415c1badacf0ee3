"""Finds the options that make a run fit and fast: plans every combination and sorts by tokens per second.

    attention.train     s2, dense                    memory.quantize   none, nf4 (LoRA, one process)
    memory.checkpoint   true, false                  optimizer.name    adamw, adamw8bit (one process)
    memory.keep         nothing, attention           --zero, --nproc   none; 1, 2, 3, 2_offload, 3_offload on 1 card
    memory.tiles        none, 16k, 4k, 1k                              (offload alone), on all, and on the most that
    memory.offload      false, true (with a GPU)                       divide the batch

Only combinations that fit are listed. An option that `--set` or the preset gives is not changed. The layout is not
changed unless other layouts are named. A combination that `plan_run` or train/parallel.py refuses is skipped.

Not searched: k layers per checkpoint (no gain: LOG.md), micro-batch sizes, and options of the spec that change the
result in other ways. S²-Attn also changes the result: set attention.train=dense to exclude it.
"""

from __future__ import annotations

import copy
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config.loader import build, flow, set_value
from ctxext.data.documents import SELF
from ctxext.errors import InputError
from ctxext.model.adapter_plan import Trainables
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import find_hybrid, layer_kinds, layout_facts, pattern_text
from ctxext.model.source import ModelSource
from ctxext.ops.cost import WHOLE, Partition, parameter_count
from ctxext.planning.cards import Rates
from ctxext.planning.time import Estimate, estimate
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.parallel import Host, Launch, read_zero
from ctxext.train.run_plan import RunPlan, divided, plan_run
from ctxext.units import format_bytes

OWN_LAYOUT = "none"  # value of --hybrid: the model's own layout
KNOBS: dict[str, tuple[Any, ...]] = {
    "attention.train": ("s2", "dense"),
    "memory.quantize": ("none", "nf4"),
    "optimizer.name": ("adamw", "adamw8bit"),
    "memory.checkpoint": (False, True),
    "memory.keep": ("nothing", "attention"),
    "memory.tiles": (None, 16_384, 4096, 1024),
    "memory.offload": (False, True),
}
LEAN: dict[str, tuple[Any, ...]] = {"memory.checkpoint": (True,), "memory.keep": ("nothing",),
                                    "memory.tiles": (1024, None), "memory.offload": (True,)}  # fmt: skip
DEFAULTS = {"memory.quantize": "none", "optimizer.name": "adamw", "memory.checkpoint": True, "memory.keep": "nothing",
            "memory.tiles": None, "memory.offload": False}  # fmt: skip
GPU_ONLY = ("memory.offload", "memory.quantize", "optimizer.name")
STAGES = ("1", "2", "3", "2_offload", "3_offload")
STEP = 1024  # tokens: resolution of the longest context
LONGEST = 2**26


@dataclass(frozen=True)
class SearchSpace:
    """The request: a model by its name, options as for `finetune`, and the target machine.

    fixed   fields of the spec by dotted path, from --set
    fields  the fields of the preset with those of `fixed`, nested
    memory  bytes of one card, or of this machine
    """

    model: str
    source: ModelSource
    ctx: str
    preset: str
    fixed: Mapping[str, Any]
    fields: Mapping[str, Any]
    hybrids: tuple[str, ...]
    gpu: bool
    cards: int
    memory: int


@dataclass(frozen=True)
class Choice:
    """One combination: its changed options, its memory and its time per step. Bytes are per card and its host."""

    requested: SearchSpace
    hybrid: str | None
    changes: dict[str, Any]
    zero: str | None
    ranks: int
    plan: RunPlan
    partition: Partition

    @property
    def needed(self) -> int:
        """Bytes needed on one card. Without a GPU, data that waits on the host uses the same memory and counts too."""
        return sum(self.plan.memory.values()) + (0 if self.requested.gpu else self.host)

    @property
    def host(self) -> int:
        """Bytes that one card stores on the host."""
        spec, shape, waiting = self.plan.spec, self.plan.source.shape, 0.0
        item = 2 if self.plan.dtype == "bfloat16" else 4
        # The kept inputs of layers, one for every k layers, in the dtype of activations.
        if spec.memory.checkpoint and spec.memory.offload:
            stored = -(-shape.num_layers // int(spec.memory.checkpoint))
            waiting += stored * spec.ctx * spec.micro_batch_size * shape.hidden_size * item
        if self.partition.offload_optimizer:
            waiting += 16 * self.plan.trainables.parameters / self.ranks
        if self.partition.offload_weights:
            waiting += item * parameter_count(shape) / self.ranks
        return int(waiting)

    def timed(self, rates: Rates | None) -> Estimate | None:
        """Returns the estimate of a step; None if no rates are known."""
        return None if rates is None else estimate(self.plan, rates, self.partition)

    @property
    def knobs(self) -> frozenset[str]:
        """The changed options, in words."""
        zero = [f"zero={self.zero}", f"ranks={self.ranks}"] if self.zero else []
        return frozenset([*(f"{key}={flow(value)}" for key, value in self.changes.items()), *zero])

    def commands(self) -> list[str]:
        """Returns the commands to type, in order."""
        model, lines = self.requested.model, list[str]()
        if self.hybrid is not None:
            model = f"runs/{self.requested.source.name}-{self.hybrid}"
            lines.append(
                shlex.join(["ctxext", "convert", self.requested.model, "--hybrid", self.hybrid, "--out", model])
            )
        words = ["ctxext", "finetune", model, "--ctx", self.requested.ctx, "--preset", self.requested.preset]
        for key, value in (dict(self.requested.fixed) | self.changes).items():
            words += ["--set", f"{key}={flow(value)}"]
        words += ["--zero", self.zero, "--nproc", str(self.ranks)] if self.zero else []
        return [*lines, shlex.join(words)]

    def as_dict(self, rates: Rates | None) -> dict[str, Any]:
        """Returns plain data for `--json`; values that need rates are None if none are known."""
        took = self.timed(rates)
        return {
            "commands": self.commands(),
            "layout": pattern_text(self.plan.kinds),
            "changes": self.changes,
            "zero": self.zero,
            "processes": self.ranks,
            "global_batch_size": self.plan.global_batch_size,
            "step_flops": self.plan.step_flops,
            "seconds_per_step": None if took is None else took.seconds,
            "tokens_per_second": None if took is None else took.tokens_per_second,
            "memory": self.plan.memory | {"total": self.needed},
            "host_memory": self.host,
            "parts": None
            if took is None
            else [
                {"name": p.name, "rate": p.rate, "flops": p.flops, "bytes": p.moved, "seconds": p.seconds}
                for p in took.parts
            ],
        }


def converted(source: ModelSource, hybrid: str) -> ModelSource:
    """Returns the model as a conversion would leave it, derived from its config alone.

    Raises the errors of `convert` for a layout.
    """
    if source.kind != "source" and source.kind != "model":
        raise InputError(f"{source.name} is a {source.kind}; --hybrid needs a pretrained model")
    kinds = layer_kinds(find_hybrid(hybrid), source.config.shape.num_layers)
    facts = {"source_layout": layout_facts(source.kinds), "source_rope_parameters": source.config.rope}
    manifest = manifests.new("conversion", spec={}, parents={}, facts=facts)
    config = hybrid_config(source.config, kinds)
    return replace(source, name=f"{source.name}-{hybrid}", kind="conversion", config=config, manifest=manifest)


def choices(requested: SearchSpace, ctx: str | int | None = None, *, lean: bool = False) -> Iterator[Choice]:
    """Yields every combination that can run, whether it fits or not; with `lean` only those that need the least memory.

    Raises InputError if no combination can be planned.
    """
    refused: InputError | None = None
    any_planned = False
    for hybrid in requested.hybrids:
        source = requested.source if hybrid == OWN_LAYOUT else converted(requested.source, hybrid)
        trainables: Trainables | None = None
        # Trainables do not depend on the options; compute them once per layout.
        for changes in _changes(requested, lean):
            try:
                plan = plan_with(requested, source, changes, ctx, trainables)
            except InputError as error:
                refused = refused or error
                continue
            any_planned, trainables = True, plan.trainables
            name = None if hybrid == OWN_LAYOUT else hybrid
            yield Choice(requested, name, changes, None, 1, plan, WHOLE)
            yield from _shared(requested, name, changes, plan, lean)
    # The first refusal explains why nothing can be planned.
    if not any_planned and refused is not None:
        raise refused


def plan_with(
    requested: SearchSpace,
    source: ModelSource,
    changes: Mapping[str, Any],
    ctx: str | int | None = None,
    trainables: Trainables | None = None,
) -> RunPlan:
    """Returns the plan of the spec with changed options. None of the options changes what is trainable."""
    fields = copy.deepcopy(dict(requested.fields))
    for key, value in (dict(changes) | {"ctx": requested.ctx if ctx is None else ctx}).items():
        set_value(fields, key, value)
    spec = build(FinetuneSpec, fields, source=f"finetune spec (preset {requested.preset})")
    return plan_run(source, spec, gpu=requested.gpu, trainables=trainables)


def _changes(requested: SearchSpace, lean: bool) -> Iterator[dict[str, Any]]:
    """The combinations of options, each without those that the user gave and without default values."""
    tried, values = KNOBS | (LEAN if lean else {}), dict[str, tuple[Any, ...]]()
    for knob, found in tried.items():
        part, _, field = knob.partition(".")
        # Options from the preset or from --set stay as they are.
        if field not in requested.fields.get(part, {}):
            values[knob] = found
    if not requested.gpu:  # bitsandbytes and offloading only save GPU memory
        values = {knob: found for knob, found in values.items() if knob not in GPU_ONLY}
    for turned in itertools.product(*values.values()):
        chosen = dict(zip(values, turned, strict=True))
        if lean and chosen.get("memory.quantize") == "nf4" and chosen.get("optimizer.name") == "adamw":
            continue  # adamw8bit needs less memory, and nf4 excludes ZeRO
        yield {knob: value for knob, value in chosen.items() if value != DEFAULTS.get(knob)}


def _shared(
    requested: SearchSpace, hybrid: str | None, changes: dict[str, Any], plan: RunPlan, lean: bool
) -> Iterator[Choice]:
    """The same combination on several cards, or on one card with state on its host."""
    spec = plan.spec
    if not requested.gpu or spec.optimizer.name != "adamw" or spec.memory.quantize != "none":
        return
    batch, fixed = plan.global_batch_size, "global_batch_size" in requested.fields
    # The largest number of cards that divides the batch.
    most = max(n for n in range(1, requested.cards + 1) if batch % n == 0)
    for ranks, stage in itertools.product(sorted({1, most} | ({requested.cards} if not fixed else set())), STAGES):
        offloads = stage.endswith("offload")
        # One card gains only from offloading, and a lean search only needs the two offloading stages.
        if (ranks == 1 and not offloads) or (lean and stage not in ("3_offload", "2_offload")):
            continue
        if stage.startswith("3") and _needs_whole_weights(plan):
            continue
        partition = Launch(_zero(stage), (Host("localhost", ranks),)).partition
        more = dict(changes)
        shared = plan
        if batch % ranks:
            # Round the batch up to a multiple of the ranks; FLOPs grow with it.
            more["global_batch_size"] = size = -(-batch // ranks) * ranks
            flops = (plan.step_flops // batch * size, plan.model_flops // batch * size)
            shared = replace(plan, global_batch_size=size, step_flops=flops[0], model_flops=flops[1],
                             spec=replace(spec, global_batch_size=size))  # fmt: skip
        yield Choice(requested, hybrid, more, stage, ranks, divided(shared, partition), partition)


def _needs_whole_weights(plan: RunPlan) -> bool:
    """Whether the plan uses something that train/parallel.py refuses under ZeRO 3."""
    taught = plan.teacher is not None and plan.teacher.source is not None
    return plan.spec.memory.tiles is not None or taught or any(part.source == SELF for part in plan.spec.data.parts)


@cache
def _zero(stage: str) -> dict[str, Any]:
    """The shipped configuration of a stage, cached because a search reads it hundreds of times."""
    return read_zero(stage)


def fitting(found: list[Choice], rates: Rates | None) -> list[tuple[Choice, Estimate | None]]:
    """Returns the choices that fit, the most tokens per second first.

    Of equally fast ones, and without rates, the choice with fewer changed options comes first.
    """

    def order(pair: tuple[Choice, Estimate | None]) -> tuple[float, int, int]:
        choice, took = pair
        # Four digits, so that differences below the model's accuracy do not decide.
        speed = 0.0 if took is None else float(f"{took.tokens_per_second:.4g}")
        return -speed, len(choice.knobs), choice.needed

    return sorted(
        ((choice, choice.timed(rates)) for choice in found if choice.needed <= choice.requested.memory), key=order
    )


def listed(fit: list[tuple[Choice, Estimate | None]], count: int = 4) -> list[Choice]:
    """Returns the first few choices, without those that only add options to a faster one."""
    kept = list[Choice]()
    for choice, _ in fit:
        same = (one for one in kept if one.hybrid == choice.hybrid)
        if not any(_kinds(one) <= _kinds(choice) for one in same):
            kept.append(choice)
        if len(kept) == count:
            break
    return kept


def _kinds(choice: Choice) -> frozenset[str]:
    """Its changed options; all tile sizes count as the same option."""
    return frozenset("memory.tiles" if knob.startswith("memory.tiles") else knob for knob in choice.knobs)


def longest(requested: SearchSpace) -> Choice | None:
    """Returns the choice at the longest context that fits, a multiple of 1,024 tokens; None if none fits.

    A short context may be refused for its length (smaller than an S²-Attn group, nothing to interpolate); it is
    skipped.
    """
    low, best, high = 0, None, STEP
    # Double the context until nothing fits (refused short contexts are skipped), then bisect to STEP tokens.
    while high <= LONGEST:
        refused, found = _leanest(requested, high)
        if found is None and (best is not None or not refused):
            break
        low, best, high = high, found, 2 * high
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        refused, found = _leanest(requested, middle)
        if found is not None or (refused and best is None):
            low, best = middle, found
        else:
            high = middle
    return None if best is None else replace(best, requested=replace(requested, ctx=str(low)))


def _leanest(requested: SearchSpace, ctx: int) -> tuple[bool, Choice | None]:
    """(whether this context is refused, the choice that fits with the fewest changed options or None)."""
    try:
        found = [choice for choice in choices(requested, ctx, lean=True) if choice.needed <= requested.memory]
    except InputError:
        return True, None
    return False, min(found, key=lambda choice: (len(choice.knobs), choice.needed), default=None)


def largest(choice: Choice) -> str:
    """Returns the three largest items of a choice's memory, in words."""
    ranked = sorted(choice.plan.memory.items(), key=lambda item: -item[1])[:3]
    return "mostly " + ", ".join(f"{name} {format_bytes(size)}" for name, size in ranked)


def dominating(fit: list[tuple[Choice, Estimate | None]], rates: Rates | None) -> dict[str, Any] | None:
    """Returns the rate that takes most of the fastest choice's time, and the effect if it is a fifth lower.

    None if nothing fits or no rates are known.
    """
    if not fit or rates is None:
        return None
    best = fit[0][0]
    took = estimate(best.plan, rates, best.partition)
    name, seconds = next(iter(took.by_rate().items()))
    # Plan again with this rate at 80%, to see whether another choice becomes the fastest.
    slower = rates.times(name, 0.8)
    again = fitting([choice for choice, _ in fit], slower)[0][0]
    change = estimate(best.plan, slower, best.partition).seconds / took.seconds - 1
    return {
        "rate": name,
        "share": seconds / took.seconds,
        "slower_if_20_percent_less": change,
        "same_choice": again.knobs == best.knobs and again.hybrid == best.hybrid,
    }
