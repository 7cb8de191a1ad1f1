"""TFRecord files: how fast they are read and written."""
