"""The whole way in five calls: convert, heal and extend, measure, merge, one page. examples/pipeline.sh is the same as
commands, to the digit.

    python examples/pipeline.py     # `tiny`, about a minute on two CPU cores; everything goes to ./runs/pipeline

It is kept short to be read and tried, and trains too little to show much: examples/retrofit.sh is the longer one.
"""

import shutil
from pathlib import Path

from ctxext import convert, evaluate, finetune, merge, write_report

RUNS = Path("runs/pipeline")
TRAINING = {
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "memory.checkpoint": False,
    "lora.alpha": "curvature",  # tiny is narrow: its own scale and rate
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 2,
    "validation.every_steps": None,
}


def main() -> None:
    shutil.rmtree(RUNS, ignore_errors=True)
    hybrid = convert("tiny", "swa128-nope", out=RUNS / "hybrid", say=print)
    healed = finetune(
        hybrid.out, preset="heal-then-extend", ctx="512,2k", steps=16, settings=TRAINING, out=RUNS / "healed", say=print
    )
    found = evaluate(
        ["tiny", hybrid.out, healed.out],
        suite="perplexity,passkey",
        lengths=[512, "2k"],
        extrapolate=True,
        settings={"perplexity.limit": 8192, "passkey.limit": 20},
        out=RUNS / "eval",
    )
    for model in found.models:
        figures = [f"{row.suite} at {row.length:,}: {row.value:.3g}" for suite in model.suites for row in suite.rows]
        print(f"{model.model}: {', '.join(figures)}")
    merged = merge(healed.out, out=RUNS / "merged")
    page = write_report([healed.out, RUNS / "eval"], title="tiny, retrofitted", out=RUNS / "report")
    print(f"an ordinary checkpoint: {merged.out}; the page: {page.page}")


if __name__ == "__main__":
    main()
