"""ctxext probe"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxext.cli import completion, console

EXAMPLES = """Examples:\n
  ctxext probe tiny positions\n
  ctxext probe tiny retrieval-heads --ablate 2 --preset smoke\n
  ctxext probe ./converted all --compare tiny --preset smoke --out ./inside\n
  ctxext probe runs/20260101T000000.000000Z-finetune-tiny retrieval-trace qk-distance\n
  ctxext probe llama3.1-8b layer-niah --preset paper --dtype bfloat16 """


def probe(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A directory, a run, a preset or a hub id")],
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="receptive-field, layer-niah, gradient-influence, retrieval-heads, retrieval-trace, qk-distance, "
            "attention-distance, positions, or all",
            autocompletion=completion.probes,
        ),
    ],
    compare: Annotated[
        str | None, typer.Option(help="A model to compare with, such as the one before conversion or training")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Sizes of all probes: smoke, paper, or a YAML file", autocompletion=completion.of("probe")),
    ] = None,
    length: Annotated[str | None, typer.Option(help="Tokens [default: the usable length, at most 8k]")] = None,
    samples: Annotated[int | None, typer.Option(help="Texts or questions of each probe")] = None,
    ablate: Annotated[int | None, typer.Option(help="retrieval-heads: mask the top K heads, and K random ones")] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to measure on [default: the embedded corpus's held-out files]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for all random choices")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [default: float32]")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Also measure at lengths beyond a model's usable length")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field, as key=value or probe.key=value; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-probe-<name>]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON")] = False,
) -> None:
    """Probe the layers and heads of a model: what they attend to, what they retrieve, how far they reach."""
    from ctxext.config.loader import assignments
    from ctxext.probes.plan_probes import plan_probe

    given = {"length": length, "samples": samples, "ablate": ablate, "data": data, "seed": seed, "dtype": dtype,
             "extrapolate": extrapolate or None}  # fmt: skip
    fields = {key: value for key, value in given.items() if value is not None} | assignments(
        set_ or [], example="retrieval-heads.draws=5"
    )
    plan = plan_probe(model, names, fields, preset=preset, compare=compare, out=out, force=force)
    # After the plan, so that wrong options fail before torch is imported.
    console.quiet_libraries()
    from ctxext.probes import run_probes

    with console.progress("loading") as progress:
        report = run_probes.measure(plan, progress, console.say)
    pictures = run_probes.write(plan, report)
    if as_json:
        console.emit(asdict(report))
    else:
        _show(report, plan.out, pictures)


def _show(report: Any, out: Path, pictures: list[str]) -> None:
    for result in report.results:
        for model, finding in zip(report.models, result.findings, strict=True):
            for table in finding.tables:
                console.say(f"\n{model}, {result.probe}: {table.caption}")
                console.table(table.header, table.rows)
    console.say(f"\nwritten to {out}: {', '.join(['probes.json', *pictures])}")
