"""How benchmarks measure: processes that are measured, what they hold and do, and the report of it."""
