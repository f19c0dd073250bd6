"""ONNX → TensorRT plans."""
