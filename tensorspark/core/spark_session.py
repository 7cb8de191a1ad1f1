"""`SparkSession` with the original's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorspark import session
from tensorspark.config import ORIGINAL_DEFAULTS

__all__ = ["SparkSession"]


class SparkSession(session.SparkSession):
    """`tensorspark.SparkSession`, but server_host='localhost', server_port=10080, sync_interval=3, batch_size=10000.

    They apply where neither the argument nor the Spark configuration says otherwise.
    """

    _defaults: Mapping[str, Any] = ORIGINAL_DEFAULTS
