"""Several servers for one model's weights: the driver's, and processes beside it, each with a range of the buffer."""
