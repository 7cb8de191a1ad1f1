"""The original Tensorspark's import paths."""
