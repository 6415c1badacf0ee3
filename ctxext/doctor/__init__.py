"""Checks the environment and models. Each finding is ok, a warning or a failure, and may name a remedy."""
