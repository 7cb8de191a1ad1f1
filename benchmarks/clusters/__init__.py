"""Spark on this machine, for benchmarks and tests that need one of their own."""
