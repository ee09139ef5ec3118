"""TensorRT and TensorRT-RTX: engines with their sidecars, the session, timing on the device."""
