"""How fast TFRecord files are read and written: in one process, and on Spark against Parquet.

All sides are measured in turns in each round; figures are medians over the rounds, ratios the medians of the rounds'
ratios.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from benchmarks.measuring.report import Report, argument_parser

# Per core is what is compared: TensorFlow takes its number of threads from here, when it is imported.
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3")

from benchmarks.tfrecord import kernels, memory, spark

PARTS: dict[str, Callable[[Report, bool], None]] = {
    "kernels": kernels.measure,
    "spark": spark.measure,
    "memory": memory.measure,
}
"""What adds a part's rows to a report, by its name; takes whether it is to be quick."""


def main() -> int:
    """Measures, and reports."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure only these")
    arguments = parser.parse_args()
    report = Report("TFRecord", ["tensorflow", "numpy", "pyarrow", "pyspark", "crc32c"])
    for part in arguments.only:
        PARTS[part](report, arguments.quick)
    return report.conclude(arguments.json, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
