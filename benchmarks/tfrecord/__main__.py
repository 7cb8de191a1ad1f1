"""How fast TFRecord files are read and written."""

from __future__ import annotations

import os
import sys

from benchmarks.measuring.report import Report, argument_parser

# Per core is what is compared: TensorFlow takes its number of threads from here, when it is imported.
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3")

from benchmarks.tfrecord import kernels

_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 9, 3


def main() -> int:
    """Measures, and reports."""
    arguments = argument_parser(__doc__.splitlines()[0]).parse_args()
    report = Report("TFRecord", ["tensorflow", "numpy", "pyarrow", "crc32c"])
    kernels.measure(report, _NUM_QUICK_ROUNDS if arguments.quick else _NUM_ROUNDS)
    return report.conclude(arguments.json, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
