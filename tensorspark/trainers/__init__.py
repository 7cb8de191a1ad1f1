"""What computes: a trainer holds a model in an executor's process. Only this room imports TensorFlow."""
