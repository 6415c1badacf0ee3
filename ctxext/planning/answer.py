"""The answer of `ctxext plan`: what was requested, what was found, and which rate it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctxext.config import presets
from ctxext.config.loader import build, set_value
from ctxext.errors import CheckFailed, InputError
from ctxext.machine import cards
from ctxext.model.layout import pattern_text
from ctxext.model.source import resolve
from ctxext.ops.cost import Partition
from ctxext.planning import search
from ctxext.planning.calibrate import rates_here
from ctxext.planning.cards import Rates, card_rates
from ctxext.planning.search import Choice, SearchSpace
from ctxext.planning.time import Estimate, estimate
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_plan import RunPlan, on_gpu
from ctxext.units import counted, format_bytes, format_duration, format_flops, format_tokens, parse_bytes, parse_tokens

THIS = "this"
UNKNOWN = "no rates are known for this machine"
ONE_MACHINE = 16  # cards in one machine, at most
WORDS = {"linear": "matrices", "adapters": "adapters in fp32", "attention": "attention kernels",
         "stream": "memory bandwidth", "host": "the link to the host", "host_memory": "the host's memory",
         "link": "the link between GPUs"}  # fmt: skip


@dataclass(frozen=True)
class PlanAnswer:
    """The result of a search.

    `listed`: the fastest choice that fits, and the next ones. `longest`: the choice at the longest context that fits.
    `leanest`: the choice that needs least memory at the requested ctx. Without `rates` times are unknown, and `listed`
    begins with the choice that changes the fewest options.
    """

    requested: SearchSpace
    rates: Rates | None
    combinations: int
    fitting: int
    listed: list[Choice]
    longest: Choice | None
    leanest: Choice
    dominates: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        requested, longest = self.requested, self.longest
        return {
            "model": requested.source.name,
            "ctx": parse_tokens(requested.ctx),
            "device": {"memory": requested.memory, "cards": requested.cards,
                       "rates": None if self.rates is None else self.rates.source,
                       "measured": None if self.rates is None else self.rates.measured},
            "combinations": self.combinations,
            "fitting": self.fitting,
            "fastest": self.listed[0].as_dict(self.rates) if self.listed else None,
            "next": [choice.as_dict(self.rates) for choice in self.listed[1:]],
            "longest": None if longest is None else longest.as_dict(self.rates) | {"ctx": longest.plan.spec.ctx},
            "least_memory": self.leanest.needed,
            "dominates": self.dominates,
        }  # fmt: skip

    def refuse(self) -> None:
        """Raises CheckFailed if nothing fits."""
        if self.listed:
            return
        longest = self.longest
        raise CheckFailed(
            f"no configuration fits: at least {format_bytes(self.leanest.needed)} are needed, but there are "
            f"{format_bytes(self.requested.memory)}; {search.largest(self.leanest)}",
            hint="give more --gpus, another --gpu, or another --hybrid"
            if longest is None
            else f"the longest context that fits is {format_tokens(longest.plan.spec.ctx)} tokens",
        )

    def rows(self) -> list[tuple[str, str]]:
        """Returns (name, value) lines for the screen, without the commands."""
        requested = self.requested
        where = (
            f"{format_bytes(requested.memory)} each, {requested.cards} GPUs"
            if requested.cards > 1
            else format_bytes(requested.memory)
        )
        rows = [
            ("model", f"{requested.source.name} ({pattern_text(requested.source.kinds)})"),
            ("ctx", f"{format_tokens(parse_tokens(requested.ctx))} tokens"),
            ("on", f"{where}; {UNKNOWN if self.rates is None else self.rates.source}"),
            ("tried", f"{counted(self.combinations, 'combination')}, {self.fitting} fit"),
        ]  # fmt: skip
        if not self.listed:
            return rows
        best = self.listed[0]
        took = best.timed(self.rates)
        rows += [
            ("memory", format_bytes(best.needed) + (f", {format_bytes(best.host)} on the host" if best.host else "")),
            *((f"  {name}", format_bytes(size)) for name, size in best.plan.memory.items()),
        ]
        if took is None:
            flops = f"{format_flops(best.plan.step_flops)}{' on all GPUs' if best.ranks > 1 else ''}"
            return [*rows, ("a step", flops), ("time", f"not known; {measures(requested.model)}")]
        rows += [
            ("a step", f"{format_duration(took.seconds)}, {took.tokens_per_second:,.0f} tokens/s, "
             f"{format_flops(took.flops)}{' on each GPU' if best.ranks > 1 else ''}"),
        ]  # fmt: skip
        rows += [
            (f"  {part.name}", f"{format_duration(part.seconds)} ({part.seconds / took.seconds:.0%})"
             + (f", {format_flops(part.flops)}" if part.flops else f", {format_bytes(part.moved)} moved"))
            for part in took.parts
        ]  # fmt: skip
        # How sensitive the result is to the rate that matters most.
        if (most := self.dominates) is not None:
            rows.append((
                "depends most on",
                f"the rate of {WORDS[most['rate']]}: {most['share']:.0%} of the time; if it is 20% lower, a step takes "
                f"{most['slower_if_20_percent_less']:.0%} longer and "
                + ("the same configuration is fastest" if most["same_choice"] else "another configuration is fastest"),
            ))  # fmt: skip
        return rows

    def commands(self) -> list[tuple[str, Choice]]:
        """Returns (label, choice) for each shown configuration."""
        names = ["fastest", "next", "next", "next"] if self.rates is not None else ["fits", "or", "or", "or"]
        shown = list(zip(names, self.listed, strict=False))
        return [*shown, *([("longest", self.longest)] if self.longest else [])]


def ask(
    model: str,
    ctx: str | None,
    *,
    hybrid: str | None = None,
    gpu: str | None = None,
    memory: str | int | None = None,
    cards_: int = 1,
    preset: str,
    fixed: Mapping[str, Any],
) -> tuple[SearchSpace, Rates | None]:
    """Builds the request and the rates to plan with; the rates are None if none are known for this machine.

    Raises InputError for a request that cannot be planned.
    """
    if ctx is None:
        raise InputError("--ctx is missing", hint="give the context to train at, such as --ctx 100k")
    if parse_tokens(ctx) == 0:
        raise InputError("--ctx 0: a sequence has at least one token")
    if "ctx" in fixed:
        raise InputError("--set ctx: give the context with --ctx only", hint="leave --set ctx out")
    if cards_ > ONE_MACHINE:
        raise InputError(
            f"--gpus {cards_}: allowed are 1 to {ONE_MACHINE}, in one machine",
            hint="plan does not support several machines, whose network decides; finetune --hostfile does",
        )
    # Options of the machine are checked before the model is read.
    given = None if memory is None else parse_bytes(memory)
    if given is not None and given < 2**20:
        raise InputError(f"--memory {memory}: allowed is 1M or more, such as 80G")
    # The preset's fields with those of --set; the ctx is added last.
    source = resolve(model, weights=False)
    fields: dict[str, Any] = dict(presets.find("finetune", preset).data)
    for key, value in fixed.items():
        set_value(fields, key, value)
    spec = build(FinetuneSpec, fields | {"ctx": ctx}, source=f"finetune spec (preset {preset}, options)")
    rates: Rates | None
    packed, on_gpu = spec.data.document_mask, True
    if gpu == THIS or (gpu is None and given is None):
        # This machine: calibrated rates, or those of its card if that is known.
        rates, size, on_gpu = rates_here(spec.dtype, packed=packed)
        if not size and given is None:
            raise InputError("the memory of this machine's GPU is not known", hint="give it with --memory, such as 80G")
    else:
        # A named card, or a memory size alone: the rates of the reference card then stand in.
        name, card = cards.find_card(gpu or cards.REFERENCE)
        if spec.dtype == "float32":
            raise InputError(
                f"--set dtype=float32: only the bf16 rate of {name} is known, and float32 is much slower",
                hint="leave dtype out, or run ctxext plan --calibrate on that machine and use --gpu this",
            )
        rates, size = card_rates(name, packed=packed), card.memory
        if gpu is not None and given is not None and given > size:
            raise InputError(f"--memory {memory}: {name} has only {format_bytes(size)}", hint="give less")
    if not on_gpu and cards_ > 1:
        raise InputError(f"--gpus {cards_}: this machine has no GPU", hint="name a card, such as --gpu h100")
    # Without --hybrid the model keeps its layout.
    hybrids = tuple(part.strip() for part in hybrid.split(",") if part.strip()) if hybrid else (search.OWN_LAYOUT,)
    if not hybrids:
        raise InputError(f"--hybrid {hybrid!r} gives no layout", hint="give one or more, such as none,swa128-nope")
    return SearchSpace(model, source, ctx, preset, dict(fixed), fields, hybrids, on_gpu, cards_, given or size), rates


def prediction(plan: RunPlan, partition: Partition) -> tuple[str, Estimate | None]:
    """Returns the expected memory and time of a run here, in words, for its start, and the estimate.

    The estimate is None if no rates are known for this machine.
    """
    rates = rates_here(plan.spec.dtype, packed=plan.spec.data.document_mask)[0]
    memory = f"{format_bytes(sum(plan.memory.values()))} at peak"
    if not on_gpu(plan.gpu):
        memory += " (on a CPU the process itself keeps more)"  # freed blocks: docs/plan.md
    if rates is None:
        return f"{memory}; no rates known for this machine: ctxext plan MODEL --calibrate", None
    took = estimate(plan, rates, partition)
    return f"{memory}, {format_duration(took.seconds)} a step ({rates.source})", took


def measures(model: str) -> str:
    """Returns how to obtain the rates of a machine, in words."""
    return f"`ctxext plan {model} --calibrate` measures this machine in about 20 s, or name a card, such as --gpu h100"


def answer(requested: SearchSpace, rates: Rates | None) -> PlanAnswer:
    """Plans every combination and returns the Answer."""
    found = list(search.choices(requested))
    fit = search.fitting(found, rates)
    return PlanAnswer(
        requested=requested,
        rates=rates,
        combinations=len(found),
        fitting=len(fit),
        listed=search.listed(fit),
        longest=search.longest(requested),
        leanest=min(found, key=lambda choice: choice.needed),
        dominates=search.dominating(fit, rates),
    )
