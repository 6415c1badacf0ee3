"""A plain `pip install ctxext`: the packages of the extras are hidden from a process, and the work goes through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDE = '''
import sys
from importlib.machinery import PathFinder

HIDDEN = {"deepspeed", "bitsandbytes", "datasets", "pyarrow", "matplotlib", "wonderwords", "lm_eval", "sklearn", "gguf"}


class Hiding(PathFinder):
    """Finds what the path has, but the hidden packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in HIDDEN else PathFinder.find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *context):
        hidden = context and (context[0].name or "").replace("-", "_") in HIDDEN
        return iter(()) if hidden else PathFinder.find_distributions(*context)


sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
'''
WORK = """
import ctxext
from ctxext import api
from ctxext.errors import EnvironmentFault
from ctxext.evals.verify import plan_launch, verify

said = []
small = {"global_batch_size": 1, "validation.every_steps": None}
api.convert("MODEL", "SN", sliding_window=8, out="hybrid", say=said.append)
api.finetune("hybrid", ctx=64, data="text.txt", steps=2, settings=small, out="run")
api.merge("run", out="merged")
assert verify(plan_launch("merged", ctx=64), device="cpu").failed == ()
api.evaluate("merged", suite="perplexity,passkey", lengths=[128], data="text.txt", limit=256, out="evaluated",
             settings={"passkey.cases": 1, "perplexity.limit": 256}, say=said.append)
assert any("the heatmaps" in line and "ctxext[report]" in line for line in said), said
for package, call in {
    "matplotlib": lambda: api.write_report("evaluated", out="page"),
    "pyarrow": lambda: api.finetune("hybrid", ctx=64, data="rows.parquet", steps=1, settings=small, out="other"),
    "DeepSpeed": lambda: api.finetune("hybrid", ctx=64, data="text.txt", steps=1, zero="2", nproc=2, out="other",
                                      settings=small | {"global_batch_size": 2}),
}.items():
    try:
        call()
    except EnvironmentFault as fault:
        assert package in f"{fault}", (package, fault)
    else:
        raise AssertionError(f"{package} is missing, and nothing was said")
print("all of it")
"""


def test_what_needs_no_extra_works_without_any(model_dir, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(HIDE)
    (tmp_path / "text.txt").write_text("".join(f"Line {i} of a text that is cut. {i * i}\n" for i in range(200)))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'hidden'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORK.replace("MODEL", str(model_dir("llama", max_position_embeddings=128)))]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("all of it\n"), done.stderr[-3000:]
