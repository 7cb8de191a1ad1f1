"""How fast it is, measured against what it is compared with in the same run.

Each benchmark is a program (``python -m benchmarks.wire``, ``python -m benchmarks.train``) that prints a table and,
with ``--json FILE``, writes the same figures for machines; `benchmarks.report` has the form. What is compared runs
interleaved, because on a busy machine only ratios of one run mean something.
"""
