"""How fast Keras trains and predicts on a DataFrame, next to Keras alone: ``python -m benchmarks.keras``."""
