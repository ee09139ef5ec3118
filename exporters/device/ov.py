"""OpenVINO on the CPU, told to compute in f32: without that hint it takes bfloat16 or f16 where the CPU has it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError, one_line

KINDS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8"}
PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution", "MHA")


class OvSession:
    """One model read from its ONNX, one stream."""

    build_seconds: float | None = None

    def __init__(self, module: Any, model: Path, threads: int) -> None:
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            core = module.Core()
            self._compiled = core.compile_model(core.read_model(str(model)), "CPU", options)
            self._request = self._compiled.create_infer_request()
        except Exception as error:  # openvino raises bare RuntimeErrors
            raise UserError(
                f"{model}: OpenVINO {module.__version__} refuses it: {one_line(error)}; "
                "a newer openvino may take it"
            ) from None
        self.runtime = f"openvino {module.__version__.split('-')[0]}"

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) -> the first output, (B, K), copied out of the runtime."""
        made = self._request.infer([x], share_inputs=False, share_outputs=False)
        logits: NDArray[np.float32] = made[0]
        return logits

    def computes_in(self) -> str:
        """What most convolutions and matrix products of the compiled graph run in."""
        kinds: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if "layerType" in info and info["layerType"].astype(str) in PRODUCTS:
                kinds[info["primitiveType"].astype(str).split("_")[-1].lower()] += 1
        most = kinds.most_common(1)[0][0] if kinds else "f32"
        return KINDS.get(most, most)
