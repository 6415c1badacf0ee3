"""Instruments that look inside a model: what its layers and heads see, carry and need."""
