"""How fast weights travel between workers and server, and what it takes: ``python -m benchmarks.wire``."""
