"""Other systems' import paths: their names for what tensorspark has."""
