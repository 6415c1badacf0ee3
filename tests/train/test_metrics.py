"""Utilisation: only where the device's peak is known, and by FLOPs that nothing is computed twice for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ctxext.config.loader import build
from ctxext.model.source import resolve
from ctxext.train import loop
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.metrics import STEPS, JsonLines, peak_flops, read
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run


def plan_for(model, **fields):
    return plan_run(resolve(model, weights=False), build(FinetuneSpec, fields, source="test"))


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 0),
        ("NVIDIA GeForce RTX 4090 D", 0),
    ],
)
def test_a_peak_is_that_of_the_very_device(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "auto") == tera * 1e12
    assert peak_flops(torch.device("cuda"), "float32") == 0.0
    assert peak_flops(torch.device("cpu"), "bfloat16") == 0.0


def test_model_flops_are_those_of_the_papers():
    """6 N a token (PaLM, appendix B) and 12 L H D for each pair that is seen, when every weight trains."""
    T, N = 102_400, 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 32_000 * 4096
    attention = {"train": "dense"}
    plans = [
        plan_for("llama2-7b", ctx=T, tuning="full", global_batch_size=3, attention=attention, memory={"checkpoint": c})
        for c in (True, False)
    ]
    pairs = T * (T + 1) // 2
    assert {plan.model_flops for plan in plans} == {3 * (6 * N * T + 12 * 32 * 32 * 128 * pairs)}
    assert plans[0].step_flops > plans[1].step_flops > plans[1].model_flops
    lora = plan_for("llama2-7b", ctx=T, global_batch_size=3, attention=attention)
    assert lora.model_flops == 3 * (4 * N * T + 12 * 32 * 32 * 128 * pairs)  # no gradient of a frozen weight


@pytest.mark.parametrize("peak", [0.0, 1e9])
def test_a_step_has_its_utilisation_where_the_peak_is_known(peak, model_dir, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some words to train on. " * 500)
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: peak)
    fields = {"ctx": 64, "steps": 2, "global_batch_size": 1, "data": {"source": str(tmp_path / "text.txt")}}
    plan = plan_for(str(model_dir("llama")), **fields)
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    for line in read(tmp_path / "run" / STEPS):
        if peak:
            assert line["mfu"] == pytest.approx(plan.model_flops / line["seconds"] / peak)
        else:
            assert "mfu" not in line


def line(step: int, size: int = 3000) -> dict:
    return {"step": step, "text": "x" * size}


def test_lines_that_a_full_disk_refuses_wait_in_memory(small_disk):
    disk, said = small_disk(1024**2), list[str]()
    log = JsonLines(disk.path / "metrics.jsonl", 0, say=said.append)
    log.append(line(1))
    disk.fill()
    for step in (2, 3, 4):
        log.append(line(step))
    # The file ends within a line, and no reader takes that for a line.
    assert [found["step"] for found in read(log.path)] == [1]
    assert len(said) == 1 and "metrics.jsonl cannot be written at present: the disk of" in said[0]
    disk.make_room()
    log.append(line(5))
    assert read(log.path) == [line(step) for step in range(1, 6)]
    disk.fill()
    log.append(line(6))
    log.append(line(7))
    log.close()
    assert "lacks the last 2 lines" in said[-1] and [found["step"] for found in read(log.path)] == [1, 2, 3, 4, 5]


def test_steps_are_forgotten_on_a_full_disk_too(small_disk):
    disk = small_disk(1024**2)
    path = disk.path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, 9)) + '{"step": 9')
    disk.fill()
    log = JsonLines(path, 6)
    assert [found["step"] for found in read(path)] == [1, 2, 3, 4, 5, 6]
    log.append(line(7, 100))
    log.close()
    assert read(path)[-1] == line(7, 100)


def test_a_broken_line_in_the_middle_goes_and_a_kill_meanwhile_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 2}\n{"step": 3}\n')
    before = path.read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            JsonLines(path, 2)
    assert path.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]
    JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
