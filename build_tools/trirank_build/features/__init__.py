"""Dataset → fitted features, and batches of packed tensors by the same code that serves."""
