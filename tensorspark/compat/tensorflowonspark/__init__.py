"""Import paths of TensorFlowOnSpark."""
