"""What this machine and its container have: memory, cores, GPUs. No torch."""
