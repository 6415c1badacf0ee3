"""A finished model for others to run: what they honour of it, and the directory they are given."""
