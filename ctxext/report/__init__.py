"""Puts evaluations, probes and training runs into one HTML file: reading (runs), figures, text (sections, page)."""
