"""Turns --zero, --nproc and --hostfile into a Launch: the processes, hosts and ZeRO partitioning. No torch.

A file for --zero (deepspeed_configs/) configures partitioning and communication only. Batch sizes, learning rates,
clipping, precision and recomputation belong to the training spec. The file may not repeat them and is refused if it
does.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctxext.config.presets import shipped
from ctxext.data.documents import SELF
from ctxext.errors import InputError, SpecError
from ctxext.machine.gpu import visible_gpus
from ctxext.ops.cost import Partition
from ctxext.train.ranks import StartedRank
from ctxext.train.run_plan import RunPlan
from ctxext.units import counted

FOLDER, DEFAULT = "deepspeed_configs", "2"
ALLOWED = ("zero_optimization", "communication_data_type", "comms_logger", "wall_clock_breakdown")
SPEC_FIELDS = {  # DeepSpeed's keys -> the fields of the training spec that replace them
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "bf16": "dtype",
    "fp16": "dtype",
    "amp": "dtype",
    "data_types": "dtype",
    "activation_checkpointing": "memory",
}
BUCKET = 500_000_000  # DeepSpeed's default reduce_bucket_size
_HOST = re.compile(r"(?P<name>[A-Za-z0-9_.:-]+)\s+slots=(?P<slots>[1-9][0-9]*)")


@dataclass(frozen=True)
class Host:
    """A machine and its number of processes."""

    name: str
    slots: int

    @property
    def local(self) -> bool:
        """Whether this is the machine that the command runs on."""
        return self.name in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


@dataclass(frozen=True)
class Launch:
    """The content of launch.json. `zero` is the DeepSpeed configuration without the keys that the spec covers.

    started_by  None: train/launch.py starts the processes. Otherwise the program that started them, such as srun; the
                names of the hosts are then not known, and those in `hosts` are invented
    """

    zero: dict[str, Any]
    hosts: tuple[Host, ...]
    resume: bool = False
    started_by: str | None = None

    @property
    def world(self) -> int:
        """The number of processes on all hosts."""
        return sum(host.slots for host in self.hosts)

    @property
    def stage(self) -> int:
        """The stage of ZeRO: 1, 2 or 3."""
        stage: int = self.zero["zero_optimization"]["stage"]
        return stage

    @property
    def partition(self) -> Partition:
        """The ZeRO partitioning, for the plan's memory. Missing keys have DeepSpeed's defaults."""
        zero, stage = self.zero["zero_optimization"], self.stage
        return Partition(
            ranks=self.world,
            stage=stage,
            offload_optimizer="offload_optimizer" in zero,
            offload_weights="offload_param" in zero,
            bucket=int(zero.get("reduce_bucket_size", BUCKET)) if zero.get("contiguous_gradients", True) else 0,
            buffers=2 if stage < 3 and zero.get("overlap_comm", False) else 1,
            live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--plan --json`."""
        partition = asdict(self.partition)
        offloaded = {name: value for name, value in partition.items() if name.startswith("offload_")}
        return {"processes": self.world, "nodes": len(self.hosts), "zero_stage": self.stage, **offloaded}

    @property
    def compiles(self) -> bool:
        """Whether DeepSpeed compiles its CPU optimizer when it first runs."""
        return "offload_optimizer" in self.zero["zero_optimization"]

    def summary(self) -> str:
        """Returns one line for the screen."""
        offload = ", ".join(
            name.removeprefix("offload_") for name in self.zero["zero_optimization"] if name.startswith("offload_")
        )
        where = f" on {len(self.hosts)} hosts" if len(self.hosts) > 1 else ""
        processes = counted(self.world, "process", "processes")
        return f"ZeRO {self.stage}, {processes}{where}" + (f", {offload} offloaded" if offload else "")

    def dump(self) -> str:
        """Returns the contents of launch.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Launch:
        """Reads a launch.json."""
        return cls.parse(path.read_text("utf-8"))

    @classmethod
    def parse(cls, text: str) -> Launch:
        """Builds the Launch that `dump` wrote."""
        data = json.loads(text)
        return cls(**(data | {"hosts": tuple(Host(**host) for host in data["hosts"])}))


SINGLE_PROCESS = {"processes": 1, "nodes": 1, "zero_stage": None, "offload_optimizer": False, "offload_weights": False}


def plan_launch(
    plan: RunPlan,
    zero: str | None,
    nproc: int | None,
    hostfile: Path | None,
    *,
    resume: bool = False,
    repeats: Launch | None = None,
    started: StartedRank | None = None,
) -> Launch | None:
    """Returns the Launch that the three options request; None for the default, one process without DeepSpeed.

    Without any of the options, `repeats` (the Launch of the run that is repeated) is used again, if there is one.
    `started`: the processes exist already, and the options must fit them. Raises InputError for options that contradict
    each other or that this plan cannot run with.
    """
    if started is not None:
        launch = _launch_of(started, zero, nproc, hostfile, resume, repeats)
        _check(plan, launch, own_gpu=started.has_own_gpu(visible_gpus()))
        return launch
    if hostfile is not None and nproc is not None:
        raise InputError("--nproc and --hostfile both give the number of processes", hint="leave --nproc out")
    if hostfile is None and zero is None and nproc is None and repeats is not None:
        # The machine or the spec may differ from that of the earlier run, so that everything is checked again.
        launch = _again(repeats)
        _check(plan, launch)
        return launch
    if hostfile is None and zero is None and nproc in (None, 1):
        return None
    here = visible_gpus() or 1 if nproc is None else nproc
    hosts = read_hostfile(hostfile) if hostfile else (Host("localhost", here),)
    launch = Launch(read_zero(zero or DEFAULT), hosts, resume)
    _check(plan, launch)
    return launch


def _launch_of(
    started: StartedRank,
    zero: str | None,
    nproc: int | None,
    hostfile: Path | None,
    resume: bool,
    repeats: Launch | None,
) -> Launch:
    """The Launch of processes that another program has started."""
    if hostfile is not None or nproc not in (None, started.world):
        option = "--hostfile" if hostfile is not None else f"--nproc {nproc}"
        raise InputError(
            f"{option}: {started.starter} has started {started.world} processes already",
            hint=f"leave {option} out, or start ctxext without {started.starter}",
        )
    # The names of the other hosts are not known and not needed. The last host has the processes that remain.
    full, rest = divmod(started.world, started.local_world)
    slots = [started.local_world] * full + ([rest] if rest else [])
    hosts = tuple(Host("localhost" if node == 0 else f"node{node}", count) for node, count in enumerate(slots))
    known = repeats.zero if repeats is not None and zero is None else read_zero(zero or DEFAULT)
    return Launch(known, hosts, resume, started.starter)


def _again(launch: Launch) -> Launch:
    """The launch of a run that is repeated without the program that started it."""
    if launch.started_by is not None and len(launch.hosts) > 1:
        raise InputError(
            f"--repeat: {launch.started_by} started that run on {launch.world} processes of {len(launch.hosts)} hosts",
            hint=f"start this command with {launch.started_by} as well, or give --nproc or --hostfile",
        )
    return replace(launch, resume=False, started_by=None)


def _check(plan: RunPlan, launch: Launch, *, own_gpu: bool = False) -> None:
    """Raises InputError for everything that this plan cannot do on several processes.

    `own_gpu`: each process sees its own GPU alone.
    """
    world, spec = launch.world, plan.spec
    here = launch.hosts[0].slots
    gpus = visible_gpus()
    if launch.hosts[0].local and 0 < gpus < here and not own_gpu:
        raise InputError(f"{here} processes on a machine with {counted(gpus, 'GPU')}: each process needs its own GPU")
    if launch.started_by is None and len(launch.hosts) > 1 and launch.hosts[0].name in ("localhost", "127.0.0.1"):
        # The first host is the rendezvous address, which every host has to be able to resolve.
        far = [host.name for host in launch.hosts if not host.local]
        if far:
            raise InputError(f"{far[0]} cannot reach the first host as {launch.hosts[0].name}", hint="write its name")
    # Each context has its own global batch size.
    for stage in (*plan.earlier, plan):
        _check_batch(stage.global_batch_size, world)
    if spec.optimizer.name != "adamw":
        raise InputError(f"optimizer.name {spec.optimizer.name} is not supported under ZeRO: allowed is adamw")
    if spec.memory.quantize != "none":
        raise InputError(f"memory.quantize {spec.memory.quantize} under ZeRO is not supported", hint="use one process")
    # The rest needs whole weights on a rank: under ZeRO 3, DeepSpeed gathers them only in its own forward.
    if launch.stage == 3 and plan.teacher is not None and plan.teacher.source is not None:
        raise InputError(
            f"distill.teacher {plan.teacher.source.name} under ZeRO 3: stage 3 would partition this model too",
            hint="use --zero 2, or teacher: self",
        )
    if launch.stage == 3 and any(part.source == SELF for part in spec.data.parts):
        raise InputError("data self under ZeRO 3: a partitioned model cannot sample", hint="use --zero 2")
    if spec.memory.tiles is not None and launch.stage == 3:
        raise InputError(
            "memory.tiles under ZeRO 3: stage 3 does not gather the weights that tiles use", hint="use --zero 2"
        )


def _check_batch(batch: int, world: int) -> None:
    """Requires equally many sequences per process: under ZeRO-3 each forward pass involves all processes."""
    if batch % world:
        below, above = batch // world * world, -(-batch // world) * world
        nearest = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"a step has {counted(batch, 'sequence')}, which does not divide evenly over {world} processes",
            hint=f"--set global_batch_size={above}; the nearest allowed: {nearest}",
        )


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Returns the hosts of a file with lines `name slots=N`; # starts a comment. Raises InputError or SpecError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the hostfile {path}: {error}") from error
    hosts, faults = list[Host](), list[str]()
    # Collect all faulty lines before raising, so that the user can fix them at once.
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = _HOST.fullmatch(text)
        if match:
            hosts.append(Host(match["name"], int(match["slots"])))
        elif text:
            faults.append(f"line {number}: {text!r}; allowed: a host's name and slots=N")
    if faults or not hosts:
        raise SpecError(str(path), faults or ["no host in the file; allowed: lines such as node1 slots=8"])
    return tuple(hosts)


def read_zero(name: str) -> dict[str, Any]:
    """Returns the DeepSpeed configuration for --zero: a path, a name in ./deepspeed_configs, or a shipped one.

    Raises InputError if there is none, and SpecError with all keys that do not belong into it.
    """
    path = _find(name)
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(str(path), [f"not JSON: {error}"]) from error
    if not isinstance(data, dict):
        raise SpecError(str(path), ["allowed: an object of DeepSpeed's keys"])
    faults = [
        f"{key}: not allowed here; set it in the training spec: {SPEC_FIELDS[key]}"
        if key in SPEC_FIELDS
        else f"{key}: unknown key; allowed: {', '.join(ALLOWED)}"
        for key in data
        if key not in ALLOWED
    ]
    # "auto" values are for Hugging Face's Trainer, which is not used here.
    faults += [f'{key}: "auto" is not supported; leave the key out' for key in _autos(data, "")]
    zero = data.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        faults.append("zero_optimization.stage: missing; allowed: 1, 2, 3")
    else:
        for key in ("offload_optimizer", "offload_param"):
            if key in zero and (not isinstance(zero[key], dict) or zero[key].get("device") != "cpu"):
                faults.append(f'zero_optimization.{key}.device: allowed: "cpu"; or leave {key} out to disable it')
    if faults:
        raise SpecError(str(path), faults)
    return data


def _find(name: str) -> Path:
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise InputError(f"no file {name}", hint=f"names known without a path: {', '.join(zero_names())}")
        return Path(name)
    for root in (Path(FOLDER), shipped(FOLDER)):
        # The user's folder comes before the shipped one. "2" and "zero2" name the same file.
        path = root / f"zero{name.removeprefix('zero')}.json"
        if "/" not in name and path.is_file():
            return path
    raise InputError(f"--zero {name}: allowed are {', '.join(zero_names())}, or a JSON file")


def zero_names() -> list[str]:
    """Returns the names that --zero accepts, sorted."""
    found = [path for root in (Path(FOLDER), shipped(FOLDER)) for path in root.glob("zero*.json")]
    return sorted({path.stem.removeprefix("zero") for path in found})


def _autos(value: Any, path: str) -> Iterator[str]:
    if value == "auto":
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}" if path else key)
