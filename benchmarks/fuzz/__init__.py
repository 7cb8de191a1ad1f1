"""What mutated frames and requests do to the parser and to a live server: ``python -m benchmarks.fuzz``."""
