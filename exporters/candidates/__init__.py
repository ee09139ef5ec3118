"""Which CNN fits a latency budget: untrained networks exported and measured, before any training."""
