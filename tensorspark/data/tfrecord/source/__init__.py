"""TFRecord as a data source of Spark: batch and streaming, reading and writing."""
