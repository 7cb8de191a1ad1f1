"""The driver's side: `SparkSession`."""

from tensorspark.session.session import SparkSession

__all__ = ["SparkSession"]
