"""Floor 6: what a model can do, measured. Every number names its protocol."""

# The protocols of perplexity, here so that refusing an unknown one costs no torch.
PROTOCOLS = ("hf-stride", "longlora", "truncate")
