"""What TFRecord files hold: framing and checksums, and `tf.train.Example` messages from and to Arrow record batches."""
