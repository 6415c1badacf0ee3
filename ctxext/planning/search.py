"""Which knobs make a run fit and fast: every combination planned, those that fit ordered by tokens a second.

    attention.train     s2, dense                    memory.quantize   none, nf4 (LoRA, one process)
    memory.checkpoint   true, false                  optimizer.name    adamw, adamw8bit (one process)
    memory.keep         nothing, attention           --zero, --nproc   none; 1, 2, 3, 2_offload, 3_offload on 1 card
    memory.tiles        none, 16k, 4k, 1k                              (offload alone), on all, and on the most that
    memory.offload      false, true (with a GPU)                       divide the batch

A knob that `--set` or the preset gives is left as given, the layout as it is unless others are named. A combination
that `plan_run` or train/parallel.py refuses is none.

Not searched: k layers a checkpoint (it does not pay: LOG.md), micro-batches, what of the spec changes the result
otherwise. S²-Attn does change it: name attention.train=dense to leave it out.
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
from ctxext.model.families import normalise, rope_of
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import find_hybrid, layer_kinds, layout_facts, pattern_text
from ctxext.model.source import ModelSource
from ctxext.ops.cost import WHOLE, Partition, parameter_count
from ctxext.planning.cards import Rates
from ctxext.planning.time import Estimate, estimate
from ctxext.train.parallel import Host, Launch, read_zero
from ctxext.train.plan import RunPlan, divided, plan_run
from ctxext.train.spec import FinetuneSpec
from ctxext.units import format_bytes

AS_IT_IS = "none"  # of --hybrid: the layout the model has
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
OF_A_GPU = ("memory.offload", "memory.quantize", "optimizer.name")
STAGES = ("1", "2", "3", "2_offload", "3_offload")
STEP = 1024  # tokens: the longest context is found to this
LONGEST = 2**26


@dataclass(frozen=True)
class Asked:
    """What is planned: a model by its name, options as `finetune` takes them, and what it is to run on.

    fixed   fields of the spec by dotted path, from --set; `fields` has the preset's with them, nested
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
    """One combination: what it changes, what it needs and how long a step takes. Bytes of one card and its host."""

    asked: Asked
    hybrid: str | None
    changes: dict[str, Any]
    zero: str | None
    ranks: int
    plan: RunPlan
    partition: Partition

    @property
    def needed(self) -> int:
        """On a CPU what waits on the host waits in the same memory."""
        return sum(self.plan.memory.values()) + (0 if self.asked.gpu else self.host)

    @property
    def host(self) -> int:
        """Bytes that wait on the host for one card."""
        spec, shape, waiting = self.plan.spec, self.plan.source.shape, 0.0
        item = 2 if self.plan.dtype == "bfloat16" else 4
        if spec.memory.checkpoint and spec.memory.offload:
            stored = -(-shape.num_layers // int(spec.memory.checkpoint))
            waiting += stored * spec.ctx * spec.micro_batch_size * shape.hidden_size * item
        if self.partition.offload_optimizer:
            waiting += 16 * self.plan.trainables.parameters / self.ranks
        if self.partition.offload_weights:
            waiting += item * parameter_count(shape) / self.ranks
        return int(waiting)

    def timed(self, rates: Rates | None) -> Estimate | None:
        """None where no rates are known."""
        return None if rates is None else estimate(self.plan, rates, self.partition)

    @property
    def knobs(self) -> frozenset[str]:
        """What it turns, in words."""
        zero = [f"zero={self.zero}", f"ranks={self.ranks}"] if self.zero else []
        return frozenset([*(f"{key}={flow(value)}" for key, value in self.changes.items()), *zero])

    def commands(self) -> list[str]:
        """What to type, in order."""
        model, lines = self.asked.model, list[str]()
        if self.hybrid is not None:
            model = f"runs/{self.asked.source.name}-{self.hybrid}"
            lines.append(shlex.join(["ctxext", "convert", self.asked.model, "--hybrid", self.hybrid, "--out", model]))
        words = ["ctxext", "finetune", model, "--ctx", self.asked.ctx, "--preset", self.asked.preset]
        for key, value in (dict(self.asked.fixed) | self.changes).items():
            words += ["--set", f"{key}={flow(value)}"]
        words += ["--zero", self.zero, "--nproc", str(self.ranks)] if self.zero else []
        return [*lines, shlex.join(words)]

    def as_dict(self, rates: Rates | None) -> dict[str, Any]:
        """Plain data for `--json`; what needs rates is None where none are known."""
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
    """The model as a conversion would leave it, from its config alone. Raises what `convert` raises for a layout."""
    if source.kind != "source" and source.kind != "model":
        raise InputError(f"{source.name} is a {source.kind}; --hybrid plans the conversion of a pretrained model")
    kinds = layer_kinds(find_hybrid(hybrid), source.config["num_hidden_layers"])
    facts = {"source_layout": layout_facts(source.kinds), "source_rope_parameters": rope_of(source.config)}
    manifest = manifests.new("conversion", spec={}, parents={}, facts=facts)
    config = normalise(hybrid_config(source.config, kinds))
    return replace(source, name=f"{source.name}-{hybrid}", kind="conversion", config=config, manifest=manifest)


def choices(asked: Asked, ctx: str | int | None = None, *, lean: bool = False) -> Iterator[Choice]:
    """Every combination that may be run, whether it fits or not; `lean` those alone that need the least memory.

    Raises InputError where the spec as given can be planned with no knob turned at all.
    """
    refused: InputError | None = None
    any_planned = False
    for hybrid in asked.hybrids:
        source = asked.source if hybrid == AS_IT_IS else converted(asked.source, hybrid)
        trainables: Trainables | None = None
        for changes in _changes(asked, lean):
            try:
                plan = plan_with(asked, source, changes, ctx, trainables)
            except InputError as error:
                refused = refused or error
                continue
            any_planned, trainables = True, plan.trainables
            name = None if hybrid == AS_IT_IS else hybrid
            yield Choice(asked, name, changes, None, 1, plan, WHOLE)
            yield from _shared(asked, name, changes, plan, lean)
    if not any_planned and refused is not None:
        raise refused


def plan_with(
    asked: Asked,
    source: ModelSource,
    changes: Mapping[str, Any],
    ctx: str | int | None = None,
    trainables: Trainables | None = None,
) -> RunPlan:
    """The plan of the spec as given, with the knobs turned, none of which changes what trains."""
    fields = copy.deepcopy(dict(asked.fields))
    for key, value in (dict(changes) | {"ctx": asked.ctx if ctx is None else ctx}).items():
        set_value(fields, key, value)
    spec = build(FinetuneSpec, fields, source=f"finetune spec (preset {asked.preset})")
    return plan_run(source, spec, gpu=asked.gpu, trainables=trainables)


def _changes(asked: Asked, lean: bool) -> Iterator[dict[str, Any]]:
    """What is set beyond what was given; what is the default already is left out."""
    tried, values = KNOBS | (LEAN if lean else {}), dict[str, tuple[Any, ...]]()
    for knob, found in tried.items():
        part, _, field = knob.partition(".")
        if field not in asked.fields.get(part, {}):
            values[knob] = found
    if not asked.gpu:  # what bitsandbytes and the host's memory save, they save a GPU
        values = {knob: found for knob, found in values.items() if knob not in OF_A_GPU}
    for turned in itertools.product(*values.values()):
        chosen = dict(zip(values, turned, strict=True))
        if lean and chosen.get("memory.quantize") == "nf4" and chosen.get("optimizer.name") == "adamw":
            continue  # as large in all else, and ZeRO takes neither
        yield {knob: value for knob, value in chosen.items() if value != DEFAULTS.get(knob)}


def _shared(asked: Asked, hybrid: str | None, changes: dict[str, Any], plan: RunPlan, lean: bool) -> Iterator[Choice]:
    """The same over several cards, or over one with state on its host."""
    spec = plan.spec
    if not asked.gpu or spec.optimizer.name != "adamw" or spec.memory.quantize != "none":
        return
    batch, fixed = plan.global_batch_size, "global_batch_size" in asked.fields
    most = max(n for n in range(1, asked.cards + 1) if batch % n == 0)
    for ranks, stage in itertools.product(sorted({1, most} | ({asked.cards} if not fixed else set())), STAGES):
        offloads = stage.endswith("offload")
        if (ranks == 1 and not offloads) or (lean and stage not in ("3_offload", "2_offload")):
            continue
        if stage.startswith("3") and _needs_whole_weights(plan):
            continue
        partition = Launch(_zero(stage), (Host("localhost", ranks),)).partition
        more = dict(changes)
        shared = plan
        if batch % ranks:
            more["global_batch_size"] = size = -(-batch // ranks) * ranks
            flops = (plan.step_flops // batch * size, plan.model_flops // batch * size)
            shared = replace(plan, global_batch_size=size, step_flops=flops[0], model_flops=flops[1],
                             spec=replace(spec, global_batch_size=size))  # fmt: skip
        yield Choice(asked, hybrid, more, stage, ranks, divided(shared, partition), partition)


def _needs_whole_weights(plan: RunPlan) -> bool:
    """What train/parallel.py refuses under ZeRO 3."""
    taught = plan.teacher is not None and plan.teacher.source is not None
    return plan.spec.memory.tiles is not None or taught or any(part.source == SELF for part in plan.spec.data.parts)


@cache
def _zero(stage: str) -> dict[str, Any]:
    """deepspeed_configs' file of a stage: a search asks for it hundreds of times."""
    return read_zero(stage)


def fitting(found: list[Choice], rates: Rates | None) -> list[tuple[Choice, Estimate | None]]:
    """Those that fit, the most tokens a second first; of equals, and of all without rates, the one that turns less."""

    def order(pair: tuple[Choice, Estimate | None]) -> tuple[float, int, int]:
        choice, took = pair
        speed = 0.0 if took is None else float(f"{took.tokens_per_second:.4g}")
        return -speed, len(choice.knobs), choice.needed

    return sorted(
        ((choice, choice.timed(rates)) for choice in found if choice.needed <= choice.asked.memory), key=order
    )


def listed(fit: list[tuple[Choice, Estimate | None]], count: int = 4) -> list[Choice]:
    """The first few, without those that turn what a faster one turns, and more, and gain nothing by it."""
    kept = list[Choice]()
    for choice, _ in fit:
        same = (one for one in kept if one.hybrid == choice.hybrid)
        if not any(_kinds(one) <= _kinds(choice) for one in same):
            kept.append(choice)
        if len(kept) == count:
            break
    return kept


def _kinds(choice: Choice) -> frozenset[str]:
    """Its knobs; tiles of one size or another are one."""
    return frozenset("memory.tiles" if knob.startswith("memory.tiles") else knob for knob in choice.knobs)


def longest(asked: Asked) -> Choice | None:
    """What trains at the longest context that fits at all, a multiple of 1,024 tokens; None where none does.

    Short contexts may be refused for what they are (below a group of S²-Attn, nothing to interpolate): passed over.
    """
    low, best, high = 0, None, STEP
    while high <= LONGEST:
        refused, found = _leanest(asked, high)
        if found is None and (best is not None or not refused):
            break
        low, best, high = high, found, 2 * high
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        refused, found = _leanest(asked, middle)
        if found is not None or (refused and best is None):
            low, best = middle, found
        else:
            high = middle
    return None if best is None else replace(best, asked=replace(asked, ctx=str(low)))


def _leanest(asked: Asked, ctx: int) -> tuple[bool, Choice | None]:
    """(whether a context is refused, with the fewest knobs what fits of it)."""
    try:
        found = [choice for choice in choices(asked, ctx, lean=True) if choice.needed <= asked.memory]
    except InputError:
        return True, None
    return False, min(found, key=lambda choice: (len(choice.knobs), choice.needed), default=None)


def largest(choice: Choice) -> str:
    """The three items that hold most of its memory, in words."""
    ranked = sorted(choice.plan.memory.items(), key=lambda item: -item[1])[:3]
    return "most of it " + ", ".join(f"{name} {format_bytes(size)}" for name, size in ranked)


def dominating(fit: list[tuple[Choice, Estimate | None]], rates: Rates | None) -> dict[str, Any] | None:
    """The rate that most of the fastest one's time depends on, and what it would mean if it were a fifth slower; None
    where nothing fits or no rates are known."""
    if not fit or rates is None:
        return None
    best = fit[0][0]
    took = estimate(best.plan, rates, best.partition)
    name, seconds = next(iter(took.by_rate().items()))
    slower = rates.times(name, 0.8)
    again = fitting([choice for choice, _ in fit], slower)[0][0]
    change = estimate(best.plan, slower, best.partition).seconds / took.seconds - 1
    return {
        "rate": name,
        "share": seconds / took.seconds,
        "slower_if_20_percent_less": change,
        "same_choice": again.knobs == best.knobs and again.hybrid == best.hybrid,
    }
