"""Estimates the seconds of a training step: the work of every part divided by its rate.

Letters as in ops/cost.py; N tokens of a forward (T times the sequences of a micro-batch), n forwards per rank and step.

    linear        2 N entries FLOPs a pass: forward, gradient of the input, of the weight if it trains, and again under
                  a checkpoint; the recomputation stops before the last matrix of the MLP unless that is adapted
    adapters      the same for LoRA's matrices, in fp32
    attention     pairs as computed; 4 D FLOPs a pair and head forward (again under a checkpoint, unless kept), 10 D
                  backward. A sliding layer computes whole blocks: more pairs than it attends
    head          logits, their gradient, that of its weight if it trains; the bytes of the softmax are a part of their
                  own
    elementwise   bytes that norms, RoPE, SwiGLU, residuals, LoRA and the splitting of heads read and write, counted in
                  transformers' Llama and PEFT; a backward operation moves twice as much as its forward
    optimizer     40 bytes per parameter and step, 12 per parameter and forward for its gradient
    offload       the time by which transfers to the host exceed the computation beside them
    processes     gradients reduced, weights gathered (ZeRO 3: for forward, again and backward), none of it hidden

Not counted: data, validation, checkpoints on the disk, kernel launches, and the lower cost of documents shorter than
ctx, which attend fewer pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ctxext.ops import cost
from ctxext.planning.cards import Rates
from ctxext.train.run_plan import RunPlan, on_gpu, token_weight_flops
from ctxext.train.schedule import phases
from ctxext.train.teacher import teacher_flops

GPU_TILE, CPU_KEYS = 128, 512  # keys per block: FlashAttention on a GPU, torch on a CPU (kvSplitSize)
BLOCK, BLOCKS_PER_WINDOW = 64, 4  # as in ops/backends/blocked.py
ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class TimePart:
    """A part of a step: FLOPs and bytes of one rank, its seconds, and the name of the rate that limits it."""

    name: str
    rate: str
    flops: float
    moved: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """One optimizer step of one rank; all ranks work at the same time. `tokens` are those of all ranks."""

    parts: tuple[TimePart, ...]
    tokens: int

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(part.seconds for part in self.parts)

    @property
    def flops(self) -> float:
        """Computed FLOPs of one rank.

        They include whole blocks of attention and adapters, which the counts of a RunPlan leave out.
        """
        return sum(part.flops for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.tokens / self.seconds

    def by_rate(self) -> dict[str, float]:
        """Returns the seconds by limiting rate, the largest first."""
        found: dict[str, float] = {}
        for part in self.parts:
            found[part.rate] = found.get(part.rate, 0.0) + part.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def estimate(plan: RunPlan, rates: Rates, partition: cost.Partition = cost.WHOLE) -> Estimate:
    """Returns the estimate of one step, averaged over the attention schedule."""
    spec = plan.spec
    # Each rank runs the same number of forwards of one micro-batch.
    sequences = max(1, min(spec.micro_batch_size, plan.global_batch_size // partition.ranks))
    forwards = -(-plan.global_batch_size // (partition.ranks * sequences))
    tokens = forwards * sequences * spec.ctx
    halo = _halo(plan)
    linear = _linear(plan, rates, tokens, halo)
    attention = _attention(plan, rates, tokens, halo)
    parts = [*linear, *attention, *_rest(plan, rates, tokens, forwards, partition)]
    # Offloading overlaps with the computation, so that its time depends on the sum so far.
    computing = sum(part.seconds for part in parts)
    parts += _moved(plan, rates, partition, forwards, tokens, computing)
    return Estimate(_together(parts), plan.tokens_per_step)


def _together(parts: Iterable[TimePart]) -> tuple[TimePart, ...]:
    """Merges parts of the same name and rate, and drops those without time."""
    found: dict[tuple[str, str], TimePart] = {}
    for part in parts:
        old = found.get((part.name, part.rate), TimePart(part.name, part.rate, 0, 0, 0))
        found[part.name, part.rate] = TimePart(
            part.name, part.rate, old.flops + part.flops, old.moved + part.moved, old.seconds + part.seconds
        )
    return tuple(part for part in found.values() if part.seconds > 0)


def _work(name: str, rate: str, flops: float, per_second: float) -> TimePart:
    return TimePart(name, rate, flops, 0.0, flops / per_second)


def _stream(name: str, moved: float, rates: Rates) -> TimePart:
    return TimePart(name, "stream", 0.0, moved, moved / rates.stream)


def _halo(plan: RunPlan) -> dict[str, float]:
    """By kind of layer, the factor by which tiles increase the work of its attention half."""
    tiles, T, group = plan.spec.memory.tiles, plan.spec.ctx, plan.group_size
    if tiles is None:
        return {}
    # A tile of a sliding layer also computes the window before it; a tile of an S² layer, half a group for the shifted
    # heads.
    windows = {kind.sliding_window for kind in plan.kinds if kind.sliding_window is not None}
    more = {"sliding": max((_excess(T, max(tiles, window), window - 1) for window in windows), default=1.0)}
    if group is not None:
        more["s2"] = _excess(T, -(-tiles // group) * group, group // 2 // 2)  # half of the heads' groups are shifted
    return more


def _excess(T: int, size: int, halo: int) -> float:
    return 1 + (max(0, -(-T // size) - 1) * halo) / T


def _linear(plan: RunPlan, rates: Rates, tokens: int, halo: dict[str, float]) -> list[TimePart]:
    """The layers' matrices with their adapters, the head, and the teacher."""
    spec, shape, trains = plan.spec, plan.source.shape, plan.spec.tuning == "full"
    adapted = {group.name for group in plan.trainables.lora}
    again, tiled = bool(spec.memory.checkpoint), spec.memory.tiles is not None
    kinds = ["sliding" if kind.sliding_window else "s2" for kind in plan.kinds]
    excess = sum(halo.get(kind, 1.0) for kind in kinds) / shape.num_layers
    parts = list[TimePart]()
    for name, (width, out) in matrices(shape).items():
        # Only the attention half of a layer is recomputed with the overlap of tiles.
        factor = excess if name in ATTENTION_MATRICES else 1.0
        flops, rate = 2.0 * tokens * shape.num_layers * out * width, rates.linear_at(math.sqrt(out * width))
        parts.append(_work("linear", "linear", flops * (factor + 1 + trains), rate))
        if again and (name != "down_proj" or tiled or name in adapted):
            parts.append(_work("linear, again", "linear", flops * factor, rate))
        if name in adapted:  # [width, r] and [r, out]: forward, again, gradients of inputs and weights
            rank = spec.lora.rank
            low = 2.0 * tokens * shape.num_layers * rank * (out + width) * (3 + again)
            parts.append(_work("adapters", "adapters", low, rates.linear_at(math.sqrt(rank * width), "adapters")))
    # The head's products cost FLOPs; its softmax is limited by memory bandwidth.
    head = 2.0 * tokens * shape.vocab_size * shape.hidden_size
    # A tied head trains with the embeddings.
    head_trains = trains or (shape.tied and plan.trainables.embedding_parameters > 0)
    rate = rates.linear_at(math.sqrt(shape.vocab_size * shape.hidden_size))
    parts.append(_work("head", "linear", head * (2 + head_trains), rate))
    parts.append(
        _stream("head, softmax", 12.0 * 4 * tokens * shape.vocab_size, rates)
    )  # train/loss.py: reads and writes of the probabilities
    if plan.teacher is not None:
        batches = tokens / spec.ctx
        flops = batches * teacher_flops(plan.teacher, plan.source, spec.ctx, mask=spec.data.document_mask)
        parts.append(_work("teacher", "linear", flops, rates.linear_at(shape.hidden_size)))
    if flops := tokens / spec.ctx * token_weight_flops(plan.source, spec, plan.group_size):
        parts.append(_work("token weights", "linear", flops, rates.linear_at(shape.hidden_size)))
    return parts


def matrices(shape: cost.ModelShape) -> dict[str, tuple[int, int]]:
    """Returns (inputs, outputs) of the seven matrices of a layer, by name."""
    E, F, D = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_heads * D, shape.num_kv_heads * D
    return {"q_proj": (E, queries), "k_proj": (E, keys), "v_proj": (E, keys), "o_proj": (queries, E),
            "gate_proj": (E, F), "up_proj": (E, F), "down_proj": (F, E)}  # fmt: skip


def _attention(plan: RunPlan, rates: Rates, tokens: int, halo: dict[str, float]) -> list[TimePart]:
    spec, shape = plan.spec, plan.source.shape
    parts, rows = list[TimePart](), tokens / spec.ctx
    schedule = phases(spec.attention, plan.group_size, spec.ctx, plan.steps)
    windows = Counter(kind.sliding_window for kind in plan.kinds)
    # Average over the schedule: each group size counts by its share of the steps.
    for group, steps in schedule.items():
        for window, layers in windows.items():
            name = "sliding" if window else "full" if group is None else "s2"
            pairs = layers * computed_pairs(shape, spec.ctx, (window, None if window else group), gpu=on_gpu(plan.gpu))
            unit = rows * steps / plan.steps * 2 * shape.head_dim * pairs
            forward, back = rates.attention[name]
            more, title = halo.get(name, 1.0), {"s2": "S²"}.get(name, name)
            kept = spec.memory.keep == "attention" and name != "sliding"
            parts.append(_work(f"attention, {title}", "attention", 2 * unit * more, forward))
            parts.append(_work(f"attention, {title}, backward", "attention", 5 * unit, back))
            if spec.memory.checkpoint and not kept:
                parts.append(_work("attention, again", "attention", 2 * unit * more, forward))
    return parts


def computed_pairs(shape: cost.ModelShape, T: int, layer: cost.Layer, *, gpu: bool) -> int:
    """Returns the pairs that all heads of a layer compute in a row of T tokens.

    They are the attended pairs and the remaining pairs of whole blocks.
    """
    window, group = layer
    if window is None:
        # Causal attention computes whole blocks at the diagonal: half a block more per query.
        block = min(group or T, GPU_TILE if gpu else CPU_KEYS)
        return cost.layer_pairs(shape, T, layer) + shape.num_heads * T * (block - 1) // 2
    if gpu:
        return shape.num_heads * T * min(T, window + GPU_TILE)
    block = max(BLOCK, -(-window // min(BLOCKS_PER_WINDOW, max(1, window // BLOCK))))
    return shape.num_heads * T * min(T, -(-window // block) * block + block)


def _rest(plan: RunPlan, rates: Rates, tokens: int, forwards: int, partition: cost.Partition) -> list[TimePart]:
    """Elementwise operations, the optimizer, and the unpacking of quantised weights."""
    spec, shape = plan.spec, plan.source.shape
    moved = tokens * shape.num_layers * _elementwise(plan, rates) * (3 + bool(spec.memory.checkpoint))
    count = plan.trainables.parameters
    # ZeRO divides the optimizer's work among the ranks.
    own = count / (partition.ranks if partition.stage else 1)
    eight = 40 if spec.optimizer.name == "adamw" else 28
    parts = [_stream("elementwise", moved, rates), _stream("optimizer", 12.0 * count * forwards, rates)]
    if partition.offload_optimizer:
        return [
            *parts,
            TimePart("optimizer on the host", "host_memory", 0.0, 40.0 * own, 40.0 * own / rates.host_memory),
        ]
    parts.append(_stream("optimizer", eight * own, rates))
    if spec.memory.quantize != "none":  # unpacked to bf16 in every pass
        entries = shape.num_layers * cost.layer_matrices(shape)
        parts.append(_stream("unpacking", 2.5 * entries * forwards * (2 + bool(spec.memory.checkpoint)), rates))
    return parts


def _elementwise(plan: RunPlan, rates: Rates) -> float:
    """Bytes per token that one layer's forward reads and writes, without matrices and attention."""
    shape, e = plan.source.shape, 2 if plan.dtype == "bfloat16" else 4
    E, F, A, C = (
        shape.hidden_size,
        shape.intermediate_size,
        *(heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads)),
    )
    # Two norms, RoPE on queries and keys, the MLP's SwiGLU, two residuals.
    norms = 2 * E * norm_bytes(e)
    rope = 10 * e * (A + C) * sum(kind.use_rope for kind in plan.kinds) / shape.num_layers
    heads = 0 if rates.measured else 2 * e * A + 2 * e * (A + 2 * C)  # merge and split; measured with attention
    mlp, residuals = 5 * e * F, 6 * e * E
    adapters = 0.0
    widths = matrices(shape)
    for group in plan.trainables.lora:
        if group.name in widths:  # an adapted embedding is a lookup, which moves little
            width, out = widths[group.name]
            adapters += (4 if e == 4 else 10) * width + (12 + 2 * e + (0 if e == 4 else 6)) * out
    return norms + rope + heads + mlp + residuals + adapters


def norm_bytes(item: int) -> int:
    """Returns bytes per entry of an RMSNorm: square, mean, two products; in bf16 also the casts to fp32 and back."""
    return 28 if item == 4 else 36


def _moved(
    plan: RunPlan, rates: Rates, partition: cost.Partition, forwards: int, tokens: int, computing: float
) -> list[TimePart]:
    """Transfers to the host and to other ranks."""
    spec, shape, e = plan.spec, plan.source.shape, 2 if plan.dtype == "bfloat16" else 4
    parts = list[TimePart]()
    if spec.memory.checkpoint and spec.memory.offload:
        # One input for every k layers goes to the host and comes back; only what the computation does not hide costs
        # time.
        inputs = -(-shape.num_layers // int(spec.memory.checkpoint)) * tokens * shape.hidden_size * e
        out = inputs / rates.host
        exposed = max(0.0, out - computing / 3) + max(0.0, out - computing * 2 / 3)  # beside forward, backward
        parts.append(
            TimePart("offload", "host", 0.0, 2.0 * inputs, exposed if on_gpu(plan.gpu) else inputs / rates.stream)
        )
    ranks, weights = partition.ranks, cost.parameter_count(shape) * e
    if ranks > 1:
        # An all-reduce moves 2 (ranks - 1) / ranks of the gradient per rank.
        reduced = 2.0 * cost.GRADIENT_BYTES * plan.trainables.parameters * (ranks - 1) / ranks
        parts.append(TimePart("gradients between cards", "link", 0.0, reduced, reduced / rates.link))
    if partition.stage == 3 and ranks > 1:
        gathered = weights * (2 + bool(spec.memory.checkpoint)) * forwards * (ranks - 1) / ranks
        parts.append(TimePart("weights gathered", "link", 0.0, gathered, gathered / rates.link))
    if partition.offload_weights:
        fetched = weights / ranks * (2 + bool(spec.memory.checkpoint)) * forwards
        parts.append(TimePart("weights fetched", "host", 0.0, fetched, fetched / rates.host))
    if partition.offload_optimizer:
        sent = 8.0 * plan.trainables.parameters / ranks
        parts.append(TimePart("gradients to the host", "host", 0.0, sent, sent / rates.host))
    return parts
