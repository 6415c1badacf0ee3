"""Selects what each decoder layer keeps for the backward pass, through transformers' own gradient checkpointing.

Shapes: B batch, T tokens, E model width, H query heads, D head dim.

A stock layer under gradient checkpointing calls `_gradient_checkpointing_func(call, x)` instead of computing
y = call(x) [B,T,E] itself; `enable` gives each layer the function that MemorySpec requests:

    checkpoint        x [B,T,E] is kept, the layer is computed again            torch's checkpoint, non-reentrant
    checkpoint: k     x of every k-th layer is kept, k layers are computed      the same, around k layers: `Together`
                      again and are in memory together
    keep: attention   and the attention's output [B,H,T,D] and logsumexp        torch's selective checkpoint
                      of full and S² layers, whose kernel then runs once
    tiles             x is kept, the layer is computed again tile by tile       train/tiles.py; keep goes with it
    offload           x waits on the host, whichever of these keeps it          `HostInputs`, around any of them

torch's checkpoint stops recomputing once the backward pass has what it needs, before the last linear layer of the MLP;
tiles also compute this last layer again.

Not done: keeping the attention of the backends naive and flex, which are not a single kernel; it is computed twice.
torch is imported inside the functions that use it, so that a planner can call `check` without torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ctxext.errors import InputError, ModelError
from ctxext.ops.masks import Pattern
from ctxext.train.finetune_spec import MemorySpec
from ctxext.units import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KERNELS = {  # the attention kernels that `keep: attention` runs once; each returns its output and logsumexp
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
}


def check(memory: MemorySpec, windows: Sequence[int | None]) -> None:
    """Raises InputError for memory settings that cannot be combined.

    `windows` has the window of each layer in tokens, None for a full layer.
    """
    options = {
        "keep: attention": memory.keep != "nothing",
        f"tiles: {memory.tiles}": memory.tiles is not None,
        "offload: true": memory.offload,
    }
    useless = [name for name, given in options.items() if given]
    if useless and not memory.checkpoint:
        raise InputError(
            f"memory.checkpoint: false keeps everything on the device, but {', '.join(useless)} needs recomputation",
            hint="set memory.checkpoint: true, or leave the other options out",
        )
    # k layers share one checkpoint: this excludes what works on a single layer.
    k = int(memory.checkpoint)
    if k > len(windows):
        raise InputError(
            f"memory.checkpoint: {k} layers per checkpoint, but the model has {counted(len(windows), 'layer')}"
        )
    if k > 1 and memory.tiles is not None:
        raise InputError(
            f"memory.checkpoint: {k} with tiles: {memory.tiles}, but tiles need one layer per checkpoint",
            hint="set memory.checkpoint: true, or leave memory.tiles out",
        )
    if k > 1 and memory.keep != "nothing" and any(window is not None for window in windows):
        raise InputError(
            f"memory.checkpoint: {k} with keep: {memory.keep}, which is for full layers only: a checkpoint would "
            "hold sliding ones as well",
            hint="set memory.checkpoint: true or memory.keep: nothing; both together need a model without windows",
        )


def enable(model: Any, memory: MemorySpec, patterns: Sequence[Pattern]) -> list[str]:
    """Sets up every decoder layer of a stock or PEFT-wrapped causal LM; patterns[i] is layer i's pattern in training.

    Returns notes on what could not be done as requested: layers that cannot be tiled are recomputed whole. With
    `checkpoint: false` nothing is done. With `checkpoint: k` the outputs of the layers inside a checkpoint are not
    available while gradients are on. Raises InputError as `check` does, ModelError where the patterns are not those of
    the model.
    """
    from ctxext.model.load import causal_lm
    from ctxext.train import tiles

    check(memory, [pattern.sliding_window for pattern in patterns])
    if not memory.checkpoint:
        return []
    base = causal_lm(model)
    layers = base.get_decoder().layers
    _check_patterns(layers, patterns)
    # The name of this method differs between the supported versions of transformers.
    switch_on = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    switch_on({"use_reentrant": False})
    host, whole, k = HostInputs() if memory.offload else None, [], int(memory.checkpoint)
    together = [Together() for _ in range(0, len(layers), k)]
    for index, (layer, pattern) in enumerate(zip(layers, patterns, strict=True)):
        keep = keeping if memory.keep == "attention" and pattern.sliding_window is None else None
        # The innermost function recomputes the layer, in tiles where the layer's parts allow it.
        if memory.tiles is not None and tiles.fits(layer):
            run: Any = partial(tiles.run, layer, pattern, memory.tiles, keep)
        else:
            run = partial(_checkpoint, keep)
            whole += [index] if memory.tiles is not None else []
        # Around it, from the inside out: the move to the host, then the grouping of k layers. `index < k` marks the
        # first checkpoint of the model.
        run = run if host is None else partial(host.run, run, index < k)
        if k > 1:
            last = (index + 1) % k == 0 or index + 1 == len(layers)
            run = partial(together[index // k].run, run, index % k == 0, last)
        layer._gradient_checkpointing_func = run
    if not whole:
        return []
    return [f"memory.tiles: without tiles (unsupported shape): {counted(len(whole), 'layer')}, first {whole[0]}"]


def _check_patterns(layers: Any, patterns: Sequence[Pattern]) -> None:
    if len(layers) != len(patterns):
        raise ModelError(f"{len(patterns)} attention patterns for a model of {len(layers)} layers")
    for index, (layer, pattern) in enumerate(zip(layers, patterns, strict=True)):
        # Mistral's attention has no window of its own: it reads the config's window at each call.
        own = getattr(layer, "self_attn", None)
        window = getattr(own, "sliding_window", getattr(getattr(own, "config", None), "sliding_window", None))
        if window != pattern.sliding_window:
            raise ModelError(f"layer {index} has the window {window}, its pattern says {pattern.sliding_window}")


def _checkpoint(keep: Callable[[], tuple[Any, Any]] | None, call: Any, x: Tensor) -> Tensor:
    """The layer under torch's checkpoint. It saves no random state: nothing is random, dropout is refused elsewhere."""
    from torch.utils.checkpoint import checkpoint

    options: dict[str, Any] = {} if keep is None else {"context_fn": keep}
    return checkpoint(call, x, use_reentrant=False, preserve_rng_state=False, **options)


class Together:
    """Layers that share a checkpoint: all but the last return their input unchanged, the last computes all of them."""

    def __init__(self) -> None:
        self._waiting = list[Any]()

    def run(self, function: Any, first: bool, last: bool, call: Any, x: Tensor) -> Tensor:
        """Collects `call`; at the last of the layers computes function(all calls in a row, x).

        Without gradients each layer computes its own call(x).
        """
        import torch

        if not torch.is_grad_enabled():  # nothing is kept, and evals read the output of single layers
            y: Tensor = call(x)
            return y
        # The first layer starts a new list, so that calls of a forward pass that failed are dropped.
        calls = self._waiting = [*([] if first else self._waiting), call]
        if not last:
            return x
        self._waiting = []
        y = function(partial(_in_a_row, calls), x)
        return y


def _in_a_row(calls: Sequence[Any], x: Tensor) -> Tensor:
    for call in calls:
        x = call(x)
    return x


def keeping() -> tuple[Any, Any]:
    """Returns two contexts, for the forward pass and the recomputation: attention kernels run in the first alone."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        named = operation._schema.name in KERNELS
        return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class HostInputs:
    """Keeps the layers' inputs on the host between the passes; one instance per model.

    On a GPU a side stream copies them to pinned memory during the computation; in the backward pass each layer's input
    is fetched while the layer above it computes. On a CPU a copy is made, which saves nothing. The GPU part is tested
    by tests/gpu/test_recompute.py alone.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[_HostInput] | None = None  # weak: autograd's graph owns the inputs and frees them

    def run(self, function: Any, first: bool, call: Any, x: Tensor) -> Tensor:
        """Computes function(call, x) and keeps on the host what it saves; `first`: the model's first checkpoint."""
        from torch.autograd.graph import saved_tensors_hooks

        if first:
            self._last = None
        with saved_tensors_hooks(self._put, self._get):
            y: Tensor = function(call, x)
        return y

    def _put(self, x: Tensor) -> Tensor | _HostInput:
        import torch

        if not x.numel():  # torch's checkpoint saves an empty tensor beside its input
            return x
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        below = self._last() if self._last is not None else None
        kept = _HostInput(x, self._stream, below)
        self._last = weakref.ref(kept)
        return kept

    def _get(self, kept: Tensor | _HostInput) -> Tensor:
        return kept.get() if isinstance(kept, _HostInput) else kept


class _HostInput:
    """One layer's input [B,T,E]; `below` is the input of the layer before it, which the backward pass needs next."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream | None, below: _HostInput | None):
        import torch

        self.device, self.stream, self.below = x.device, stream, below
        self.fetched: tuple[Tensor, torch.cuda.Event] | None = None
        if stream is None:
            self.host = x.clone()
            return
        self.host = torch.empty_like(x, device="cpu", pin_memory=True)
        # The copy starts only after x is computed. The allocator must not reuse x's memory before the copy ends.
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)

    def fetch(self) -> None:
        """Starts the copy back to the device, after the copy to the host: a stream runs its copies in order."""
        import torch

        if self.stream is None or self.fetched is not None:
            return
        with torch.cuda.stream(self.stream):
            x = self.host.to(self.device, non_blocking=True)
            self.fetched = x, self.stream.record_event()

    def get(self) -> Tensor:
        """Returns the input on its device and starts to fetch the input of the layer below."""
        import torch

        # Both copies start before this one is waited for, so that the second runs while this layer computes.
        self.fetch()
        if self.below is not None:
            self.below.fetch()
            self.below = None
        if self.fetched is None:
            return self.host
        (x, event), self.fetched = self.fetched, None
        # The computation waits for the copy. The side stream allocated x, so its use on this stream is recorded.
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        x.record_stream(stream)
        return x
