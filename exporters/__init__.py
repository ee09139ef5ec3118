"""What ships: checkpoint -> ONNX -> OpenVINO / TensorRT, with parity and latency. Imports without torch."""
