"""Models outside PyTorch: graphs of fixed sizes for ONNX Runtime and OpenVINO, and models on them."""
