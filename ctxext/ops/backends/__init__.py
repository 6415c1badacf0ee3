"""Fast attention, one file a backend, all with the signature of `blocked.attention` and held to `naive_attention`.

blocked    SDPA calls on views of the tokens: any pattern, CPU and any GPU
views      those views, and where their gradients meet
"""
