"""Whether training survives what happens to its processes: ``python -m benchmarks.chaos``."""
