"""What the shell completes."""

import os
import subprocess
import sys

import pytest

from ctxext.cli import completion


def test_names_begin_with_what_was_typed():
    assert completion.of("hybrid")("swa128") == ["swa128", "swa128-nope"]
    assert completion.of("finetune", "pipelines")("pipelines/ext") == ["pipelines/extend-100k", "pipelines/extend-32k"]
    assert completion.suites("perplexity,nia") == ["perplexity,niah"] and "smoke" in completion.suites("")
    assert completion.probes("attention") == ["attention-distance"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ctxext pro", "probe"),
        ("ctxext convert smol", "smollm2-135m"),
        ("ctxext convert tiny --hybrid swa5", "swa512-nope"),
        ("ctxext run retro", "retrofit-100k"),
        ("ctxext presets show finetune/he", "finetune/heal-then-extend"),
    ],
)
def test_bash_is_told_them(typed, expected):
    environment = os.environ | {
        "_CTXEXT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1),
    }  # fmt: skip
    code = "import sys; sys.argv = ['ctxext']; from ctxext.cli.app import app; app(prog_name='ctxext')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert expected in done.stdout.split(), done.stdout + done.stderr
