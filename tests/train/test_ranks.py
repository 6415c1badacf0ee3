"""Ranks that another program started: which variables are read, what is refused, and two processes of each starter.

The last tests start torchrun, accelerate launch and deepspeed. srun is not installed here: two processes get its
variables instead.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxext.config.loader import build
from ctxext.errors import EnvironmentFault, InputError
from ctxext.model.source import resolve
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.parallel import Launch, plan_launch
from ctxext.train.ranks import COLLECTIVE_TIMEOUT, StartedRank, first_host, read_rank
from ctxext.train.run_plan import plan_run
from ctxext.train.shared_run import _connected, exit_code, require_own_gpu

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}


def test_each_starter_is_read_from_its_variables():
    assert read_rank(TORCHRUN) == StartedRank("torchrun", 5, 8, 1, 4, "node1", 1234)
    assert read_rank(SLURM) == StartedRank("srun", 5, 8, 1, 4, "gpu03", 29956)
    assert read_rank(SLURM | {"MASTER_ADDR": "ib0", "MASTER_PORT": "7"}) == StartedRank("srun", 5, 8, 1, 4, "ib0", 7)
    assert read_rank(MPI) == StartedRank("mpirun", 3, 4, 3, 4, "127.0.0.1", 29500)
    of_deepspeed = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "4"}
    assert read_rank(of_deepspeed).local_world == 4
    # torchrun that srun started once a host
    assert read_rank(SLURM | TORCHRUN).starter == "torchrun"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0"},
        # the batch script itself, and a shell
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_a_process_that_is_alone_is_no_rank(environ):
    assert read_rank(environ) is None


def test_a_shell_of_srun_is_alone_and_a_step_that_is_started_in_it_is_not():
    shell = SLURM | {"SLURM_PTY_PORT": "40000"}
    assert read_rank(shell, terminal=True) is None and read_rank(shell).rank == 5


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun are incomplete: 'LOCAL_RANK' is not set"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8: allowed is 0 to 7"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "torchrun cannot be read"),
        (TORCHRUN | {"ACCELERATE_USE_FSDP": "true"}, "with FSDP: ranks are divided by DeepSpeed ZeRO"),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "8"}, "mpirun are incomplete: 'MASTER_ADDR'"),
    ],
)
def test_variables_that_make_no_rank_are_refused(environ, words):
    with pytest.raises(InputError, match=words):
        read_rank(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu7", "gpu1"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("a-b[1-2].c.d,x", "a-b1.c.d"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_a_gpu_that_each_process_sees_alone_has_the_number_0():
    started = read_rank(SLURM)
    assert started.variables(gpus=1)["LOCAL_RANK"] == "0" and started.variables(gpus=4)["LOCAL_RANK"] == "1"
    assert read_rank(TORCHRUN).variables(gpus=1)["LOCAL_RANK"] == "1"
    assert read_rank(TORCHRUN).variables(gpus=4) == TORCHRUN


@pytest.fixture
def plan(model_dir):
    fields = {"ctx": 64, "global_batch_size": 8, "steps": 1}
    return plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))


def test_the_processes_of_a_starter_are_those_of_the_run(plan):
    launch = plan_launch(plan, None, None, None, started=read_rank(TORCHRUN))
    assert launch.world == 8 and len(launch.hosts) == 2 and launch.stage == 2 and launch.hosts[0].local
    assert plan_launch(plan, "3", 8, None, started=read_rank(TORCHRUN)).stage == 3
    before = Launch(launch.zero | {"zero_optimization": {"stage": 1}}, launch.hosts)
    assert plan_launch(plan, None, None, None, repeats=before, started=read_rank(TORCHRUN)).stage == 1


def test_the_last_host_has_the_processes_that_remain(plan):
    uneven = read_rank(TORCHRUN | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "3"})
    launch = plan_launch(plan, None, None, None, started=uneven)
    assert [host.slots for host in launch.hosts] == [3, 3, 2] and launch.world == 8


def test_a_started_run_is_repeated_by_its_starter_or_on_one_host(plan):
    """The names of its other hosts are invented: nothing may connect to them."""
    several = plan_launch(plan, None, None, None, started=read_rank(SLURM))
    assert Launch.parse(several.dump()) == several and several.started_by == "srun"
    with pytest.raises(InputError, match="srun started that run on 8 processes of 2 hosts"):
        plan_launch(plan, None, None, None, repeats=several)
    one = plan_launch(plan, None, None, None, started=read_rank(MPI))
    again = plan_launch(plan, None, None, None, repeats=one)
    assert again.world == 4 and again.hosts[0].local and again.started_by is None


def test_two_ranks_of_one_gpu_are_refused():
    require_own_gpu(["a GPU-1", "a GPU-2", "b GPU-1"])
    with pytest.raises(EnvironmentFault, match="ranks 1 and 2 use the same GPU"):
        require_own_gpu(["a GPU-1", "a GPU-2", "a GPU-2"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(143), 143),
        (KeyboardInterrupt(), 130),
        (OSError(28, "full"), 3),
        (InputError("no"), 2),
        (ValueError(), 1),
    ],
)
def test_the_other_ranks_end_with_the_exit_code_of_rank_0(error, code):
    assert exit_code(error) == code


def test_ranks_wait_in_the_store_as_long_as_one_of_them_may_tokenise(monkeypatch):
    """NCCL connects through the store, while rank 0 tokenises: its own default ends after minutes."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    alone = StartedRank("srun", 0, 2, 0, 2, "127.0.0.1", int(free_port()))
    shared = _connected(alone)
    assert shared.store.underlying_store.timeout == COLLECTIVE_TIMEOUT
    shared.begin()
    assert not shared.wait_for_count("ready", 1, 0.2)
    shared.store.add(shared.key("ready"), 1)
    assert shared.wait_for_count("ready", 1, 0.2)
    shared.begin()
    assert not shared.wait_for_count("ready", 1, 0.2), "the second run of a process is counted by itself"


def test_options_that_do_not_fit_the_starter_are_refused(plan, tmp_path):
    with pytest.raises(InputError, match="--nproc 2: torchrun has started 8 processes already"):
        plan_launch(plan, None, 2, None, started=read_rank(TORCHRUN))
    with pytest.raises(InputError, match="--hostfile: srun has started 8 processes already"):
        plan_launch(plan, None, None, tmp_path / "hosts", started=read_rank(SLURM))
    odd = read_rank(TORCHRUN | {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "6"})
    with pytest.raises(InputError, match="a step has 8 sequences, which does not divide evenly over 6 processes"):
        plan_launch(plan, None, None, None, started=odd)


def test_a_process_on_a_machine_with_fewer_gpus_is_refused_unless_each_sees_its_own(plan, monkeypatch):
    monkeypatch.setattr("ctxext.train.parallel.visible_gpus", lambda: 1)
    with pytest.raises(InputError, match="4 processes on a machine with 1 GPU"):
        plan_launch(plan, None, None, None, started=read_rank(TORCHRUN))
    assert plan_launch(plan, None, None, None, started=read_rank(SLURM)).world == 8


TORCH_RUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ctxext"]
SCRIPTS = Path(sys.executable).parent
STARTERS = {
    "torchrun": TORCH_RUN,
    "accelerate": [
        *(SCRIPTS / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ctxext"),
    ],
    "deepspeed": [SCRIPTS / "deepspeed", "--num_gpus", "2", "--no_local_rank", "--module", "ctxext"],
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment() -> dict[str, str]:
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def finetune(model: object, steps: int, out: Path, *more: str) -> list[str]:
    options = ["--ctx", "64", "--preset", "smoke", "--set", "global_batch_size=2", "--steps", steps, "--out", out]
    return ["finetune", *map(str, [model, *options, *more])]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def slurm_tasks(arguments: list[str], cwd: Path) -> list[subprocess.Popen]:
    """Two processes with the variables that srun sets."""
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": free_port()}
    tasks = []
    for rank in ("1", "0"):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        command = [sys.executable, "-m", "ctxext", *arguments]
        tasks.append(
            subprocess.Popen(
                command,
                env=environment() | common | own,
                cwd=cwd,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return tasks


@pytest.mark.slow
def test_a_run_under_every_starter_is_that_of_our_own_launch(model_dir, tmp_path):
    """Also: one report on stdout, nothing from the other rank, no log left behind."""
    own = [sys.executable, "-m", "ctxext", *finetune(model_dir("llama"), 2, tmp_path / "own", "--nproc", "2")]
    subprocess.run(own, env=environment(), cwd=tmp_path, check=True, capture_output=True)
    for name, starter in STARTERS.items():
        run = tmp_path / name
        command = [*map(str, starter), *finetune(model_dir("llama"), 2, run, "--json")]
        done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("\n}") + 2])
        assert report["finished"] and report["out"] == str(run)
        assert losses(run) == losses(tmp_path / "own") and not (run / "logs").exists()
        assert (run / "launch.json").exists() and "2 processes" in done.stderr


@pytest.mark.slow
def test_tasks_of_slurm_stop_with_a_checkpoint_and_resume(model_dir, tmp_path):
    run = tmp_path / "run"
    tasks = slurm_tasks(finetune(model_dir("llama"), 5000, run), tmp_path)
    until = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 2:
        assert time.monotonic() < until and all(task.poll() is None for task in tasks), [t.communicate() for t in tasks]
        time.sleep(0.05)
    # scancel --signal=TERM reaches every task.
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    (other, rank_0) = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [130, 130], (other, rank_0)
    done = len(losses(run))
    assert f"stopped after step {done} of 5000" in rank_0[1] and other[0] == ""
    changed = ["--steps", str(done + 1), "--force", "--zero", "1"]
    tasks = slurm_tasks(["finetune", "--resume", "--out", str(run), *changed, "--json"], tmp_path)
    (other, rank_0) = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], (other, rank_0)
    assert json.loads(rank_0[0])["steps_done"] == done + 1 and other[0] == ""


TWICE = """
import json, sys
from ctxext import finetune
settings = {"global_batch_size": 2}
done = [finetune(sys.argv[1], ctx=64, preset="smoke", steps=steps, settings=settings, out=out).steps_done
        for steps, out in ((1, "first"), (2, "second"))]
print("DONE", json.dumps(done))
"""


@pytest.mark.slow
def test_a_script_trains_twice_under_torchrun(model_dir, tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    command = [*TORCH_RUN[:-2], str(tmp_path / "twice.py"), str(model_dir("llama"))]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DONE [1, 2]") == 2
    assert len(losses(tmp_path / "first")) == 1 and len(losses(tmp_path / "second")) == 2


@pytest.mark.slow
def test_what_rank_0_refuses_ends_every_rank_with_its_exit_code(model_dir, tmp_path):
    (tmp_path / "run").mkdir()
    tasks = slurm_tasks(finetune(model_dir("llama"), 2, tmp_path / "run"), tmp_path)
    (other, rank_0) = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], (other, rank_0)
    assert "error: run exists" in rank_0[1].replace(f"{tmp_path}/", "") and other == ("", "")
    for refused in (["--find-multiplier"], ["--set", "nothing"], ["--resume"]):
        tasks = slurm_tasks(finetune(model_dir("llama"), 2, tmp_path / "other", *refused), tmp_path)
        (other, rank_0) = [task.communicate(timeout=120) for task in tasks]
        assert [task.returncode for task in tasks] == [2, 2], (refused, other, rank_0)
        assert "error: " in rank_0[1] and not (tmp_path / "other").exists()
    # Every other command is one process.
    done = subprocess.run([*TORCH_RUN, "eval", "tiny"], env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "torchrun has started 2 processes, and ctxext eval uses one" in done.stderr
