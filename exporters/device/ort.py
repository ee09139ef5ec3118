"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import Named, one_line

PRECISION_OF_TYPE = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "uint8": "int8",
    "int8": "int8",
}
PRODUCTS = ("Conv", "Gemm", "MatMul", "Attention")
# These versions fuse Pad into an AveragePool that does not count the padding, which changes the outputs.
WRONG_PAD_FUSION = ("1.19", "1.20")


def computes_in(nodes: Sequence[tuple[str, str, str | None]]) -> str:
    """Precision of most convolutions and matrix products of `OrtModel.profiled_nodes`; without any, fp32."""
    products = [n for n in nodes if any(word in n[1] for word in PRODUCTS)]
    counts = Counter(precision or "fp32" for _, _, precision in products)
    return counts.most_common(1)[0][0] if counts else "fp32"


class OrtModel(Named):
    """One model in ONNX Runtime on the CPU, on `threads` intra-op threads.

    integer_kernels: fuse quantized nodes into int8 kernels of this CPU. Those of an x86 CPU without VNNI add two
    products in 16 bits, which saturates. False computes the graph as it is written, in float32.
    """

    build_seconds: float | None = None

    def __init__(
        self, module: Any, model: Path, threads: int, integer_kernels: bool = True
    ) -> None:
        self._module, self._model, self.name = module, model, str(model)
        self._integer_kernels = integer_kernels
        self._session = self._open(threads)
        self._input = self._session.get_inputs()[0]
        self._output = self._session.get_outputs()[0].name
        self.runtime = f"onnxruntime {module.__version__}"

    def _open(self, threads: int, profile: Path | None = None, layouts: bool = True) -> Any:
        options = self._module.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised anyway
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if not (self._integer_kernels and layouts):
            levels = self._module.GraphOptimizationLevel
            options.graph_optimization_level = (
                levels.ORT_ENABLE_EXTENDED if self._integer_kernels else levels.ORT_ENABLE_BASIC
            )
        wrong = ".".join(self._module.__version__.split(".")[:2]) in WRONG_PAD_FUSION
        try:
            return self._module.InferenceSession(
                str(self._model),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["Pad_Fusion"] if wrong else None,
            )
        except Exception as error:  # one exception class per status code
            version = self._module.__version__
            raise self.error(
                f"ONNX Runtime {version} rejects it: {one_line(error)}; try a newer onnxruntime"
            ) from None

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) -> the first output, (B, K)."""
        try:
            logits: NDArray[np.float32] = self._session.run([self._output], {self._input.name: x})[
                0
            ]
        except Exception as error:  # one exception class per status code
            raise self.error(
                f"fails on an input {list(x.shape)}: {one_line(error)}; export it for this batch and image size"
            ) from None
        return logits

    def computes_in(self) -> str:
        """Precision of most convolutions and matrix products, by `profiled_nodes` at a batch of 1."""
        shape = [d if isinstance(d, int) else 1 for d in self._input.shape]
        return computes_in(self.profiled_nodes(shape))

    def profiled_nodes(self, shape: Sequence[int]) -> list[tuple[str, str, str | None]]:
        """(Execution provider, operator, precision) of each node, from a profile of one run in a second session.

        shape: of the input. The precision is that of the node's first input; None where that is neither
        floating-point nor int8.
        """
        nodes = []
        for _, facts, precision in self._profile(shape):
            nodes.append((facts.get("provider", "unnamed provider"), facts["op_name"], precision))
        return nodes

    def named_nodes(self, shape: Sequence[int]) -> dict[str, str | None]:
        """Node name -> precision, from such a profile without layout optimizations, which rename nodes."""
        suffix = "_kernel_time"
        profile = self._profile(shape, layouts=False)
        return {name.rsplit(suffix, 1)[0]: precision for name, _, precision in profile}

    def _profile(
        self, shape: Sequence[int], layouts: bool = True
    ) -> list[tuple[str, dict[str, Any], str | None]]:
        """(Event, what it says of its node, precision) of each node, from one run in a second session."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(1, Path(folder) / "profile", layouts)
            session.run([self._output], {self._input.name: np.zeros(shape, np.float32)})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = []
        for event in events:
            facts = event.get("args", {})
            if facts.get("input_type_shape"):
                kind = next(iter(facts["input_type_shape"][0]), "")
                nodes.append((event["name"], facts, PRECISION_OF_TYPE.get(kind)))
        return nodes
