"""Pure maths: tensors or numbers in, tensors or numbers out. No modules, no models, no files.

    masks      one vector per pattern: query q sees the keys lo[q] <= k <= q
    attention  the slow reference that every backend is compared with
    backends   fast implementations with the same results
    logits     how many tokens' logits a chunked loss holds at once
    low_rank   how large LoRA's alpha is, and why
    cost       parameters, attention pairs, FLOPs, cache and training memory, computed from sizes

This file imports nothing, so that `low_rank`, `cost` and `masks.Pattern` do not import torch.
"""
