"""Fast attention, one file a backend, all with the signature of `blocked.attention` and held to `naive_attention`."""
