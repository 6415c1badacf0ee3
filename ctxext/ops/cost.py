"""The cost of a model, computed from its sizes: parameters, attention pairs, FLOPs and bytes.

    E hidden_size   L num_layers   H num_heads   K num_kv_heads   D head_dim   F intermediate_size   V vocab_size
    T tokens        W window       G group       P parameters of the layers   X = T · E · item bytes, one hidden state

    a matrix         2 · inputs · outputs FLOPs a token
    attention        a pair (query, key) costs 2 D FLOPs a head for a score and 2 D for its value:
                     forward 2 · 2D a pair and head, backward 5 · 2D (dV, dP, dQ, dK and the scores again)
    full causal      T (T + 1) / 2 pairs        attention costs more than the layers' matrices at about T > 12 E (Llama)
    sliding          T W - W (W - 1) / 2        3/4 of the layers W = 128 at 100k: a step costs under half of dense
    S²               about T G / 2              G = T / 4: a quarter of the pairs of dense

Counts are exact integers. `training_memory` counts the tensors that are live at the peak of a step; docs/plan.md
compares it with measurements on a CPU, ZeRO's partition included. It is not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ctxext.ops.logits import loss_chunk
from ctxext.ops.masks import first_shifted_head

MASTER_BYTES, GRADIENT_BYTES = 4, 4  # bytes for each trained parameter: both are fp32

Layer = tuple[int | None, int | None]  # (sliding_window, group_size) in tokens; None, None = full causal


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a Llama-like decoder: pre-norm RMSNorm, SwiGLU, grouped-query attention.

    tied             input embedding and output head are one [V, E] weight
    attention_bias   q, k and v have biases (Qwen2)
    output_bias      o has a bias
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
    """How ZeRO (arXiv 1910.02054) divides the state of a run among `ranks` processes, each with its own device.

    stage                1 divides masters and moments, 2 also the gradients, 3 also the weights
    offload_optimizer    masters and moments, from stage 2 on also the gradients, are kept on the host
    offload_weights      the divided weights are kept on the host
    bucket               entries of a buffer that collects gradients to be sent; never more than the trained parameters
    buffers              number of these buffers
    live                 most weights that stage 3 has gathered at once
    prefetch             most weights of one gather; they are held twice until they are copied into place
    """

    ranks: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 0
    buffers: int = 1
    live: int = 1_000_000_000
    prefetch: int = 50_000_000


WHOLE = Partition()  # one process: nothing is divided


def layer_matrices(shape: ModelShape) -> int:
    """Returns the number of entries of one layer's seven matrices: q and o, k and v, gate, up and down."""
    attention = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    return attention + 3 * shape.hidden_size * shape.intermediate_size


def parameter_count(shape: ModelShape, *, embeddings: bool = True) -> int:
    """Returns the number of parameters; without the embedding and the head if `embeddings` is false."""
    # A layer has two norms of E; the biases, sinks and query/key norms depend on the family.
    layer = layer_matrices(shape) + 2 * shape.hidden_size
    if shape.attention_bias:
        layer += shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    layer += shape.output_bias * shape.hidden_size + shape.head_sinks * shape.num_heads
    layer += shape.qk_norm * 2 * shape.head_dim
    vocabulary = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    return shape.num_layers * layer + shape.hidden_size + (vocabulary if embeddings else 0)


@lru_cache(maxsize=1024)  # many layers are alike, and a search calls this for the layers of hundreds of models
def attention_pairs(
    T: int, sliding_window: int | None = None, group_size: int | None = None, *, shifted: bool = False
) -> int:
    """Returns the pairs (query, key) that one head attends in a row of T tokens: the exact sum of q - lo[q] + 1.

    `shifted` selects the half of the heads whose S² groups are moved by G // 2; without groups it changes nothing.
    """
    if group_size is None:
        return _band(T, sliding_window)
    # The first group of the shifted heads and the last group of all heads may be shorter.
    first = min(T, group_size - group_size // 2) if shifted else 0
    full, last = divmod(T - first, group_size)
    return _band(first, sliding_window) + full * _band(group_size, sliding_window) + _band(last, sliding_window)


def layer_pairs(shape: ModelShape, T: int, layer: Layer) -> int:
    """Returns the sum of `attention_pairs` over all heads of one layer, both S² halves included."""
    window, group = layer
    if group is None:
        return shape.num_heads * attention_pairs(T, window)
    f = first_shifted_head(shape.num_heads, shape.num_kv_heads)
    shifted = attention_pairs(T, window, group, shifted=True)
    return f * attention_pairs(T, window, group) + (shape.num_heads - f) * shifted


def kv_cache_bytes(shape: ModelShape, windows: Sequence[int | None], T: int, item_bytes: int = 2) -> int:
    """Returns the bytes of the key/value cache after T tokens.

    `windows` has W or None for each layer; a layer with a window holds min(T, W) tokens.
    """
    tokens = sum(T if window is None else min(T, window) for window in windows)
    return 2 * tokens * shape.num_kv_heads * shape.head_dim * item_bytes


def forward_flops(shape: ModelShape, layers: Sequence[Layer], T: int) -> int:
    """Returns the FLOPs of one forward over a row of T tokens, with the logits of every token.

    Norms and softmax are not counted.
    """
    linear = 2 * T * (shape.num_layers * layer_matrices(shape) + shape.vocab_size * shape.hidden_size)
    return linear + 2 * 2 * shape.head_dim * sum(layer_pairs(shape, T, layer) for layer in layers)


def model_flops(shape: ModelShape, layers: Sequence[Layer], T: int, *, weights_train: bool = False) -> int:
    """Returns the FLOPs that forward and backward over one row of T tokens need, as MFU counts them.

    Source: arXiv 2204.02311, appendix B. Counted for the layers: forward, gradient of the input, and gradient of the
    weights if they train (`weights_train`). Recomputation is not counted, nor are LoRA's own matrices (rank / width of
    this) and the optimizer.
    """
    passes = 2 + weights_train
    linear = 2 * T * (shape.num_layers * layer_matrices(shape) + shape.vocab_size * shape.hidden_size) * passes
    return linear + 2 * shape.head_dim * (2 + 4) * sum(layer_pairs(shape, T, layer) for layer in layers)


def step_flops(
    shape: ModelShape, layers: Sequence[Layer], T: int, *, again: bool = True, kept: bool = False, trains: bool = False
) -> int:
    """Returns `model_flops` plus the FLOPs of recomputation.

    Recomputed are the scores in the backward pass and, under a checkpoint (`again`), the layers. With `kept`, the
    attention of layers without a window is stored and not recomputed. The head is never recomputed, because the chunked
    loss computes its gradient in the forward pass. `trains` is `weights_train` of `model_flops`.
    """
    more = 2 * T * shape.num_layers * layer_matrices(shape) * again
    for layer in layers:
        # 2 D FLOPs a pair for the scores of the backward pass, and 2 · 2D for a repeated forward.
        forwards = again and not (kept and layer[0] is None)
        more += layer_pairs(shape, T, layer) * 2 * shape.head_dim * (1 + 2 * forwards)
    return model_flops(shape, layers, T, weights_train=trains) + more


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Which parts of a layer train. A trained matrix keeps its input for the backward pass; a frozen one does not.

    adapted   projections with LoRA, such as q_proj; their LoRA matrices and the inputs that they keep are fp32
    norms     the weights of the norms train
    weights   all weights train, and no projection is adapted
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
    logits: int | None = None,
    quantized: float | None = None,
    keep_attention: bool = False,
    tiles: int | None = None,
    offload: bool = False,
    runtime: int = 2_500_000_000,
    partition: Partition = WHOLE,
) -> dict[str, int]:
    """Returns the bytes of a training step on one device, by purpose; the total is the sum of the values.

    trainable     trained parameters: fp32 master, gradient and two AdamW moments, 16 bytes each
    trained       which parts of a layer these are
    moment_bytes  bytes of the two moments together: 8, or 2 for 8-bit AdamW
    item_bytes    bytes of a stored weight and of an activation
    checkpointing layers that share a checkpoint, all of which are live while they are recomputed; 0: none
    quantized     bytes of an entry of the layers' matrices where these are quantised: about 0.52 for 4 bits, 1 for 8
    chunk         tokens of logits held at once (default: `loss_chunk` of a CPU)
    logits        bytes of the logits that the loss holds; None: those of the plain loss, for `chunk` tokens
    runtime       an accelerator's context, libraries and allocator slack
    partition     how the state is divided among processes; state kept on the host is not counted
    keep_attention, tiles (tokens) and offload are options of the training spec. Offloaded checkpoints are on the host
    and not counted, except for the two in transfer. The patterns of the layers matter for tiles only, because the
    kernels hold no scores. The item `layer` is the peak of a layer's backward pass, or of the loss where that is more.
    """
    # What all layers store until the backward pass: checkpoints, or all activations without checkpointing.
    tokens, X = T * micro_batch, T * micro_batch * shape.hidden_size * item_bytes
    attention, mlp = _kept(shape, item_bytes, trained)  # bytes a token
    live = tokens * (attention + mlp)
    stored = -(-len(layers) // checkpointing) if checkpointing else len(layers)
    if checkpointing and offload:
        stored = min(2, stored)
    kept = [window is None for window, _ in layers].count(True) if keep_attention else 0
    # The peak: the most expensive kind of layer, plus the other layers that share its checkpoint, or else the loss.
    if logits is None:
        held = min(loss_chunk(shape.vocab_size) if chunk is None else chunk, tokens)
        logits = held * shape.vocab_size * (4 if item_bytes == 4 else 4 + item_bytes)
    work = max(_layer_work(shape, T, micro_batch, layer, item_bytes, trained, tiles) for layer in set(layers))
    # Without checkpointing nothing is recomputed: only the gradients of the MLP's three states of F are added.
    work = work if checkpointing else tokens * 3 * shape.intermediate_size * item_bytes
    work += max(0, min(checkpointing, len(layers)) - 1) * (live + X)
    # The last norm keeps its input and the normalised input. Both are live while the loss is computed, and so is the
    # norm's result.
    head = 3 * X + (0 if item_bytes == 4 else 2 * X) + logits
    own_master = trained.weights and item_bytes == 4 and not partition.stage  # DeepSpeed copies even fp32 weights
    items = {
        **_state(shape, trainable, moment_bytes + (not own_master) * MASTER_BYTES, item_bytes, quantized, partition),
        "checkpoints" if checkpointing else "activations": stored * (X if checkpointing else live + X),
        "kept attention": kept * tokens * shape.num_heads * (shape.head_dim * item_bytes + 4),
        "layer": max(work, head),
        "loss": X,  # the gradient of the last states, which the loss computes in the forward pass
        "positions": tokens * (8 * shape.head_dim + 32),
        "runtime": runtime,
    }
    return {name: size for name, size in items.items() if size}


def _state(
    shape: ModelShape, trainable: int, optimizer_bytes: int, item_bytes: int, quantized: float | None, by: Partition
) -> dict[str, int]:
    """Returns the bytes that do not depend on the tokens: weights, and the state of the trained parameters."""
    matrices, every = shape.num_layers * layer_matrices(shape), parameter_count(shape)
    weights = item_bytes * (every - matrices) + (quantized or item_bytes) * matrices
    # Masters and moments are divided in every stage, gradients from stage 2 on, weights in stage 3.
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
    """Returns the bytes a token that the attention and the MLP of a layer keep for their backward pass.

    The layer's input is not included. Counted op by op in transformers' Llama and PEFT, and confirmed with torch's
    profiler (fp32 and bf16, on a CPU).
    """
    E, F, i, full = shape.hidden_size, shape.intermediate_size, item_bytes, trained.weights
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def inputs(width: int, *names: str) -> int:
        """Bytes that matrices with one shared input keep of it; in bf16 each LoRA makes its own fp32 copy."""
        adapted = len(trained.adapted & set(names))
        return i * width if full else 4 * width * (min(adapted, 1) if i == 4 else adapted)

    # A norm computes in fp32: it keeps its input in fp32 (no copy if that is the dtype) and the normalised input.
    norm = (0 if i == 4 else 4) * E + (i * E if full or trained.norms else 0)  # input in fp32, normalised input
    heads = i * 2 * (queries + keys) + inputs(queries, "o_proj")  # q, k, v, output; o's input
    attention = norm + inputs(E, "q_proj", "k_proj", "v_proj") + heads
    return attention, norm + (i * E if i == 4 else 0) + inputs(E, "gate_proj", "up_proj") + 3 * i * F


def _layer_work(
    shape: ModelShape, T: int, batch: int, layer: Layer, item_bytes: int, trained: Trained, tiles: int | None
) -> int:
    """Returns the peak bytes while one layer is recomputed and differentiated, whole or in tiles.

    The peak is in the backward pass of the MLP, with the gradients of its three states of F, or in that of attention,
    with the gradients of q, k and v.
    """
    E, i, (window, group) = shape.hidden_size, item_bytes, layer
    attention, mlp = _kept(shape, i, trained)
    mlp += 3 * i * shape.intermediate_size
    back = i * shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    if tiles is None:
        return T * batch * max(attention + mlp, attention + i * E + back)
    # A tile of `size` tokens also reads the `halo` before it: the window, or half a group for the shifted heads. A full
    # layer has one tile, of all T tokens.
    if window is not None:
        size, halo = max(tiles, window), window - 1
    elif group is not None:
        size, halo = -(-tiles // group) * group, group // 2
    else:
        size, halo = T, 0
    rows, states = min(T, size + halo), 2 * i * E  # h and its gradient of a tile; dx covers the whole row
    mlp -= i * E if i == 4 else 0  # in fp32 its input is h itself
    tile = max(rows * (attention + states) + min(tiles, T) * mlp, rows * (attention + states + back))
    return batch * (T * E * i + tile)


def _band(T: int, window: int | None) -> int:
    """Returns the pairs of T tokens, each with the `window` keys up to itself."""
    W = T if window is None else min(window, T)
    return T * W - W * (W - 1) // 2
