"""How fast it is, measured against what it is compared with in the same run; and whether it survives what may happen.

Each benchmark is a program (``python -m benchmarks.wire``, ``python -m benchmarks.train``) that prints a table and,
with ``--json FILE``, writes the same figures for machines; `benchmarks.measuring.report` has the form. What is compared
runs interleaved, because on a busy machine only ratios of one run mean something.

A benchmark is a package with a ``__main__``, or one module. Several share `measuring` (processes, what they hold, the
report), `workloads` (rows, the model, weights) and `clusters` (Spark on this machine).
"""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
"""Where programs start that import `benchmarks` and `examples`."""
