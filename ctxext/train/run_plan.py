"""Turns a FinetuneSpec and a model's files into a RunPlan: all derived numbers and all refusals. No torch.

`ctxext finetune --plan` prints a RunPlan and stops. A run executes the RunPlan and derives nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctxext.data.documents import EMBEDDED, SELF
from ctxext.errors import InputError
from ctxext.machine.gpu import visible_gpus
from ctxext.model.adapter_plan import Trainables, plan_trainables
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.model_config import ModelConfig
from ctxext.model.positions import Auto, PositionPlan, plan_positions
from ctxext.model.source import ModelSource
from ctxext.ops import cost
from ctxext.ops.logits import loss_chunk
from ctxext.ops.masks import Pattern
from ctxext.train.finetune_spec import AttentionSpec, FinetuneSpec, Objective, short_length
from ctxext.train.measured import measured_length
from ctxext.train.refuse import refuse
from ctxext.train.schedule import Attention, attention_at, first_dense, phases
from ctxext.train.teacher import (
    Teacher,
    absolute,
    logits_bytes,
    objective_at,
    plan_teacher,
    teacher_bytes,
    teacher_flops,
)
from ctxext.units import counted, first_of, format_bytes, format_count, format_flops, format_tokens

GPU_RUNTIME, CPU_RUNTIME = 2_500_000_000, 500_000_000  # bytes: contexts, libraries, allocator slack
QUANTIZED = {"none": None, "nf4": 0.52, "int8": 1.0}  # bytes per weight, including scales
S2_ONLY = ("group_size", "grow", "shift")  # fields of AttentionSpec; dense_last is also valid for a dense run
GROUPS_PER_CTX = 4  # LongLoRA's choice, arXiv 2309.12307, section 3.2: G = ctx / 4


@dataclass(frozen=True)
class RunPlan:
    """One run with all decisions made. Lengths in tokens, memory in bytes on one device, FLOPs of one optimizer step.

    config             the model's config with its new positions
    group_size         G where full layers train with S²-Attn, None where they train dense
    sink_tokens        first tokens of a document that every S²-Attn query sees; None: measured when training starts
    step_flops         FLOPs of a step, recomputation included
    model_flops        FLOPs of a step without recomputation; MFU uses these
    first, stop        the steps at this ctx, from `first` (counted from 0) up to, but not including, `stop`
    earlier            the plans of the shorter contexts before this one, with their own positions, groups and batches
    tokens_before      tokens that the earlier contexts train on
    teacher            the model that this run learns from; None: the run learns from the text alone
    gpu                True or False: planned for a machine with or without a GPU; None: for this machine
    """

    spec: FinetuneSpec
    source: ModelSource
    config: ModelConfig
    positions: PositionPlan
    trainables: Trainables
    group_size: int | None
    sink_tokens: int | None
    global_batch_size: int
    steps: int
    dtype: str
    memory: dict[str, int]
    step_flops: int
    model_flops: int
    first: int
    stop: int
    tokens_before: int = 0
    earlier: tuple[RunPlan, ...] = ()
    teacher: Teacher | None = None
    gpu: bool | None = None

    def stage_of(self, done: int) -> RunPlan:
        """Returns the plan of the step after `done` steps; the plan of the last stage when all steps are done."""
        return next((plan for plan in self.earlier if done < plan.stop), self)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_after(self.stop)

    def tokens_after(self, done: int) -> int:
        """Returns the tokens trained on after `done` steps. The last of these steps is at this ctx."""
        return self.tokens_before + self.tokens_per_step * (done - self.first)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step at this ctx."""
        return self.global_batch_size * self.spec.ctx

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer of the model."""
        return self.config.kinds

    @property
    def measured_length(self) -> int | None:
        """The greatest length in tokens that evaluations measured; None: never measured."""
        return measured_length(self.source)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The attention pattern of each layer in training, without the schedule."""
        windows = [kind.sliding_window for kind in self.kinds]
        full = Pattern(None, self.group_size, sink_tokens=self.sink_tokens or 0)
        return tuple(full if W is None else Pattern(W) for W in windows)

    def attention_at(self, step: int) -> Attention:
        """Returns (group_size, shift) of the full layers at a step; (None, None) is dense."""
        spec = self.spec
        return attention_at(spec.attention, self.group_size, spec.ctx, step, self.steps, spec.seed)

    def objective_at(self, step: int) -> Objective | None:
        """Returns the distillation objective of a step; None for a run without a teacher."""
        distill = self.spec.distill
        return None if distill is None else objective_at(distill.objectives, step, self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        return {
            "model": self.source.name,
            "layout": pattern_text(self.kinds),
            "ctx": self.spec.ctx,
            "positions": {name: value for name, value in asdict(self.positions).items() if name != "rope_parameters"}
            | {"rope_parameters": self.config.rope},
            "training_attention": "dense" if self.group_size is None else "s2",
            "group_size": self.group_size,
            "sink_tokens": self.sink_tokens,
            "teacher": None if self.teacher is None else self.teacher.description,
            "trainable_parameters": self.trainables.parameters,
            "effective_scale": {group.name: group.scale for group in self.trainables.lora},
            "global_batch_size": self.global_batch_size,
            "accumulation": -(-self.global_batch_size // self.spec.micro_batch_size),
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "total_tokens": self.tokens,
            "stages": [{"ctx": plan.spec.ctx, "steps": plan.stop - plan.first} for plan in (*self.earlier, self)],
            "step_flops": self.step_flops,
            "model_flops": self.model_flops,
            "dtype": self.dtype,
            "memory": self.memory | {"total": sum(self.memory.values())},
            "measured_length": self.measured_length,
            "spec": asdict(self.spec),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Returns the plan as (name, value) lines for the screen."""
        rows = [
            ("model", f"{self.source.name} ({pattern_text(self.kinds)})"),
            ("ctx", f"{format_tokens(self.spec.ctx)} tokens"),
            ("positions", self.positions.summary),
            ("full layers train", self._attention_row()),
            *([("teacher", self.teacher.description)] if self.teacher else []),
            *([("token weights", weights.described)] if (weights := self.spec.token_weights).kind != "equal" else []),
            ("trains", self._trainables_row()),
        ]
        rows += [
            (
                f"  {group.name} x {group.count}",
                f"rank {self.spec.lora.rank}, alpha {group.alpha:.4g}, effective scale {group.scale:.4g}",
            )
            for group in self.trainables.lora
        ]
        accumulation = -(-self.global_batch_size // self.spec.micro_batch_size)
        rows += [
            (
                "a step",
                f"{counted(self.global_batch_size, 'sequence')}, {format_tokens(self.tokens_per_step)} tokens, "
                f"{counted(accumulation, 'forward')} of {self.spec.micro_batch_size}, {format_flops(self.step_flops)}",
            ),
            ("steps", f"{self.steps} ({format_tokens(self.tokens)} tokens)"),
            *(
                ("  at ctx", f"{format_tokens(plan.spec.ctx)} to step {plan.stop}; {plan.positions.summary}")
                for plan in ((*self.earlier, self) if self.earlier else ())
            ),
            (
                "memory, estimated",
                f"{format_bytes(sum(self.memory.values()))} in {self.dtype}: "
                + ", ".join(f"{name} {format_bytes(size)}" for name, size in self.memory.items() if size),
            ),
        ]
        if any(not kind.use_rope for kind in self.kinds):
            # NoPE layers have no positions to stretch, so that only a measurement can show their usable length.
            longest = self.measured_length
            known = "never measured" if longest is None else f"measured to {format_tokens(longest)}"
            rows.append(("NoPE layers", f"no positions to stretch, but attention spreads out with length ({known})"))
        return rows

    def _attention_row(self) -> str:
        if not any(kind.sliding_window is None for kind in self.kinds):
            return "sliding windows only: no layer is full"
        if self.group_size is None:
            # The alternative to the chosen attention: S²-Attn for a dense run, dense for an S²-Attn run.
            other, name = max(2, self.spec.ctx // GROUPS_PER_CTX), "S²-Attn"
        else:
            other, name = None, "dense"
        flops = self.global_batch_size * _flops(self.source, self.spec, other)[0]
        costs = f"{name}: {format_flops(flops)} a step, {flops / self.step_flops:.2f}x"
        if self.group_size is None:
            return f"dense, as at inference ({costs})"
        spec, text = self.spec.attention, f"with S²-Attn, groups of {format_tokens(self.group_size)} tokens"
        text += {None: " (first token visible where the model needs it)", 0: ""}.get(
            self.sink_tokens, f" and {first_of(self.sink_tokens or 0, 'token')} of a document"
        )
        text += " that grow" * spec.grow + ", shifted at random in each step" * (spec.shift == "random")
        if spec.dense_last:
            dense = self.steps - first_dense(spec, self.steps)
            text += f", the last {dense} of {counted(self.steps, 'step')} dense" if dense else (
                f", no step dense (attention.dense_last {spec.dense_last:g} of {counted(self.steps, 'step')} is less "
                "than one)"
            )  # fmt: skip
        return f"{text}; at inference dense ({costs})"

    def _trainables_row(self) -> str:
        parts = self.trainables
        total = cost.parameter_count(self.source.shape)
        share = f"{format_count(parts.parameters)} of {format_count(total)} parameters"
        if parts.tuning == "full":
            return f"everything, {format_count(total)} parameters"
        tied = " (tied: the head with them)" if self.source.shape.tied and parts.embedding_parameters else ""
        return (
            f"{share}: LoRA {format_count(parts.lora_parameters)}, embeddings "
            f"{format_count(parts.embedding_parameters)}{tied}, norms {format_count(parts.norm_parameters)}"
            + (f", sinks and biases {format_count(parts.sink_parameters)}" if parts.sink_parameters else "")
        )


def plan_run(
    source: ModelSource, spec: FinetuneSpec, *, gpu: bool | None = None, trainables: Trainables | None = None
) -> RunPlan:
    """Derives a run for this machine, or for a machine with or without a GPU (`gpu`).

    `trainables` skips their derivation when the caller already knows them. Raises InputError or ModelError for
    everything that cannot be trained as requested.
    """
    # Refusals without arithmetic come first: they are quick and read no teacher.
    refuse(source, spec, on_gpu(gpu))
    source = source.with_original_length(spec.original_length)
    spec = _with_absolute_paths(spec)
    # The teacher uses the layout from before the conversion, so that it is planned apart from the new positions.
    teacher = plan_teacher(source, spec)
    positions = plan_positions(
        source.config,
        spec.rope_scaling,
        spec.ctx,
        original_length=source.original_length,
        usable_length=source.usable_length,
    )
    trainables = trainables or plan_trainables(source.config, spec.tuning, spec.lora, source.fitted_layers)
    if trainables.parameters == 0:
        raise InputError("no parameter would train", hint="train lora, embeddings or norms")
    group_size = _group_size(source, spec)
    sink_tokens = _sink_tokens(spec, group_size)
    batch = spec.global_batch_size or max(1, spec.tokens_per_step // spec.ctx)
    # One sequence's FLOPs, averaged over the schedule. The teacher and token weights add forward passes to both counts.
    earlier, flops = _earlier(source, spec, gpu), _mean_flops(source, spec, group_size)
    taught = teacher_flops(teacher, source, spec.ctx, mask=spec.data.document_mask) if teacher else 0
    taught += token_weight_flops(source, spec, group_size)
    plan = RunPlan(
        spec=spec,
        source=source,
        config=positions.apply(source.config),
        positions=positions,
        trainables=trainables,
        group_size=group_size,
        sink_tokens=sink_tokens,
        global_batch_size=batch,
        steps=spec.steps,
        dtype=("bfloat16" if on_gpu(gpu) else "float32") if spec.dtype == "auto" else spec.dtype,
        # `divided` fills in the memory below; it needs the rest of the plan.
        memory={},
        step_flops=batch * (flops[0] + taught),
        model_flops=batch * (flops[1] + taught),
        # All contexts get equal shares of the steps; this ctx trains in the last share.
        first=len(spec.stages) * spec.steps // (len(spec.stages) + 1),
        stop=spec.steps,
        tokens_before=earlier[-1].tokens if earlier else 0,
        earlier=earlier,
        teacher=teacher,
        gpu=gpu,
    )
    return divided(plan, cost.WHOLE)


def divided(plan: RunPlan, partition: cost.Partition) -> RunPlan:
    """Returns the plan with the memory of one of the processes that share the run."""
    gpu, spec = on_gpu(plan.gpu), plan.spec
    # A process cannot hold more sequences than its share of the global batch.
    sequences = max(1, min(spec.micro_batch_size, plan.global_batch_size // partition.ranks))
    item_bytes = 2 if plan.dtype == "bfloat16" else 4
    if not gpu and plan.trainables.parameters <= partition.bucket:  # untouched memory costs nothing on a CPU
        partition = replace(partition, buffers=1)
    # The largest pattern of the steps at this ctx: dense where one of them is.
    group_size = None if first_dense(spec.attention, plan.steps) < plan.stop else plan.group_size
    memory = cost.training_memory(
        plan.source.shape,
        [_pattern(kind, group_size) for kind in plan.kinds],
        spec.ctx,
        sequences,
        trainable=plan.trainables.parameters,
        trained=cost.Trained(
            adapted=frozenset(group.name for group in plan.trainables.lora),
            norms=plan.trainables.norm_parameters > 0,
            weights=spec.tuning == "full",
        ),
        moment_bytes=8 if spec.optimizer.name == "adamw" else 2,
        item_bytes=item_bytes,
        quantized=QUANTIZED[spec.memory.quantize],
        keep_attention=spec.memory.keep == "attention",
        tiles=spec.memory.tiles,
        offload=spec.memory.offload,
        runtime=GPU_RUNTIME if gpu else CPU_RUNTIME,
        chunk=loss_chunk(plan.source.shape.vocab_size, gpu=gpu),
        logits=logits_bytes(plan.source, spec, sequences * spec.ctx, gpu=gpu),
        checkpointing=int(spec.memory.checkpoint),
        partition=partition,
    )
    if plan.teacher is not None:
        memory["teacher"] = teacher_bytes(plan.teacher, plan.source, spec, sequences * spec.ctx, item_bytes)
    return replace(plan, memory=memory, earlier=tuple(divided(stage, partition) for stage in plan.earlier))


def on_gpu(given: bool | None) -> bool:
    """Returns `given`; if it is None, whether this machine has a GPU for torch (machine/gpu.py, without torch)."""
    return visible_gpus() > 0 if given is None else given


def _with_absolute_paths(spec: FinetuneSpec) -> FinetuneSpec:
    """Makes the paths of data and teacher absolute, because a run may be resumed from another directory."""
    mixture = tuple(replace(part, source=_absolute(part.source)) for part in spec.data.mixture)
    spec = replace(spec, data=replace(spec.data, source=_absolute(spec.data.source), mixture=mixture))
    if spec.distill is None:
        return spec
    return replace(spec, distill=replace(spec.distill, teacher=absolute(spec.distill.teacher)))


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if source not in (EMBEDDED, SELF) and Path(source).exists() else source


def _earlier(source: ModelSource, spec: FinetuneSpec, gpu: bool | None) -> tuple[RunPlan, ...]:
    """The plans of the shorter contexts. Group sizes follow from each ctx; positions stretch only where they must."""
    plans, count, tokens = list[RunPlan](), len(spec.stages) + 1, 0
    for number, ctx in enumerate(spec.stages):
        attention = replace(spec.attention, group_size=None)
        # A context within the trained length needs no RoPE scaling.
        scaling = spec.rope_scaling if ctx > (source.original_length or source.usable_length) else Auto()
        changes: dict[str, Any] = {"attention": attention, "rope_scaling": scaling}
        # Passkey lengths beyond this ctx do not fit into its sequences; drop them.
        if passkey := spec.validation.passkey:
            fit = tuple(length for length in passkey.lengths if length <= ctx)
            fitting = replace(passkey, lengths=fit) if fit else None
            changes["validation"] = replace(spec.validation, passkey=fitting)
        plan = plan_run(source, replace(spec, ctx=ctx, stages=(), **changes), gpu=gpu)
        # plan_run plans a run of its own without stages; set its place in the whole run.
        first, stop = (k * spec.steps // count for k in (number, number + 1))
        plans.append(replace(plan, first=first, stop=stop, tokens_before=tokens))
        tokens = plans[-1].tokens
    return tuple(plans)


def _mean_flops(source: ModelSource, spec: FinetuneSpec, group_size: int | None) -> tuple[int, int]:
    """`_flops`, averaged over the attention schedule."""
    totals = [0, 0]
    for size, steps in phases(spec.attention, group_size, spec.ctx, spec.steps).items():
        for i, flops in enumerate(_flops(source, spec, size)):
            totals[i] += steps * flops
    return totals[0] // spec.steps, totals[1] // spec.steps


def _flops(source: ModelSource, spec: FinetuneSpec, group_size: int | None) -> tuple[int, int]:
    """FLOPs of one sequence in a step, with and without recomputation. None: full layers are dense."""
    layers, trains = [_pattern(kind, group_size) for kind in source.kinds], spec.tuning == "full"
    again, shape, kept = bool(spec.memory.checkpoint), source.shape, spec.memory.keep == "attention"
    return (
        cost.step_flops(shape, layers, spec.ctx, again=again, kept=kept, trains=trains),
        cost.model_flops(shape, layers, spec.ctx, weights_train=trains),
    )


def token_weight_flops(source: ModelSource, spec: FinetuneSpec, group_size: int | None) -> int:
    """Returns the FLOPs of the three forward passes that LongCE's weights need for a sequence; 0 for other weights."""
    short = short_length(spec.token_weights, spec.ctx)
    if spec.token_weights.kind != "longce" or short >= spec.ctx:
        return 0
    layers = [_pattern(kind, group_size) for kind in source.kinds]
    whole, piece = (cost.forward_flops(source.shape, layers, length) for length in (spec.ctx, short))
    return whole + 2 * -(-spec.ctx // short) * piece


def _pattern(kind: LayerKind, group_size: int | None) -> tuple[int | None, int | None]:
    """(window, group) of a layer in training. S²-Attn applies only to layers without a window."""
    return (kind.sliding_window, None) if kind.sliding_window is not None else (None, group_size)


def _group_size(source: ModelSource, spec: FinetuneSpec) -> int | None:
    """G of S²-Attn in tokens, None for dense. auto: S²-Attn when all layers are full and have several heads."""
    full, heads = [kind.sliding_window is None for kind in source.kinds], source.shape.num_heads
    # S²-Attn shifts half of the heads, so that it needs at least two.
    wanted = spec.attention.train
    if wanted == "auto":
        wanted = "s2" if all(full) and heads > 1 else "dense"
    if wanted == "dense":
        # Options that only S²-Attn uses have no effect on a dense run; refuse them.
        default = AttentionSpec()
        given = [name for name in S2_ONLY if getattr(spec.attention, name) != getattr(default, name)]
        given += ["sinks"] * (spec.attention.sinks not in ("auto", 0))
        if given:
            raise InputError(
                f"{', '.join(f'attention.{name}' for name in given)}: given, but full layers train dense",
                hint="add --set attention.train=s2, or leave these fields out",
            )
        return None
    if not any(full):
        raise InputError(f"{source.name}: attention.train: s2, but no layer is full", hint="use attention.train=dense")
    if heads < 2:
        raise InputError(f"{source.name}: s2 needs two heads, there is one", hint="use attention.train=dense")
    group = spec.attention.group_size or max(2, spec.ctx // GROUPS_PER_CTX)
    if not 2 <= group <= spec.ctx:
        raise InputError(f"attention.group_size {group}: allowed are 2 to ctx ({format_tokens(spec.ctx)})")
    return group


def _sink_tokens(spec: FinetuneSpec, group_size: int | None) -> int | None:
    """How many first tokens S²-Attn also sees; None: measured when training starts."""
    requested = spec.attention.sinks
    if group_size is None:
        return 0
    if spec.memory.tiles is not None:
        # A tile of a row holds its own tokens and their groups, not the first token of a document far before it.
        if requested not in ("auto", 0):
            raise InputError(
                f"attention.sinks: {requested} with memory.tiles: a tile does not hold the first tokens of a document",
                hint="leave memory.tiles out, or set attention.sinks=0",
            )
        return 0
    return None if requested == "auto" else requested
