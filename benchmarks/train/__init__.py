"""How fast the original's MNIST program trains, against no server: ``python -m benchmarks.train``."""
