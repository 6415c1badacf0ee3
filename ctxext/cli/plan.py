"""ctxext plan"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.cli import console
from ctxext.cli.finetune import DEFAULT_PRESET

if TYPE_CHECKING:
    from ctxext.planning.answer import PlanAnswer

EXAMPLES = """Examples:\n
  ctxext plan llama2-7b --ctx 100k --gpu h100\n
  ctxext plan llama3.1-8b --ctx 64k --gpu 24gb --set attention.train=dense\n
  ctxext plan ./my-model --ctx 128k --hybrid none,swa128-nope --gpu h200 --gpus 8\n
  ctxext plan llama2-7b --ctx 32k --memory 48G\n
  ctxext plan tiny --ctx 8k --calibrate"""


def plan(
    model: Annotated[str, typer.Argument(help="A directory with a config.json (weights are not needed), or a preset")],
    ctx: Annotated[str | None, typer.Option(help="Training context in tokens, such as 8192, 100k (k = 1024)")] = None,
    hybrid: Annotated[
        str | None,
        typer.Option(help="Layout that `convert` would give the model; several separated by commas; none: unconverted"),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="A card, such as h100, 4090 or 24gb; `this` is this machine [default: this]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a card, such as 80G: instead of --gpu, or a lower limit for it")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=16, help="Number of cards, all in one machine")] = 1,
    preset: Annotated[str, typer.Option(help="A finetune preset or a YAML file")] = DEFAULT_PRESET,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Fix a field of the spec, as key=value: the search leaves it unchanged"),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the speed of this machine first (about 20 s) and store it")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON")] = False,
) -> None:
    """Predict memory, FLOPs and time of a finetune, and settings with which it fits and is fast. Trains nothing."""
    from ctxext.config.loader import assignments
    from ctxext.planning.answer import answer, ask

    if calibrate:
        from ctxext.model.source import resolve
        from ctxext.planning.calibrate import calibrate as measure

        # A wrong MODEL must fail before the measurement, which takes about 20 s.
        resolve(model, weights=False)
        measured = measure(console.say)
        for one in measured:
            console.say(f"{one.as_rates().source}: {one.rates['linear'][-1][1] / 1e9:,.0f} GFLOP/s in matrices")
        if ctx is None:
            if as_json:
                console.emit([asdict(one) for one in measured])
            return
    fixed = assignments(set_ or [], example="attention.train=dense")
    found = answer(*ask(model, ctx, hybrid=hybrid, gpu=gpu, memory=memory, cards_=gpus, preset=preset, fixed=fixed))
    if as_json:
        console.emit(found.as_dict())
    else:
        _show(found)
    found.refuse()


def _show(found: PlanAnswer) -> None:
    from ctxext.units import format_bytes, format_duration, format_tokens

    console.pairs(found.rows())
    for name, choice in found.commands():
        took = choice.timed(found.rates)
        time = "time unknown"
        if took is not None:
            time = f"{format_duration(took.seconds)} a step, {took.tokens_per_second:,.0f} tokens/s"
        print(
            f"\n{name}: ctx {format_tokens(choice.plan.spec.ctx)}, {time}, {format_bytes(choice.needed)}"
            + (f", {format_bytes(choice.host)} on the host" if choice.host else "")
        )
        print("\n".join(f"  {line}" for line in choice.commands()))
