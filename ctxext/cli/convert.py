"""ctxext convert"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.cli import completion, console

if TYPE_CHECKING:
    from ctxext.retrofit.planner import LayerPlan

ModelArgument = Annotated[
    str, typer.Argument(help="A local directory, a preset name, or a hub id", autocompletion=completion.of("models"))
]
HybridOption = Annotated[
    str,
    typer.Option(
        help="A layout preset, a YAML file, or a pattern of S, N, F such as SSSN",
        autocompletion=completion.of("hybrid"),
    ),
]
FullLayersOption = Annotated[
    str | None,
    typer.Option(
        help="The full layers: odd, even, last, numbers from 0 such as 3,7,11, or auto (the planner measures and "
        "chooses); all others are sliding"
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(help="Text for the measurements of auto and the fit of sinks [default: the embedded corpus]"),
]
EXAMPLES = """Examples:\n
  ctxext convert llama2-7b --hybrid swa128-nope\n
  ctxext convert ./my-model --hybrid swa128-nope --full-layers 3,7,11\n
  ctxext convert ./my-model --hybrid swa128-nope --full-layers auto --budget 25% --length 100k\n
  ctxext convert qwen3-8b --hybrid SSSN --sliding-window 512 --dtype bfloat16"""


def convert(
    model: ModelArgument,
    hybrid: HybridOption,
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-convert-<name>]")] = None,
    full_layers: FullLayersOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="auto: number of full layers, or share of the KV cache such as 25% [default: half of the layers]"
        ),
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="auto: tokens at which KV cache and FLOPs are counted [default: usable length]")
    ] = None,
    calibration: CalibrationOption = None,
    calibration_tokens: Annotated[
        str | None, typer.Option(help="auto: tokens of this text to use [default: 8k]")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="auto: print the cost of each layer alone")] = False,
    i_know: Annotated[bool, typer.Option("--i-know", help="auto: allow a budget of zero full layers")] = False,
    sliding_window: Annotated[int | None, typer.Option(help="Window in tokens, instead of the preset's")] = None,
    model_class: Annotated[
        str,
        typer.Option(
            "--class",
            help="Class of the output: smollm3 or granite_swa (llama, mistral, qwen2), mellum (qwen3), or auto",
        ),
    ] = "auto",
    sinks: Annotated[
        str,
        typer.Option(
            help="auto: in a class with learned sinks (granite_swa), fit sinks for sliding layers if the model puts "
            "much of its attention on the first token; none: no sinks"
        ),
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as stored]")] = None,
    gate: Annotated[bool, typer.Option(help="Check the logits of the converted model")] = True,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Accept pytorch_model.bin weights")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Convert most layers to small sliding windows and keep a few full, without changing the weights."""
    from ctxext import api

    plan = api.plan_convert(model, hybrid, out=out, full_layers=full_layers, sliding_window=sliding_window, dtype=dtype,
                            model_class=model_class, sinks=sinks, allow_pickle=allow_pickle, force=force)  # fmt: skip
    # None means not given: plan_layers refuses planner options that are given without --full-layers auto.
    requested = {"budget": budget, "length": length, "calibration": calibration, "explain": explain or None,
                 "calibration_tokens": calibration_tokens, "i_know": i_know or None}  # fmt: skip
    request = api.plan_layers(plan, full_layers, **requested)
    console.quiet_libraries()
    with console.progress("starting") as progress:
        chosen = api.layers_for(plan, request, console.say, progress)
        report = api.write_conversion(plan, chosen, calibration=calibration, gate=gate, force=force,
                                      say=console.say, progress=progress)  # fmt: skip
    if as_json:
        console.emit(report.as_dict() | ({} if chosen is None else {"planner": chosen.as_dict()}))
        return
    if chosen is not None:
        _print_choice(chosen, explain)
    console.pairs([*report.rows(), ("written to", report.out), ("seconds", f"{report.seconds:.1f}")])


def _print_choice(chosen: LayerPlan, explain: bool) -> None:
    if explain:
        console.table(chosen.EXPLAIN, chosen.explain())
        print()
    console.table(chosen.HEADER, chosen.rows())
    print()
    for line in chosen.notes():
        console.say(line)
