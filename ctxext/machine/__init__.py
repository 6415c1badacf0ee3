"""The resources of this machine and its container: memory, cores, GPUs. No torch."""
