"""Where TFRecord files lie: listing and partition columns, reading, writing and their commit; needs no Spark."""
