"""What is read and written: batches, the epoch cache, staged files, and TFRecord files from and to Spark.

The functions here are those for TFRecord files. They need pyspark, pyarrow and crc32c (``pip install
'tensorspark[tfrecord,spark]'``); importing this package imports none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords
    from tensorspark.data.tfrecord.rdds import load_tfrecords_rdd, save_tfrecords_rdd

__all__ = ["load_tfrecords", "load_tfrecords_rdd", "save_tfrecords", "save_tfrecords_rdd"]


# What needs pyspark or the extra, by the module that it is in.
_LAZY = {
    "load_tfrecords": "tensorspark.data.tfrecord.frames",
    "load_tfrecords_rdd": "tensorspark.data.tfrecord.rdds",
    "save_tfrecords": "tensorspark.data.tfrecord.frames",
    "save_tfrecords_rdd": "tensorspark.data.tfrecord.rdds",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
