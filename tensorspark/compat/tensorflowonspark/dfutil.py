"""`tensorflowonspark.dfutil`: DataFrames from and to TFRecord files, under its names.

What differs: `saveAsTFRecords` and `loadTFRecords` need no jar of tensorflow-hadoop; paths without a scheme are local;
the schema fits all records, not the first alone; a null becomes a missing feature, instead of an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tensorspark.data.tfrecord.frames import example_schema as infer_schema
from tensorspark.data.tfrecord.frames import examples_to_rows as fromTFExample
from tensorspark.data.tfrecord.frames import is_loaded as isLoadedDF
from tensorspark.data.tfrecord.frames import load_tfrecords
from tensorspark.data.tfrecord.frames import rows_to_examples as toTFExample
from tensorspark.data.tfrecord.frames import save_tfrecords as saveAsTFRecords

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import DataFrame

__all__ = ["fromTFExample", "infer_schema", "isLoadedDF", "loadTFRecords", "saveAsTFRecords", "toTFExample"]


def loadTFRecords(sc: SparkContext, input_dir: str, binary_features: Iterable[str] = ()) -> DataFrame:
    """`load_tfrecords` on the session of a context; floats become doubles."""
    from pyspark.sql import SparkSession

    return load_tfrecords(SparkSession(sc), input_dir, binary_features, widens_floats=True)
