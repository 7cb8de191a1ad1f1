"""The parameter server, under the original's name."""

from tensorspark.ps.server import ParameterServer

__all__ = ["ParameterServer"]
