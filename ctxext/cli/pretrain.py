"""ctxext pretrain"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxext.cli import console

if TYPE_CHECKING:
    from ctxext.train.run_plan import RunPlan

EXAMPLES = """Examples:\n
  ctxext pretrain --preset tiny --out ./tiny"""


def pretrain(
    preset: Annotated[str, typer.Option(help="A pretrain preset or a YAML file")] = "tiny",
    out: Annotated[Path | None, typer.Option(help="Output directory [default: ./runs/<time>-pretrain-<name>]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON")] = False,
) -> None:
    """Train a small model from scratch, in the way the embedded model `tiny` was trained."""
    from ctxext.config import manifest as manifests
    from ctxext.config import presets
    from ctxext.config.loader import build
    from ctxext.train.pretrain import PretrainSpec, pretrain

    found = presets.find("pretrain", preset)
    recipe = build(PretrainSpec, found.data, source=str(found.path))
    out = out or manifests.default_out("pretrain", found.name)
    console.quiet_libraries()
    from ctxext.cli.finetune import training_display
    from ctxext.train.finetune import run_finetune
    from ctxext.train.loop import Events

    def train(plan: RunPlan, run: Path) -> Any:
        console.pairs(plan.rows(), to_stderr=True)
        with training_display() as shown:
            shown.begin(plan.steps)
            return run_finetune(plan, run, events=Events(console.say, shown.on_step))

    written = pretrain(recipe, out, force=force, train=train)
    if as_json:
        console.emit({"out": str(written)})
    else:
        console.say(f"written to {written}")
