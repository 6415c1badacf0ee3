"""ctxext plan"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.cli import console
from ctxext.cli.options import json_option, takes
from ctxext.requests import PlanRequest

if TYPE_CHECKING:
    from ctxext.planning.answer import PlanAnswer

EXAMPLES = """Examples:\n
  ctxext plan llama2-7b --ctx 100k --gpu h100\n
  ctxext plan llama3.1-8b --ctx 64k --gpu 24gb --set attention.train=dense\n
  ctxext plan ./my-model --ctx 128k --hybrid none,swa128-nope --gpu h200 --gpus 8\n
  ctxext plan llama2-7b --ctx 32k --memory 48G\n
  ctxext plan tiny --ctx 8k --calibrate"""


@takes(PlanRequest)
def plan(
    request: PlanRequest,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the speed of this machine first (about 20 s) and store it")
    ] = False,
    as_json: Annotated[bool, json_option("what was found")] = False,
) -> None:
    """Predict memory, FLOPs and time of a finetune, and settings with which it fits and is fast. Trains nothing."""
    from ctxext import api

    if calibrate:
        measured = api.calibrate(request.model, say=console.say)
        if request.ctx is None:
            if as_json:
                console.emit([asdict(one) for one in measured])
            return
    found = api.plan(request)
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
