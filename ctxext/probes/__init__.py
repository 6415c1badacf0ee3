"""Probes of a model's inside: what its layers and heads see, carry and need."""
