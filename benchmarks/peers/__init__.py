"""tensorspark next to elephas and to plain `model.fit`: ``python -m benchmarks.peers``."""
