"""Models: found, described layer by layer, converted, given positions and adapters, loaded."""
