"""What several benchmarks train or send: rows, a model, weights."""
