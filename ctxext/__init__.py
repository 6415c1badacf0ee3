"""ctxext takes a pretrained causal LM and makes it long."""

__version__ = "0.1.0"
