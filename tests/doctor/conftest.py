"""A healthy model of every kind that doctor examines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ctxext.config.loader import build
from ctxext.eval_and_merge import merge_run, plan_merge
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import resolve
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run


@pytest.fixture(scope="session")
def chain(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its conversion, a run on that, and the run merged; do not write to them."""
    place = tmp_path_factory.mktemp("chain")
    shutil.copytree(model_dir(), place / "source")
    run_conversion(plan_conversion(str(place / "source"), "SN", out=place / "hybrid", sliding_window=16), gate=False)
    (place / "text.txt").write_text("A line of text, number after number: 1 2 3 4 5 6 7 8 9. " * 300)
    data = {"ctx": 128, "steps": 1, "global_batch_size": 1, "data": {"source": str(place / "text.txt")},
            "optimizer": {"warmup_steps": 0}}  # fmt: skip
    plan = plan_run(resolve(str(place / "hybrid")), build(FinetuneSpec, data, source="test"))
    start_run(plan, place / "run")
    run_finetune(plan, place / "run")
    merge_run(plan_merge(str(place / "run"), place / "merged", None, False))
    return place
