"""ctxext convert"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxext.cli import console
from ctxext.errors import InputError

if TYPE_CHECKING:
    from ctxext.model.convert import ConversionPlan, ConversionReport
    from ctxext.retrofit.layers import Request
    from ctxext.retrofit.planner import LayerPlan

EXAMPLES = """Examples:\n
  ctxext convert llama2-7b --hybrid swa128-nope\n
  ctxext convert ./my-model --hybrid swa128-nope --full-layers 3,7,11\n
  ctxext convert ./my-model --hybrid swa128-nope --full-layers auto --budget 25% --length 100k\n
  ctxext convert qwen3-8b --hybrid SSSN --sliding-window 512 --dtype bfloat16"""


def convert(
    model: Annotated[str, typer.Argument(help="A local directory, a preset name, or a hub id")],
    hybrid: Annotated[str, typer.Option(help="A layout preset, a YAML file, or a pattern of S, N, F such as SSSN")],
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-convert-<name>]")] = None,
    full_layers: Annotated[
        str | None,
        typer.Option(
            help="odd, even, last, or layers from 0 such as 3,7,11: these are full, all others sliding; auto: the "
            "planner measures and chooses"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="auto: how many full layers, or what share of the KV cache, such as 25% [default: half of the layers]"
        ),
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="auto: tokens at which KV cache and FLOPs are counted [default: usable length]")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="auto: text to measure on [default: the embedded corpus's training part]")
    ] = None,
    calibration_tokens: Annotated[str | None, typer.Option(help="auto: how much of it [default: 8k]")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="auto: show what each layer by itself costs")] = False,
    i_know: Annotated[bool, typer.Option("--i-know", help="auto: allow a budget of no full layer")] = False,
    sliding_window: Annotated[int | None, typer.Option(help="Window in tokens, instead of the preset's")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as stored]")] = None,
    gate: Annotated[bool, typer.Option(help="Prove that the conversion computes what it should")] = True,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Accept pytorch_model.bin weights")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Turn most layers into small sliding windows and leave a few full, without touching the weights."""
    from ctxext.model.convert import plan_conversion

    auto = full_layers == "auto"
    plan = plan_conversion(
        model,
        hybrid,
        out=out,
        full_layers=None if auto else full_layers,
        sliding_window=sliding_window,
        dtype=dtype,
        allow_pickle=allow_pickle,
        force=force,
    )
    asked = {"budget": budget, "length": length, "calibration": calibration, "calibration-tokens": calibration_tokens}
    request = _request(plan, auto, {**asked, "explain": explain or None, "i-know": i_know or None})
    console.quiet_libraries()
    chosen = None if request is None else _choose(plan, request)
    report = _run(plan, chosen, gate=gate, force=force)
    if as_json:
        console.emit(report.as_dict() | ({} if chosen is None else {"planner": chosen.as_dict()}))
        return
    if chosen is not None:
        _print_choice(chosen, explain)
    console.pairs([*report.rows(), ("written to", report.out), ("seconds", f"{report.seconds:.1f}")])


def _request(plan: ConversionPlan, auto: bool, asked: dict[str, Any]) -> Request | None:
    """What the planner is asked for by its options (None: not given), checked before torch is imported."""
    from ctxext.retrofit.layers import plan_request
    from ctxext.units import parse_tokens

    given = [name for name, value in asked.items() if value is not None]
    if not auto:
        if given:
            raise InputError(f"--{given[0]} is for the planner", hint="add --full-layers auto")
        return None
    length, tokens = (None if asked[n] is None else parse_tokens(asked[n]) for n in ("length", "calibration-tokens"))
    return plan_request(
        plan.source.shape,
        plan.source.kinds,
        plan.hybrid,
        plan.source.usable_length,
        budget=asked["budget"],
        length=length,
        calibration=asked["calibration"],
        tokens=tokens,
        i_know=asked["i-know"] is not None,
    )


def _choose(plan: ConversionPlan, request: Request) -> LayerPlan:
    from ctxext.retrofit.planner import choose_layers

    console.say(f"measuring which layers of {plan.source.name} to keep full")
    with console.progress() as display:
        task = display.add_task("measuring", total=None, note="")
        return choose_layers(
            plan,
            request,
            progress=lambda what, done, total: display.update(
                task, description=f"measuring {what}", completed=done, total=total
            ),
        )


def _run(plan: ConversionPlan, chosen: LayerPlan | None, *, gate: bool, force: bool) -> ConversionReport:
    from ctxext.model.convert import run_conversion, with_kinds

    attachments: dict[str, bytes] = {}
    facts: dict[str, object] = {}
    if chosen is not None:
        from ctxext.retrofit.picture import pareto_png

        plan = with_kinds(plan, chosen.kinds)
        facts["planner"] = chosen.facts()
        attachments = {
            "retrofit.json": (json.dumps(chosen.as_dict(), indent=2) + "\n").encode(),
            "pareto.png": pareto_png(chosen),
        }
    console.say(f"converting {plan.source.name} to {plan.out}")
    with console.progress() as display:
        task = display.add_task("copying weights", total=None, note="")
        return run_conversion(
            plan,
            gate=gate,
            force=force,
            attachments=attachments,
            facts=facts,
            progress=lambda done, total: display.update(
                task, completed=done, total=total, description="proving" if done == total else "copying weights"
            ),
        )


def _print_choice(chosen: LayerPlan, explain: bool) -> None:
    if explain:
        console.table(chosen.EXPLAIN, chosen.explain())
        print()
    console.table(chosen.HEADER, chosen.rows())
    print()
    for line in chosen.notes():
        console.say(line)
