"""The runtimes of the runner: which of them this device has, and one interface for a loaded model."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .cudart import Cuda
from .errors import UserError, one_line

MODULES = {"ort": "onnxruntime", "ov": "openvino", "trt": "tensorrt"}
INSTALL_HINTS = {
    "ort": "`pip install onnxruntime`",
    "ov": "`pip install openvino`",
    "trt": "JetPack brings it; a virtual environment sees it with --system-site-packages",
}
MIN_TENSORRT = (10, 3)  # JetPack 6.1


class LoadedModel(Protocol):
    """A model loaded in a runtime. `build_seconds` is the time its engine took to build, None without a build."""

    runtime: str
    build_seconds: float | None

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) float32 -> logits (B, K) float32, copied out of the runtime."""
        ...

    def computes_in(self) -> str:
        """The precision of most of the arithmetic: fp32, fp16, bf16, int8. May cost a load and a run."""
        ...


def select_runtime(requested: str) -> tuple[str, Any]:
    """`ort`, `ov`, `trt` or `auto` -> (the name, its library imported).

    `auto`: TensorRT where it and a CUDA device are present, else ONNX Runtime, else OpenVINO.
    Raises UserError: the requested one is missing, or there is none.
    """
    if requested != "auto":
        return requested, import_runtime(requested)
    reasons = []
    for name in ("trt", "ort", "ov"):
        try:
            return name, import_runtime(name)
        except UserError as error:
            reasons.append(str(error))
    raise UserError(f"--runtime auto: found no runtime: {'; '.join(reasons)}")


def import_runtime(name: str) -> Any:
    """The runtime's module. Raises UserError: missing, too old, no CUDA device for TensorRT."""
    if name == "ov":  # without its telemetry: it has a stub for when the sender is absent
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        reason = f"{MODULES[name]} is not installed ({one_line(error, 120)})"
        raise UserError(f"--runtime {name}: {reason}; {INSTALL_HINTS[name]}") from None
    if name == "trt":
        version = tuple(int(part) for part in module.__version__.split(".")[:2])
        if version < MIN_TENSORRT:
            got = f"--runtime trt: got TensorRT {module.__version__}"
            raise UserError(f"{got}; expected 10.3 or later; install JetPack 6.1 or later")
        Cuda()
    return module


def load_model(
    name: str, module: Any, model: Path, precision: str, threads: int, cache: Path | None
) -> LoadedModel:
    """Load one ONNX file in a runtime; `cache` is the folder of its compiled form.

    Without it TensorRT's plan goes into `cache/` beside the model, OpenVINO's is not cached.
    Raises UserError: the runtime rejects the file.
    """
    # Imported here, because two of the three runtimes are usually not installed.
    if name == "ort":
        from .ort import OrtModel

        return OrtModel(module, model, threads)
    if name == "ov":
        from .ov import OvModel

        return OvModel(module, model, threads, cache)
    from .trt import TrtModel

    return TrtModel(module, model, precision, cache or model.parent / "cache")


def usable_cores() -> int:
    """Cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
