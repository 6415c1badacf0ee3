"""Out-of-memory errors: the largest items of a plan's estimate, and the next option that lowers them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ctxext.errors import EnvironmentFault
from ctxext.machine.memory import is_out_of_memory
from ctxext.train.run_plan import RunPlan
from ctxext.units import format_bytes, format_tokens

TILE = 4096  # tokens; the suggested value of memory.tiles


@contextmanager
def explaining_out_of_memory(plan: RunPlan) -> Iterator[None]:
    """Raises `out_of_memory` in place of an out-of-memory error inside the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(plan, error) from error
        raise


def out_of_memory(plan: RunPlan, error: BaseException) -> EnvironmentFault:
    """Returns the error to raise: the largest items as estimated, and the option that lowers them."""
    ranked = sorted(plan.memory.items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in ranked[:3])
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return EnvironmentFault(
        f"out of memory at ctx {format_tokens(plan.spec.ctx)}{f': {reason}' if reason else ''}. Estimated: "
        f"{format_bytes(sum(plan.memory.values()))}, the largest parts are {largest}",
        hint=f"try {next_knob(plan)}; --resume --force --set OPTION continues from the last checkpoint with it",
    )


def next_knob(plan: RunPlan) -> str:
    """Returns the `--set` option that lowers the largest item that can still be lowered.

    `micro_batch_size` comes before all others. The options that keep the numbers of the run come before those that
    change them or need more cards. A smaller ctx is the fallback if no option is left.
    """
    spec, memory = plan.spec, plan.spec.memory
    if spec.micro_batch_size > 1:
        return "micro_batch_size=1"
    # Tiles are for sliding and S² layers. They leave no sink tokens, so that they would change a run that has some.
    tileable = (
        spec.ctx > TILE
        and not plan.sink_tokens
        and any(pattern.sliding_window or pattern.group_size for pattern in plan.patterns)
    )
    # Items of the memory estimate -> the option that lowers them; None if it is already set.
    same_numbers = {
        "activations": "memory.checkpoint=true" if not memory.checkpoint else None,
        "layer": "memory.checkpoint=true" if memory.checkpoint > 1
        else f"memory.tiles={TILE}" if tileable and memory.checkpoint and (memory.tiles or 2 * TILE) > TILE else None,
        "checkpoints": "memory.offload=true" if memory.checkpoint and not memory.offload else None,
        "kept attention": "memory.keep=nothing" if memory.keep != "nothing" else None,
    }  # fmt: skip
    # Each item's alternatives: more cards keep the numbers, but ZeRO does not divide quantised weights.
    whole = memory.quantize == "none"
    alternatives = {
        "trainable": {"--zero 2 over several cards": whole, "optimizer.name=adamw8bit": spec.optimizer.name == "adamw"},
        "weights": {"--zero 3 over several cards": whole, "memory.quantize=nf4": whole and spec.tuning == "lora"},
    }
    others = {name: ", or ".join(x for x, left in given.items() if left) for name, given in alternatives.items()}
    # The largest item comes first, so that the first option found is the one to try.
    ranked = sorted(plan.memory, key=lambda name: -plan.memory[name])
    found = [knob for knobs in (same_numbers, others) for name in ranked if (knob := knobs.get(name))]
    return found[0] if found else "a smaller --ctx"
