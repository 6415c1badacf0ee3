"""One answer to "is there a GPU?", held against what a machine shows and what variables hide."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from ctxext.errors import EnvironmentFault
from ctxext.machine import gpu
from ctxext.machine.cards import card_here
from ctxext.machine.gpu import first_gpu, torch_build, visible_gpus
from ctxext.train import prepare
from ctxext.train.run_plan import on_gpu

SMI = """#!{python}
import sys
if sys.argv[1] == "-L":
    print("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)")
    print("GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)")
else:
    print("0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559")
    print("1, GPU-bbbb, NVIDIA A100-SXM4-40GB, 40960")
"""


@pytest.fixture
def smi(tmp_path, monkeypatch) -> None:
    """A machine with nvidia-smi on the PATH, two cards, and a torch for CUDA."""
    path = tmp_path / "bin/nvidia-smi"
    path.parent.mkdir()
    path.write_text(SMI.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(gpu, "torch_build", lambda: "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


HIDING = {None: 2, "": 0, "-1": 0, "NoDevFiles": 0, "0": 1, "1": 1, "0,1": 2, "0, 1": 2, "1,-1,0": 1, "GPU-bbbb": 1,
          "0,1,2,3": 2}  # fmt: skip


@pytest.mark.parametrize("listed", HIDING)
def test_what_cuda_visible_devices_leaves(smi, listed, tmp_path):
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_gpus(environ, tmp_path) == HIDING[listed]


def test_a_machine_with_nvidia_smi_and_hidden_cards_plans_for_its_cpu(smi, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", Path("/nowhere"))
    assert on_gpu(None) and card_here() == ("h100", 81_559 * 1024**2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert card_here() == ("a100-40", 40_960 * 1024**2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa")
    assert first_gpu() == ("NVIDIA H100 80GB HBM3", 81_559)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not on_gpu(None) and card_here() is None and on_gpu(True)


def test_the_drivers_files_tell_where_nvidia_smi_is_absent(tmp_path, monkeypatch):
    """A container whose image asked for computing alone has no nvidia-smi."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu, "torch_build", lambda: "cuda")
    assert visible_gpus({}, tmp_path) == 0
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert visible_gpus({}, tmp_path) == 2
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert visible_gpus({}, tmp_path) == 1 and visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0


def test_rocm_counts_the_nodes_with_compute_units(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "torch_build", lambda: "hip")
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for number, units in enumerate((0, 304, 304)):
        (nodes / f"{number}").mkdir(parents=True)
        (nodes / f"{number}" / "properties").write_text(f"cpu_cores_count 0\nsimd_count {units}\n")
    assert visible_gpus({}, tmp_path) == 2
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        assert visible_gpus({name: ""}, tmp_path) == 0 and visible_gpus({name: "1"}, tmp_path) == 1


def test_a_torch_for_cpus_has_no_gpu_whatever_the_machine_shows(smi, monkeypatch):
    monkeypatch.setattr(gpu, "torch_build", lambda: None)
    assert visible_gpus({}) == 0 and first_gpu({}) is None


def test_the_build_is_read_from_torchs_files():
    built = "cuda" if torch.version.cuda else "hip" if torch.version.hip else None
    assert torch_build() == built


@pytest.mark.parametrize(
    ("planned", "told"), [(True, "plan uses the GPU.*does not find one"), (False, "finds a GPU.*plan uses none")]
)
def test_a_plan_that_torch_contradicts_is_refused_before_training(plan_of, planned, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not planned)
    monkeypatch.setattr(prepare, "on_gpu", lambda given: planned)
    with pytest.raises(EnvironmentFault, match=told) as fault:
        prepare.training_device(plan_of)
    assert fault.value.hint and re.search("CUDA_VISIBLE_DEVICES", fault.value.hint)


@pytest.fixture
def plan_of(model_dir):
    from ctxext.config.loader import build
    from ctxext.model.source import resolve
    from ctxext.train.finetune_spec import FinetuneSpec
    from ctxext.train.run_plan import plan_run

    return plan_run(resolve(str(model_dir())), build(FinetuneSpec, {"ctx": 64, "steps": 1}, source="test"))


def test_the_plans_dtype_is_what_a_run_trains_in(plan_of):
    assert prepare.training_device(plan_of)[1] == getattr(torch, plan_of.dtype)
