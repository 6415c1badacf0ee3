"""The main job on the embedded model, end to end: convert, finetune, eval, merge. `make demo` runs it.

Two ways to make `tiny` (trained at 512 tokens) work at 2,048, side by side:

    a  plain: interpolated positions (YaRN), S²-Attn while training, dense attention afterwards
    b  retrofit: sliding windows with RoPE alternate with full layers without positions; nothing is interpolated

Everything goes to ./runs/demo, replaced at every start.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ctxext import api
from ctxext.cli import console
from ctxext.cli.finetune import training_display
from ctxext.eval_and_merge import eval_models, merge_run, plan_eval, plan_merge
from ctxext.model.convert import plan_conversion, run_conversion

RUNS = Path("runs/demo")
LENGTHS = [512, "1k", "2k"]
PERPLEXITY_TOKENS, PASSKEY_CASES = 16_384, 4  # tokens of text; cases for each length and each of five depths


def main() -> None:
    began = time.monotonic()
    console.quiet_libraries()
    shutil.rmtree(RUNS, ignore_errors=True)
    hybrid = RUNS / "tiny-swa-nope"

    step("convert tiny: layers alternate between a 128-token window with RoPE and full attention without")
    report = run_conversion(plan_conversion("tiny", "swa128-nope", out=hybrid))
    console.pairs(report.rows(), to_stderr=True)

    step("finetune a: tiny at 2,048 tokens with interpolated positions (YaRN) and S²-Attn")
    plain = finetune("tiny", "demo-plain")
    step("finetune b: the hybrid at 2,048 tokens")
    healed = finetune(str(hybrid), "demo-hybrid")

    step("merge both into ordinary checkpoints")
    merged = [RUNS / "merged-plain", RUNS / "merged-hybrid"]
    for run, out in zip((plain, healed), merged, strict=True):
        console.pairs(merge_run(plan_merge(str(run), out, None, force=False)).rows(), to_stderr=True)

    step("evaluate, before and after")
    names = {
        "tiny": "a  before: tiny",
        str(merged[0]): "a  after",
        str(hybrid): "b  before: converted",
        str(merged[1]): "b  after",
    }
    rows = table(names)
    console.table(["", "perplexity at 512", "1,024", "2,048", "passkey at 512", "1,024", "2,048"], rows)
    console.say(
        f"\n{time.monotonic() - began:.0f} seconds; perplexity (hf-stride) on standard-library files held out from"
    )
    console.say(f"training, passkey on {5 * PASSKEY_CASES} cases a length; everything is in {RUNS}/")


def step(line: str) -> None:
    console.say(f"\n== {line}")


def finetune(model: str, preset: str) -> Path:
    """A finetune run by preset, as `ctxext finetune MODEL --preset PRESET` does it."""
    run = RUNS / preset
    with training_display() as shown:
        report = api.finetune(
            model, preset=preset, out=run, say=console.say, on_plan=shown.on_plan, on_step=shown.on_step
        )
    if not report.finished:
        sys.exit("interrupted")
    return run


def table(names: dict[str, str]) -> list[list[str]]:
    """A row for each model: perplexity at each length, then the share of passkeys found."""
    perplexity = measure(list(names), "perplexity", {"limit": PERPLEXITY_TOKENS}, "{:.2f}")
    passkey = measure(list(names), "passkey", {"cases": PASSKEY_CASES}, "{:.0%}")
    return [[name, *a, *b] for name, a, b in zip(names.values(), perplexity, passkey, strict=True)]


def measure(models: list[str], suite: str, given: dict[str, Any], shown: str) -> list[list[str]]:
    """For each model, the suite's figure at each length, as text."""
    requested = {**given, "lengths": LENGTHS, "extrapolate": True}
    plan = plan_eval(models, suite, requested, out=RUNS / f"eval-{suite}")
    with console.progress_display() as display:
        task = display.add_task("", total=None, note="")
        report = eval_models(plan, progress=lambda what, done, total: display.update(
            task, description=what, completed=done, total=total))  # fmt: skip
    return [[shown.format(row.value) for row in model.suites[0].rows] for model in report.models]


if __name__ == "__main__":
    main()
