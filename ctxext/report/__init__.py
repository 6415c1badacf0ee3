"""Evaluations and training runs in one HTML file: read (runs), drawn (figures), put in words (sections, page)."""
