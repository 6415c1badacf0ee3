"""Pure maths: tensors or numbers in, tensors or numbers out. No modules, no models, no files.

    masks      one vector per pattern: query q sees the keys lo[q] <= k <= q
    attention  the slow truth that every backend is held to
    backends   fast ways to the same numbers, one signature
    low_rank   how large LoRA's alpha is, and why
    cost       parameters, attention pairs, FLOPs, cache and training memory on paper

Nothing is imported here, so that `low_rank`, `cost` and `masks.Pattern` do not pay for torch.
"""
