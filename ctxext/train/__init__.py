"""Training: the plan of a run, the chunked loss, the loop and its checkpoints."""
