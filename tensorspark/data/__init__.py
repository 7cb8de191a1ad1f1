"""What is read: batches, the epoch cache, staged files and TFRecords."""
