"""Personal data: where it lies, and datasets and models that tell less of it."""
