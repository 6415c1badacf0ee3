"""The wheel, in an environment that cannot see the checkout, brings the presets and works from there."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with the wheel in it; what ctxext depends on is lent by the running one."""
    pytest.importorskip("hatchling", reason="builds the wheel with what is installed, without a network")
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place, ROOT, cwd=place)
    (wheel,) = place.glob("ctxext-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=place)
    python = place / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=place)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=place).strip())
    # Python reads no .pth files in a directory that a .pth file names: the checkout stays out of sight.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


@pytest.mark.slow
def test_the_wheel_brings_every_preset(environment):
    code = (
        "import ctxext; from ctxext.config import presets as p; from pathlib import Path\n"
        "assert 'env' in Path(ctxext.__file__).parts, ctxext.__file__\n"
        "print(*sorted(f'{k}/{n}' for k in p.KINDS for n in p.names(k)), sep='\\n')\n"
        "[p.model_preset(p.find('models', n)) for n in p.names('models')]\n"
    )
    found = run(environment / "env" / "bin" / "python", "-c", code, cwd=environment).split()
    ours = sorted(f"{path.parent.name}/{path.stem}" for path in (ROOT / "presets").glob("*/*.yaml"))
    assert found == ours
    code = "from ctxext.train.parallel import read_zero, zero_names; print(*zero_names()); read_zero('3_offload')"
    found = run(environment / "env" / "bin" / "python", "-c", code, cwd=environment).split()
    assert found == sorted(path.stem.removeprefix("zero") for path in (ROOT / "deepspeed_configs").glob("*.json"))


@pytest.mark.slow
def test_the_command_works_from_the_wheel(environment):
    command = environment / "env" / "bin" / "ctxext"
    assert "convert" in run(command, "--help", cwd=environment)
    assert "102,400" in run(command, "finetune", "llama2-7b", "--ctx", "100k", "--plan", cwd=environment)
