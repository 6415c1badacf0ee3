"""What a model costs on paper: parameters, pairs, FLOPs and bytes, with one letter for each size.

    E hidden_size   L num_layers   H num_heads   K num_kv_heads   D head_dim   F intermediate_size   V vocab_size
    T tokens        W window       G group       P parameters of the layers   X = T · E · item bytes, one hidden state

    a matrix         2 · inputs · outputs FLOPs a token
    attention        a pair (query, key) costs 2 D FLOPs a head for a score and 2 D for its value:
                     forward 2 · 2D a pair and head, backward 5 · 2D (dV, dP, dQ, dK and the scores again)
    full causal      T (T + 1) / 2 pairs        attention passes the layers' matrices at about T > 12 E for a Llama
    sliding          T W - W (W - 1) / 2        3/4 of the layers W = 128 at 100k: a step is under half of dense
    S²               about T G / 2              G = T / 4: a quarter of the pairs of dense

Counts are exact integers. `training_memory` counts the tensors that are live at the peak of a step; docs/plan.md says
how near it came on a CPU, ZeRO's split included. On a GPU it was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ctxext.ops.logits import loss_chunk
from ctxext.ops.masks import first_shifted_head

MASTER_BYTES, GRADIENT_BYTES = 4, 4  # of a parameter that trains: both are fp32

Layer = tuple[int | None, int | None]  # (sliding_window, group_size) in tokens; None, None = full causal


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama-like decoder: pre-norm RMSNorm, SwiGLU, grouped-query attention.

    tied             input embedding and output head are one [V, E] weight
    attention_bias   q, k and v have biases (Qwen2)
    output_bias      o has one
    qk_norm          an RMSNorm of D over each query and key head (Qwen3)
    head_sinks       each query head has a learned sink (GraniteSWA)
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    head_sinks: bool = False


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How ZeRO (arXiv 1910.02054) divides a run's state among `ranks` processes, each with a device of its own.

    stage                1 divides masters and moments, 2 the gradients too, 3 the weights too
    offload_optimizer    masters and moments, from stage 2 on the gradients too, wait on the host
    offload_weights      the divided weights wait on the host
    bucket, buffers      entries, never more than train, of a buffer that gradients are collected in to be sent; buffers
    live, prefetch       weights that stage 3 has gathered at most; those of one go, held twice until in their places
    """

    ranks: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 0
    buffers: int = 1
    live: int = 1_000_000_000
    prefetch: int = 50_000_000


WHOLE = Partition()  # one process, nothing divided


def layer_matrices(shape: ModelShape) -> int:
    """Entries of one layer's seven matrices: q and o, k and v, gate, up and down."""
    attention = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    return attention + 3 * shape.hidden_size * shape.intermediate_size


def parameter_count(shape: ModelShape, *, embeddings: bool = True) -> int:
    """All parameters; without the embedding and the head if `embeddings` is false."""
    layer = layer_matrices(shape) + 2 * shape.hidden_size
    if shape.attention_bias:
        layer += shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    layer += shape.output_bias * shape.hidden_size + shape.head_sinks * shape.num_heads
    layer += shape.qk_norm * 2 * shape.head_dim
    vocabulary = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    return shape.num_layers * layer + shape.hidden_size + (vocabulary if embeddings else 0)


@lru_cache(maxsize=1024)  # layers are many and alike, and a search asks of hundreds of models' layers
def attention_pairs(
    T: int, sliding_window: int | None = None, group_size: int | None = None, *, shifted: bool = False
) -> int:
    """Pairs (query, key) that one head attends in a row of T tokens: the sum of q - lo[q] + 1, exactly.

    `shifted` is the half of the heads whose S² groups are moved by G // 2; without groups it changes nothing.
    """
    if group_size is None:
        return _band(T, sliding_window)
    first = min(T, group_size - group_size // 2) if shifted else 0
    full, last = divmod(T - first, group_size)
    return _band(first, sliding_window) + full * _band(group_size, sliding_window) + _band(last, sliding_window)


def layer_pairs(shape: ModelShape, T: int, layer: Layer) -> int:
    """`attention_pairs` over all heads of one layer, S² halves included."""
    window, group = layer
    if group is None:
        return shape.num_heads * attention_pairs(T, window)
    f = first_shifted_head(shape.num_heads, shape.num_kv_heads)
    shifted = attention_pairs(T, window, group, shifted=True)
    return f * attention_pairs(T, window, group) + (shape.num_heads - f) * shifted


def kv_cache_bytes(shape: ModelShape, windows: Sequence[int | None], T: int, item_bytes: int = 2) -> int:
    """Bytes of the key/value cache after T tokens; `windows` has W or None for each layer, which holds min(T, W)."""
    tokens = sum(T if window is None else min(T, window) for window in windows)
    return 2 * tokens * shape.num_kv_heads * shape.head_dim * item_bytes


def forward_flops(shape: ModelShape, layers: Sequence[Layer], T: int) -> int:
    """FLOPs of one forward over a row of T tokens, logits of every token included; norms and softmax are left out."""
    linear = 2 * T * (shape.num_layers * layer_matrices(shape) + shape.vocab_size * shape.hidden_size)
    return linear + 2 * 2 * shape.head_dim * sum(layer_pairs(shape, T, layer) for layer in layers)


def model_flops(shape: ModelShape, layers: Sequence[Layer], T: int, *, weights_train: bool = False) -> int:
    """FLOPs that forward and backward over one row of T tokens need: what MFU counts (arXiv 2204.02311, appendix B).

    Layers: forward, gradient of the input, gradient of the weights if they train. Nothing is computed twice. LoRA's own
    matrices (rank over width of this) and the optimizer are left out.
    """
    passes = 2 + weights_train
    linear = 2 * T * (shape.num_layers * layer_matrices(shape) + shape.vocab_size * shape.hidden_size) * passes
    return linear + 2 * shape.head_dim * (2 + 4) * sum(layer_pairs(shape, T, layer) for layer in layers)


def step_flops(
    shape: ModelShape, layers: Sequence[Layer], T: int, *, again: bool = True, kept: bool = False, trains: bool = False
) -> int:
    """`model_flops` and what is computed again: scores in the backward pass, layers under a checkpoint (`again`),
    less full layers' attention where it is `kept`. The head never is: the chunked loss takes its gradient forward.
    """
    more = 2 * T * shape.num_layers * layer_matrices(shape) * again
    for layer in layers:
        forwards = again and not (kept and layer[0] is None)
        more += layer_pairs(shape, T, layer) * 2 * shape.head_dim * (1 + 2 * forwards)
    return model_flops(shape, layers, T, weights_train=trains) + more


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What trains of a layer: a frozen matrix does not keep its input for the backward pass, one that trains does.

    adapted   projections with LoRA: q_proj and so on; their LoRA matrices are fp32, and so is the input each one keeps
    norms     the norms' weights train
    weights   everything trains, nothing is adapted
    """

    adapted: frozenset[str] = frozenset()
    norms: bool = True
    weights: bool = False


def training_memory(
    shape: ModelShape,
    layers: Sequence[Layer],
    T: int,
    micro_batch: int = 1,
    *,
    trainable: int,
    trained: Trained = Trained(),
    moment_bytes: int = 8,
    item_bytes: int = 2,
    checkpointing: int = 1,
    chunk: int | None = None,
    quantized: float | None = None,
    keep_attention: bool = False,
    tiles: int | None = None,
    offload: bool = False,
    runtime: int = 2_500_000_000,
    partition: Partition = WHOLE,
) -> dict[str, int]:
    """Bytes of a training step on one device by what holds them; the total is the sum.

    trainable     parameters that train: fp32 master, gradient and two AdamW moments, 16 bytes each
    trained       which parts of a layer those are
    moment_bytes  of the two moments together: 8, or 2 for 8-bit AdamW
    item_bytes    of a stored weight and of an activation
    checkpointing layers that share a checkpoint, all of which are live while they are computed again; 0: none
    quantized     bytes of an entry of the layers' matrices where these are quantised: about 0.52 for 4 bits, 1 for 8
    chunk         tokens of logits held at a time (default: `loss_chunk` of a CPU)
    runtime       an accelerator's context, libraries and allocator slack
    partition     what of it other processes hold; what waits on the host is not counted
    keep_attention, tiles (tokens), offload are the knobs of the training spec. Offloaded checkpoints are on the host,
    not counted but for the two on their way. The patterns of the layers matter to tiles alone: the kernels used here
    hold no scores. `layer` is what the peak of a layer's backward pass needs, or of the loss where that is more.
    """
    tokens, X = T * micro_batch, T * micro_batch * shape.hidden_size * item_bytes
    attention, mlp = _kept(shape, item_bytes, trained)  # bytes a token
    live = tokens * (attention + mlp)
    stored = -(-len(layers) // checkpointing) if checkpointing else len(layers)
    if checkpointing and offload:
        stored = min(2, stored)
    kept = [window is None for window, _ in layers].count(True) if keep_attention else 0
    logits = min(loss_chunk(shape.vocab_size) if chunk is None else chunk, tokens) * shape.vocab_size
    work = max(_layer_work(shape, T, micro_batch, layer, item_bytes, trained, tiles) for layer in set(layers))
    work = work if checkpointing else tokens * 3 * shape.intermediate_size * item_bytes
    work += max(0, min(checkpointing, len(layers)) - 1) * (live + X)
    # the last norm keeps its input and its output normalised; both, and its result, are there while the loss is made
    head = 3 * X + (0 if item_bytes == 4 else 2 * X) + logits * (4 if item_bytes == 4 else 4 + item_bytes)
    own_master = trained.weights and item_bytes == 4 and not partition.stage  # DeepSpeed makes a copy even of fp32
    items = {
        **_state(shape, trainable, moment_bytes + (not own_master) * MASTER_BYTES, item_bytes, quantized, partition),
        "checkpoints" if checkpointing else "activations": stored * (X if checkpointing else live + X),
        "kept attention": kept * tokens * shape.num_heads * (shape.head_dim * item_bytes + 4),
        "layer": max(work, head),
        "loss": X,  # the gradient of the last states, which is handed down as the loss made it
        "positions": tokens * (8 * shape.head_dim + 32),
        "runtime": runtime,
    }
    return {name: size for name, size in items.items() if size}


def _state(
    shape: ModelShape, trainable: int, optimizer_bytes: int, item_bytes: int, quantized: float | None, by: Partition
) -> dict[str, int]:
    """Bytes of what does not depend on the tokens: weights, and what belongs to those that train."""
    matrices, every = shape.num_layers * layer_matrices(shape), parameter_count(shape)
    weights = item_bytes * (every - matrices) + (quantized or item_bytes) * matrices
    optimizer = 0 if by.offload_optimizer else optimizer_bytes * trainable / by.ranks
    gradients = GRADIENT_BYTES * trainable / (by.ranks if by.stage >= 2 else 1)
    if by.stage >= 2 and by.offload_optimizer:
        gradients = 0
    divides = by.stage == 3 and (by.ranks > 1 or by.offload_weights)
    if divides:
        weights = 0 if by.offload_weights else weights / by.ranks
    return {
        "weights": int(weights),
        "gathered weights": divides * item_bytes * (min(every, by.live) + min(every, by.prefetch)),
        "trainable": int(optimizer + gradients),
        "buckets": by.buffers * min(by.bucket, trainable) * (GRADIENT_BYTES if by.stage == 1 else item_bytes),
    }


def _kept(shape: ModelShape, item_bytes: int, trained: Trained) -> tuple[int, int]:
    """Bytes a token that the attention half and the MLP half of a layer keep for their backward pass, its input apart:
    counted in transformers' Llama and PEFT, op by op, and seen so in torch's profiler (fp32 and bf16, on a CPU)."""
    E, F, i, full = shape.hidden_size, shape.intermediate_size, item_bytes, trained.weights
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def inputs(width: int, *names: str) -> int:
        """What matrices with one input keep of it; LoRA's in bf16 each make an fp32 copy of their own."""
        adapted = len(trained.adapted & set(names))
        return i * width if full else 4 * width * (min(adapted, 1) if i == 4 else adapted)

    norm = (0 if i == 4 else 4) * E + (i * E if full or trained.norms else 0)  # its input in fp32, normalised
    heads = i * 2 * (queries + keys) + inputs(queries, "o_proj")  # q, k, v, what the kernel returns; it put together
    attention = norm + inputs(E, "q_proj", "k_proj", "v_proj") + heads
    return attention, norm + (i * E if i == 4 else 0) + inputs(E, "gate_proj", "up_proj") + 3 * i * F


def _layer_work(
    shape: ModelShape, T: int, batch: int, layer: Layer, item_bytes: int, trained: Trained, tiles: int | None
) -> int:
    """Bytes in use at most while one layer is recomputed and differentiated, whole or in tiles.

    Either the gradients of the MLP's three states of F, or of q, k and v; what is put together gives way to its own.
    """
    E, i, (window, group) = shape.hidden_size, item_bytes, layer
    attention, mlp = _kept(shape, i, trained)
    mlp += 3 * i * shape.intermediate_size
    back = i * shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    if tiles is None:
        return T * batch * max(attention + mlp, attention + i * E + back)
    if window is not None:
        size, halo = max(tiles, window), window - 1
    elif group is not None:
        size, halo = -(-tiles // group) * group, group // 2
    else:
        size, halo = T, 0
    rows, states = min(T, size + halo), 2 * i * E  # a tile's h and its gradient; dx is of the whole row
    mlp -= i * E if i == 4 else 0  # its input is h
    tile = max(rows * (attention + states) + min(tiles, T) * mlp, rows * (attention + states + back))
    return batch * (T * E * i + tile)


def _band(T: int, window: int | None) -> int:
    """Pairs of T tokens, each with the `window` up to itself."""
    W = T if window is None else min(window, T)
    return T * W - W * (W - 1) // 2
