"""ZeRO against one process: every step's loss, what is saved, what is resumed; and what goes wrong among processes.

The numbers are compared in fp32 over gloo. Two processes run all of the configurations one after the other, since
starting them costs more than the runs; the last test starts them as a user does.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ctxext.config.loader import build
from ctxext.errors import EnvironmentFault, InputError
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import resolve
from ctxext.train import finetune, loop
from ctxext.train import launch as launching
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.launch import Death, check_environment, check_port
from ctxext.train.loop import Events
from ctxext.train.parallel import Host, Launch, plan_launch, read_hostfile, read_zero, zero_names
from ctxext.train.ranks import leave
from ctxext.train.run_directory import plan_resumed, start_run
from ctxext.train.run_plan import plan_run

RATE = 1e-3
PARTITION_ALL = {"stage3_param_persistence_threshold": 0}  # weights this small would be kept whole otherwise
KINDS: dict[str, dict[str, Any]] = {
    "lora-untied": {"steps": 3, "validation": {"every_steps": 3, "sequences": 3}},
    "lora-tied": {"steps": 2},
    "full-untied": {"steps": 3, "tuning": "full"},
    "full-tied": {
        "steps": 2,
        "tuning": "full",
        "ctx": 128,
        "memory": {"checkpoint": 2},
        "validation": {"every_steps": 2, "passkey": {"lengths": [128], "depths": [0.0, 0.5, 1.0], "cases": 1}},
    },
    "staged-untied": {"steps": 2, "stages": [32], "tuning": "full"},
    "heal-tied": {"steps": 4, "distill": {"objectives": [{"attention": 1.0}, {"kl": 1.0, "hidden": 0.1, "ce": 0.1}]}},
}
CLIPPED = {"full-untied": {"clip": 2}}
LAYERS = 2
COMPARED = [
    *[("1", kind) for kind in ("lora-untied", "lora-tied", "full-untied", "staged-untied")],
    *[("2", kind) for kind in ("lora-untied", "lora-tied", "full-untied", "staged-untied")],
    ("2", "heal-tied"),
    *[("3", kind) for kind in KINDS],
]


def configuration(name: str) -> dict[str, Any]:
    zero = read_zero(name)
    if name.startswith("3"):
        zero["zero_optimization"] |= PARTITION_ALL
    return zero


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into many sequences. {i * i}\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def conversion(model_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("conversion") / "out"
    source = model_dir("llama", tie_word_embeddings=True, num_hidden_layers=LAYERS)
    run_conversion(plan_conversion(str(source), "SN", out=out, sliding_window=16), gate=False)
    return out


@pytest.fixture(scope="module")
def make_plan(model_dir, text, conversion):
    def make(kind: str, **more: Any):
        fields: dict[str, Any] = {
            "ctx": 64,
            "global_batch_size": 4,
            "data": {"source": str(text)},
            "faults": {"save_steps": 1, "keep": 10},
            "validation": {"every_steps": None},
            **KINDS[kind],
            **more,
        }
        # norms and biases are not decayed, under ZeRO-3 as well, where a matrix has one dimension
        common = {"learning_rate": RATE, "warmup_steps": 0, "weight_decay": 0.1}
        fields["optimizer"] = common | fields.get("optimizer", {})
        model = model_dir("llama", tie_word_embeddings=kind.endswith("-tied"), num_hidden_layers=LAYERS)
        model = conversion if "distill" in fields else model
        return plan_run(resolve(str(model)), build(FinetuneSpec, fields, source="test"))

    return make


def one_process(run: Path, job: dict[str, Any]):
    """Carry out a job here: `stop` after a step; in call `nan` (from 1) the loss is not finite; before the step of call
    `clip`, norms are made believe to have been 1."""
    real, calls = loop.forward_backward, iter(range(1, 100))
    set_up, alive, said = finetune.set_up, list[int](), list[str]()

    def counted(*given):
        gc.collect()
        entries = [x.numel() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        alive.append(sum(n for n in entries if type(n) is int and n > 1000))  # other tests leave symbols
        return set_up(*given)

    def planted(engine, *rest):
        loss, call = real(engine, *rest), next(calls)
        if call == job.get("clip"):
            engine.clip.mean, engine.clip.seen = 1.0, engine.clip.WARM_STEPS
        return float("nan") if call == job.get("nan") else loss

    def on_step(metrics):
        if metrics.step == job.get("stop"):
            signal.raise_signal(signal.SIGTERM)

    loop.forward_backward, finetune.set_up = planted, counted
    try:
        plan, events = plan_resumed(run), Events(said.append, on_step)
        return run_finetune(plan, run, resume=job.get("resume", False), events=events, zero=job.get("zero"))
    finally:
        loop.forward_backward, finetune.set_up = real, set_up
        (run / "alive.json").write_text(json.dumps(alive))
        if os.environ.get("RANK", "0") == "0":
            (run / "said.json").write_text(json.dumps(said))


def two_processes(root: Path, jobs: list[dict[str, Any]], **environment: str) -> None:
    """Carry out jobs, each a run's directory below `root`, on two ranks, which end with the last of them."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in ("0", "1"):
        ranks = os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu"} | environment
        with (root / f"rank-{rank}.log").open("wb") as log:
            command = [sys.executable, __file__, str(root)]
            processes.append(subprocess.Popen(command, env=ranks, stdout=log, stderr=log, cwd=root))
    try:
        codes = [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((root / f"rank-{rank}.log").read_text()[-3000:] for rank in (0, 1))
    assert codes == [0, 0], logs


def losses(run: Path, field: str = "loss") -> list[float]:
    return [json.loads(line)[field] for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(run: Path) -> dict[str, torch.Tensor]:
    path = run / "adapter_model.safetensors"
    return load_file(path if path.exists() else run / "model.safetensors")


def assert_same(run: Path, one: Path) -> None:
    """Losses, norms and clip to 1e-5, relative. Weights to a hundredth of the way that Adam can have moved them: it
    divides a gradient by its size, so that where one is almost zero, rounding alone decides which way the weight goes.
    """
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    for field in ("gradient_norm", "gradient_scale"):
        assert losses(run, field) == pytest.approx(losses(one, field), rel=1e-4)
    ours, theirs = result(run), result(one)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0.01 * RATE * len(losses(one)), msg=name)


@pytest.fixture(scope="module")
def root(make_plan, tmp_path_factory) -> Path:
    """Every run of the tests below, done: one/<kind> on one process, <stage>/<kind> on two, and the odd ones."""
    root = tmp_path_factory.mktemp("zero")
    jobs = []
    for kind in KINDS:
        start_run(make_plan(kind), root / "one" / kind)
        one_process(root / "one" / kind, CLIPPED.get(kind, {}))
    for stage, kind in COMPARED:
        start_run(make_plan(kind), root / stage / kind)
        jobs.append({"run": f"{stage}/{kind}", "zero": configuration(stage), **CLIPPED.get(kind, {})})
    for name in ("stopped/one", "stopped/3", "nan/one", "nan/2", "nan/3"):
        start_run(make_plan("lora-untied", validation={"every_steps": None}), root / name)
    one_process(root / "nan/one", {"nan": 2})
    one_process(root / "stopped/one", {"stop": 1})
    step_1 = "checkpoints/step-000001/tensors.safetensors"
    shutil.copy(root / "stopped/one" / step_1, root / "stopped/one/step-1.safetensors")
    jobs += [{"run": f"nan/{stage}", "zero": configuration(stage), "nan": 2} for stage in ("2", "3")]
    jobs += [{"run": "stopped/3", "zero": configuration("3"), "stop": 1}]
    jobs += [{"run": "stopped/one", "zero": configuration("3"), "resume": True}]
    two_processes(root, jobs)
    shutil.copy(root / "stopped/3" / step_1, root / "stopped/3/step-1.safetensors")
    return root


@pytest.mark.parametrize(("stage", "kind"), COMPARED)
def test_every_loss_and_the_saved_weights_are_those_of_one_process(stage, kind, root):
    assert_same(root / stage / kind, root / "one" / kind)
    assert (min(losses(root / stage / kind, "gradient_scale")) < 0.99) == (kind in CLIPPED)
    if "validation" in KINDS[kind]:
        held_out = [
            [json.loads(line)["loss"] for line in (root / name / kind / "validation.jsonl").read_text().splitlines()]
            for name in (stage, "one")
        ]
        assert held_out[0] == pytest.approx(held_out[1], rel=1e-5) and len(held_out[0]) == 2
    if "passkey" in KINDS[kind].get("validation", {}):
        ours, theirs = (
            json.loads((root / name / kind / "validation.jsonl").read_text().splitlines()[-1])["passkey"]
            for name in (stage, "one")
        )
        assert len(ours["cells"]) == 3  # one more than the ranks
        for a, b in zip([ours, *ours["cells"]], [theirs, *theirs["cells"]], strict=True):
            assert (a["accuracy"], a["answer_nats"]) == (b["accuracy"], pytest.approx(b["answer_nats"], rel=1e-4))


@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_attention_on_the_first_token_is_measured_under_every_stage(stage, root):
    ours, one = (
        [line for line in json.loads((root / name / "lora-untied" / "said.json").read_text()) if "sinks" in line]
        for name in (stage, "one")
    )
    assert ours == one and len(one) == 1 and "% of the attention is on the first token" in one[0]


@pytest.mark.parametrize("stage", ["one", "1", "2", "3"])
def test_a_context_leaves_nothing_in_memory_for_the_next(stage, root):
    """Entries of large tensors alive before each context's model is built; a model has 30,000 and two moments each."""
    before, between = json.loads((root / stage / "staged-untied" / "alive.json").read_text())
    assert between - before < 1000


def test_the_checkpoint_of_step_1_holds_every_tensor_whole(root):
    paths = (root / "stopped" / name / "step-1.safetensors" for name in ("3", "one"))
    ours, one = map(load_file, paths)
    names = {key.removeprefix("master/") for key in one if key.startswith("master/")}
    assert len(names) == 4 * LAYERS * 2 + 1 + LAYERS * 2 + 1
    kinds = ("master", "exp_avg", "exp_avg_sq", "step")
    assert ours.keys() - {"rng"} == {f"{kind}/{name}" for kind in kinds for name in names}
    for name, tensor in one.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_loss_that_is_not_finite_goes_back_on_every_rank(stage, root):
    assert losses(root / "nan" / stage, "learning_rate_factor") == [1.0, 0.5, 0.5]
    assert_same(root / "nan" / stage, root / "nan/one")


def test_a_run_goes_on_under_another_stage_or_none(root, make_plan):
    whole = root / "nan" / "whole"
    start_run(make_plan("lora-untied", validation={"every_steps": None}), whole)
    one_process(whole, {})
    one_process(root / "stopped/3", {"resume": True})
    for name in ("one", "3"):
        assert_same(root / "stopped" / name, whole)


@pytest.mark.slow
def test_offload_trains_the_same(make_plan, tmp_path):
    """DeepSpeed compiles its optimizer first, for more than a minute, and keeps it in the user's cache."""
    jobs = []
    for kind in ("lora-tied", "full-untied"):
        start_run(make_plan(kind), tmp_path / "one" / kind)
        one_process(tmp_path / "one" / kind, {})
        for name in ("2_offload", "3_offload"):
            start_run(make_plan(kind), tmp_path / name / kind)
            jobs.append({"run": f"{name}/{kind}", "zero": configuration(name)})
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
    two_processes(tmp_path, jobs, TORCH_EXTENSIONS_DIR=cache)
    for job in jobs:
        run = tmp_path / job["run"]
        assert_same(run, tmp_path / "one" / run.name)


# Refusals


def test_what_is_shipped_can_be_read_and_says_how_to_partition_only():
    assert zero_names() == ["1", "2", "2_offload", "3", "3_offload"]
    assert [read_zero(name)["zero_optimization"]["stage"] for name in zero_names()] == [1, 2, 2, 3, 3]
    assert read_zero("zero3") == read_zero("3")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"gradient_clipping": 1.0},
            ["gradient_clipping: not allowed here; set it in the training spec: optimizer.clip"],
        ),
        ({"train_batch_size": 8, "bf16": {"enabled": True}}, ["global_batch_size", "bf16: not allowed here", "dtype"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, ["optimizer.params.lr", '"auto"']),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, ["zero_optimization.reduce_bucket_size"]),
        ({"zero_optimisation": {}}, ["zero_optimisation: unknown key", "communication_data_type"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage", "1, 2, 3"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ['"cpu"']),
    ],
)
def test_a_literal_of_the_spec_is_refused_in_the_configuration(data, words, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | data))
    with pytest.raises(InputError) as caught:
        read_zero(str(path))
    assert all(word in caught.value.message for word in words), caught.value.message


def test_what_no_launch_can_do_is_refused(make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr("ctxext.train.parallel.visible_gpus", lambda: 0)
    plan = make_plan("lora-untied")
    assert plan_launch(plan, None, None, None) is None
    assert plan_launch(plan, None, 1, None) is None
    assert plan_launch(plan, None, 2, None).stage == 2
    assert plan_launch(plan, "3", None, None).world == 1
    (tmp_path / "hosts").write_text("# ours\nnode1 slots=2\n\nnode2 slots=2  # the old one\n")
    assert read_hostfile(tmp_path / "hosts") == (Host("node1", 2), Host("node2", 2))
    (tmp_path / "bad").write_text("node1 slots=2\nnode2\n")
    (tmp_path / "near").write_text("localhost slots=1\nnode2 slots=1\n")
    eight = make_plan("lora-untied", optimizer={"name": "adamw8bit"})
    tiles = make_plan("lora-untied", memory={"tiles": 16})
    for arguments, words in [
        ((plan, "2", 3, None), "4 sequences, which does not divide evenly over 3 processes"),
        ((plan, "2", 3, None), "3 or 6"),
        ((plan, "2", 8, None), "allowed: 8"),
        ((plan, "4", 2, None), "1, 2, 2_offload, 3, 3_offload"),
        ((plan, "none.json", 2, None), "no file none.json"),
        ((plan, "2", 2, tmp_path / "hosts"), "both give the number of processes"),
        ((plan, "2", None, tmp_path / "bad"), "line 2: 'node2'"),
        ((plan, "2", None, tmp_path / "none"), "cannot read"),
        ((plan, "2", None, tmp_path / "near"), "node2 cannot reach"),
        ((eight, "2", 2, None), "allowed is adamw"),
        ((tiles, "3", 2, None), "memory.tiles"),
    ]:
        with pytest.raises(InputError) as caught:
            plan_launch(*arguments)
        assert words in f"{caught.value.message} {caught.value.hint}", caught.value.message


def test_a_machine_that_cannot_run_it_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    plain, offload = (Launch(read_zero(name), (Host("localhost", 2),)) for name in ("2", "2_offload"))
    check_environment(plain)
    check_environment(offload)  # the lock is fresh: somebody may be building
    os.utime(lock, (time.time() - 600, time.time() - 600))
    monkeypatch.setattr(launching, "BUILD_PROCESSES", set())
    check_environment(plain)
    with pytest.raises(EnvironmentFault, match="left by a build that was killed") as caught:
        check_environment(offload)
    assert str(lock) in caught.value.hint
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(EnvironmentFault, match="no-compiler not found"):
        check_environment(offload)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(EnvironmentFault, match=f"port {other.getsockname()[1]} of localhost"):
            check_port(Launch(read_zero("2"), (Host("localhost", 1), Host("localhost", 1))))
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="DeepSpeed is not installed"):
        check_environment(plain)


def test_who_died_is_named_with_its_signal_or_exit_code():
    assert Death("rank 1", -signal.SIGKILL).words() == "rank 1 failed (SIGKILL)"
    assert Death("rank 0", 3).words() == "rank 0 failed (exit code 3)"


# As a user starts it


def ctxext(*arguments: object, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", "from ctxext.cli import main; main()", "finetune", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def when_trained(run: Path, steps: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < steps:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)


def options(run: Path, text: Path, steps: int) -> list[object]:
    fixed = ["--set", "global_batch_size=2", "--steps", steps]
    return ["--ctx", "64", "--preset", "smoke", "--data", text, *fixed, "--out", run]


def test_a_rank_that_dies_ends_the_run_in_one_line(model_dir, text, tmp_path):
    run = tmp_path / "run"
    process = ctxext(model_dir("llama"), *options(run, text, 5000), "--nproc", "2", cwd=tmp_path)
    when_trained(run, 2, process)
    ranks = {rank_of(pid): pid for pid in children(process.pid)}
    os.kill(ranks["1"], signal.SIGKILL)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 3 and out == "", said
    assert "error: rank 1 failed (SIGKILL); the others were stopped\n" in said and "Traceback" not in said, said
    assert not psutil.pid_exists(ranks["0"])
    assert (run / "logs" / "rank-0.log").exists() and any(run.glob("checkpoints/step-*"))


@pytest.mark.slow
def test_two_hosts_stop_when_told_and_the_run_goes_on(model_dir, text, tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=1\nlocalhost slots=1\n")
    run = tmp_path / "run"
    arguments = [*options(run, text, 5000), "--zero", "2", "--hostfile", "hosts"]
    process = ctxext(model_dir("llama"), *arguments, cwd=tmp_path)
    when_trained(run, 2, process)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 130 and out == "" and "stopped after step" in said, said
    assert "ZeRO 2, 2 processes on 2 hosts" in said and not (run / "logs").exists()
    done = len(losses(run))
    assert (run / f"checkpoints/step-{done:06d}").is_dir()
    changed = ["--steps", done + 2, "--force"]
    process = ctxext("--resume", "--out", run, *changed, "--zero", "1", "--nproc", "2", "--json", cwd=tmp_path)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0 and f"resuming after step {done}" in said, said
    report = json.loads(out)
    assert (
        report["finished"] and report["steps_done"] == done + 2 == len(losses(run)) and report["trained_tensors"] == 42
    )


@pytest.mark.slow
def test_what_a_rank_refuses_is_said_once_and_leaves_nothing(model_dir, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    run = tmp_path / "run"
    process = ctxext(model_dir("llama"), *options(run, tmp_path / "short.txt", 2), "--zero", "3", cwd=tmp_path)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 2 and out == "" and said.count("error: ") == 1 and "Traceback" not in said, said
    assert not run.exists()


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def rank_of(pid: int) -> str | None:
    return psutil.Process(pid).environ().get("RANK")


if __name__ == "__main__":  # one rank of two_processes
    for each in json.loads((Path(sys.argv[1]) / "jobs.json").read_text()):
        one_process(Path(sys.argv[1]) / each["run"], each)
    leave()
