"""A run's directory before and between trainings: made, found again, read back. No torch.

run/spec.yaml       the model and the resolved spec; with it a run can be resumed or repeated
run/metrics.jsonl   one line a step
run/checkpoints/    the newest two
run/...             the bundle (train/bundle.py), written when the last step is done, ctxext.json last
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from ctxext.config import manifest as manifests
from ctxext.config.loader import build, dump_yaml, read_yaml
from ctxext.config.output import check_free
from ctxext.errors import InputError
from ctxext.model.source import resolve
from ctxext.train.plan import RunPlan, plan_run
from ctxext.train.spec import FinetuneSpec

SPEC_FILE = "spec.yaml"


def start_run(plan: RunPlan, run: Path, *, force: bool = False) -> None:
    """Make the run's directory with its spec.yaml. Raises InputError when it exists and `force` is not given."""
    check_free(run, force)
    if run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True)
    written = {"model": str(plan.source.directory.absolute()), "spec": asdict(plan.spec)}
    (run / SPEC_FILE).write_text(dump_yaml(written), "utf-8")


def discard_unstarted(run: Path) -> None:
    """Remove a run's directory when it failed before its first step was done: there is nothing in it to resume."""
    metrics = run / "metrics.jsonl"
    if (run / SPEC_FILE).is_file() and not (metrics.exists() and metrics.stat().st_size):
        shutil.rmtree(run)


def newest_unfinished(root: Path) -> Path:
    """The run under `root` that was started last and is not finished. Raises InputError when there is none."""
    runs = [path.parent for path in root.glob(f"*/{SPEC_FILE}") if not (path.parent / manifests.FILE_NAME).exists()]
    if not runs:
        raise InputError(f"no unfinished run under {root}/", hint="name one with --out")
    return max(runs, key=lambda run: (run / SPEC_FILE).stat().st_mtime_ns)


def plan_resumed(run: Path) -> RunPlan:
    """The plan of an existing run. Raises InputError when the directory is none, or the run is finished."""
    if not (run / SPEC_FILE).is_file():
        raise InputError(f"{run}: no run to resume: it has no {SPEC_FILE}")
    if (run / manifests.FILE_NAME).exists():
        raise InputError(f"{run} is finished", hint="ctxext eval or ctxext merge it")
    written = read_yaml(run / SPEC_FILE)
    if set(written) != {"model", "spec"}:
        raise InputError(f"{run / SPEC_FILE}: needs exactly model and spec, has {', '.join(written) or 'nothing'}")
    spec = build(FinetuneSpec, written["spec"], source=str(run / SPEC_FILE))
    return plan_run(resolve(written["model"]), spec)
