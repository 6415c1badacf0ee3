"""Floor 6: measures what a model can do. Every number names its protocol."""

# The protocols of perplexity. They are defined here so that an unknown one is refused without importing torch.
PROTOCOLS = ("hf-stride", "longlora", "truncate")
