"""How many tokens' logits a chunked loss holds at once, by the vocabulary and the device."""

from __future__ import annotations

LOGITS_BYTES = 64 * 1024**2  # of the fp32 logits held at a time on a CPU
GPU_TOKENS, GPU_LOGITS_BYTES = 1024, 512 * 1024**2  # of a chunk on a GPU, at most


def loss_chunk(V: int, *, gpu: bool = False) -> int:
    """Tokens of a chunk of logits over V entries: on a CPU as many as take about 64 MiB in fp32, at least 16.

    On a GPU at least those, and up to 1,024 where their fp32 logits take at most 512 MiB. Ours, by arithmetic, not
    measured. A chunk of c tokens multiplies with the whole head [V, E], which is read again for each chunk: 2 c V E
    FLOPs for V E item bytes, or 2 c / item FLOPs a byte. A GPU computes R FLOPs in the time of a byte (bf16: H100 989
    TFLOP/s over 3.35 TB/s, R = 295; A100 153; RTX 4090 165), so that reading the head takes R item / (2 c) of the time
    of multiplying with it, R / c in bf16. 64 MiB are 130 tokens at V = 128,256: 2.3 times on an H100, and the memory
    decides. 1,024 tokens: 0.29. More gains little: the logits' own traffic, c V numbers some ten times, grows with c as
    the FLOPs do. At V = 128,256 a chunk then holds 501 MiB of fp32 logits and half of that in bf16, below the states of
    a layer at the lengths this is made for. On a CPU R is a few tens, and small chunks stay in its caches.
    """
    smallest = max(16, LOGITS_BYTES // (4 * V))
    return max(smallest, min(GPU_TOKENS, GPU_LOGITS_BYTES // (4 * V))) if gpu else smallest
