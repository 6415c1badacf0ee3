"""ctxext eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ctxext.cli import completion, console

EXAMPLES = """Examples:\n
  ctxext eval --suite perplexity\n
  ctxext eval --suite smoke tiny\n
  ctxext eval ./converted ./merged --against tiny --suite passkey,niah --lengths 512,1k,2k --extrapolate\n
  ctxext eval ./my-model --suite perplexity --protocol longlora --lengths 8k,32k --data book.txt --json\n
  ctxext eval ./my-model --suite ruler --lengths 4k,8k --limit 260 --set ruler.seed=1"""


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Directories, presets or hub ids [default: the newest output]"),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="perplexity, longppl, passkey, niah, ruler, longbench, short, several joined by commas, "
            "or an eval preset such as smoke",
            autocompletion=completion.suites,
        ),
    ] = "perplexity",
    lengths: Annotated[
        str | None, typer.Option(help="Lengths in tokens, such as 2k,4k,8k [default: the usable length]")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A model to compare each of the others with, item by item")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text to measure on, or to hide needles in [default: the embedded corpus's held-out files]"),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of JSONL and Parquet rows that has the text")] = None,
    protocol: Annotated[str | None, typer.Option(help="perplexity: hf-stride, longlora or truncate")] = None,
    evaluator: Annotated[str | None, typer.Option(help="longppl: the model that finds the key tokens")] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            help="perplexity: number of tokens; longppl: documents; other suites: cases, spread evenly over the lengths"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for drawing the cases")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [default: float32]")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Also measure at lengths beyond a model's usable length")
    ] = False,
    nope_log_scale: Annotated[
        float | None,
        typer.Option(
            help="A, such as 500: multiply queries at position t by log(t + A) / log(A) in layers without RoPE"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field, as key=value or suite.key=value; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-eval-<suite>]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Evaluate models side by side: every number is reported with its protocol, length and text."""

    # None means not given; a preset's own value then stays.
    given = {"data": data, "text_field": text_field, "protocol": protocol, "evaluator": evaluator, "limit": limit,
             "seed": seed, "dtype": dtype, "extrapolate": extrapolate or None,
             "nope_log_scale": nope_log_scale}  # fmt: skip
    _run(models or [_newest()], suite, _fields(given, lengths, set_ or []), against, out, force, as_json)


def _newest() -> str:
    from ctxext.config import manifest as manifests

    newest = manifests.newest(manifests.RUNS, ("conversion", "model", "finetune", "merge"))
    console.say(f"no MODEL given; using the newest output, {newest}")
    return str(newest)


def _run(
    models: list[str],
    suite: str,
    fields: dict[str, Any],
    against: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    from ctxext.eval_and_merge import eval_models, plan_eval

    plan = plan_eval(models, suite, fields, against=against, out=out, force=force)
    if plan.resumes:
        console.say(f"resuming the unfinished evaluation of the same request in {plan.out}")
    console.quiet_libraries()
    with console.progress("loading") as progress:
        report = eval_models(plan, force=force, progress=progress, notice=console.say)
    if as_json:
        console.emit(report.to_dict())
    else:
        _show(report, plan.out)


def _fields(given: dict[str, Any], lengths: str | None, sets: list[str]) -> dict[str, Any]:
    from ctxext.config.loader import assignments
    from ctxext.units import parse_tokens

    # Options that were not given leave the fields of a preset as they are. --set comes last and replaces options.
    fields = {key: value for key, value in given.items() if value is not None}
    if "limit" in fields:
        fields["limit"] = parse_tokens(fields["limit"])
    if lengths is not None:
        fields["lengths"] = [part.strip() for part in lengths.split(",")]
    return fields | assignments(sets)


def _show(report: Any, out: Path) -> None:
    from ctxext.evals.suite import tables

    for caption, header, rows in tables(report):
        console.say(f"\n{caption}")
        console.table(header, rows)
    if report.differences:
        console.say("\ndifferences, paired by item, with 95% bootstrap intervals")
        columns = report.differences[0].COLUMNS
        console.table(columns, [difference.cells() for difference in report.differences if not difference.task])
    console.say(f"written to {out}")
