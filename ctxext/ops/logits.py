"""How many tokens' logits a chunked loss holds at once, for a vocabulary size and a device."""

from __future__ import annotations

LOGITS_BYTES = 64 * 1024**2  # bytes of fp32 logits held at once on a CPU
GPU_TOKENS, GPU_LOGITS_BYTES = 1024, 512 * 1024**2  # most tokens and most bytes of fp32 logits of a chunk on a GPU


def loss_chunk(V: int, *, gpu: bool = False) -> int:
    """Returns the tokens of a chunk of logits over a vocabulary of V entries.

    On a CPU these are as many as take about 64 MiB in fp32, at least 16. On a GPU these are at least as many, and up to
    1,024 where their fp32 logits take at most 512 MiB. The GPU limits are ours, by arithmetic, not measured:

    A chunk of c tokens is multiplied by the whole head [V, E], which is read again for each chunk. That is 2 c V E
    FLOPs for V E item bytes, or 2 c / item FLOPs a byte. A GPU computes R FLOPs in the time of reading one byte (bf16:
    H100 989 TFLOP/s over 3.35 TB/s, R = 295; A100 153; RTX 4090 165). So reading the head takes R item / (2 c) of the
    time of the multiplication, R / c in bf16. At V = 128,256, 64 MiB are 130 tokens. On an H100 reading then takes 2.3
    times as long as the multiplication, and memory bandwidth limits the speed. With 1,024 tokens it takes 0.29 times as
    long. More tokens gain little, because the traffic of the logits themselves, c V numbers about ten times, grows with
    c as the FLOPs do. At V = 128,256 a chunk then holds 501 MiB of fp32 logits and half of that in bf16. This is less
    than the states of a layer at the intended context lengths. On a CPU R is a few tens, and small chunks stay in its
    caches.
    """
    smallest = max(16, LOGITS_BYTES // (4 * V))
    return max(smallest, min(GPU_TOKENS, GPU_LOGITS_BYTES // (4 * V))) if gpu else smallest


def distillation_chunk(V: int, *, gpu: bool = False) -> int:
    """Returns the tokens of a chunk of the loss with a teacher, which holds the logits of two models."""
    return max(16, loss_chunk(V, gpu=gpu) // 2)
