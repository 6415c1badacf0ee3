"""Which layers to keep full, and what is tuned after training: measurements that decide something."""
