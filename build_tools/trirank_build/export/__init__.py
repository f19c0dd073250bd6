"""A trained module → ONNX, proven equal."""
