"""ONNX and ONNX Runtime: export of a checkpoint, fp16 and int8 versions, the session."""
