"""How far training scales, measured here and simulated beyond: ``python -m benchmarks.scale``."""
