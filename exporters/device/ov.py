"""OpenVINO on the CPU, told to compute in f32: without that hint it takes bfloat16 or f16 where the CPU has it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiled_cache
from .errors import Named, one_line

KINDS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8"}
PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution", "MHA")


SCHEMA = "cakd.compiled/1"
WEIGHTS = ".bin"  # beside an IR


@functools.cache
def shared_core(module: Any) -> Any:
    """The one Core of this process, never let go.

    On a CPU with AMX each Core gives the thread a signal stack and, on its end, brings back the one before. Of two
    that go in the order they came, the second brings back memory that the first has freed: the next signal that
    Python handles, an interrupt or a child's end, is a segmentation fault (openvino 2026.4.1).
    """
    return module.Core()


def compile_model(core: Any, version: str, model: Path, options: Any, cache: Path | None) -> Any:
    """The model on the CPU; with a `cache`, as an earlier process compiled it there, else kept there.

    OpenVINO's own CACHE_DIR takes a blob of altered bytes: here a SHA-256 is held against it first.
    """
    if cache is None:
        return core.compile_model(core.read_model(str(model)), "CPU", options)
    parts = [p for p in (model, model.with_suffix(WEIGHTS)) if p.is_file()]
    maker = {
        "schema": SCHEMA,
        "openvino": version,
        "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "options": {key: str(value) for key, value in options.items()},
        "model_sha256": [hashlib.sha256(p.read_bytes()).hexdigest() for p in parts],
    }
    path = cache / f"{model.stem}.ov{version.split('-')[0]}.blob"
    known = compiled_cache.read_cached(path, maker)
    if known is not None:
        return core.import_model(known, "CPU", options)
    made = core.compile_model(core.read_model(str(model)), "CPU", options)
    compiled_cache.write_cached(path, made.export_model().getvalue(), maker)
    return made


def computes_in(compiled: Any) -> str:
    """What most convolutions and matrix products of a compiled model run in; without any, what it was told."""
    kinds: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) in PRODUCTS:
            # `brgconv_avx512_1x1_bf16`: the kernel; `runtimePrecision` would name the stored weights
            kinds[info["primitiveType"].astype(str).split("_")[-1].lower()] += 1
    if not kinds:
        kinds[compiled.get_property("INFERENCE_PRECISION_HINT").to_string()] = 1
    most = kinds.most_common(1)[0][0]
    return KINDS.get(most, most)


class OvModel(Named):
    """One model read from its ONNX or IR, one stream; `hint` None leaves the precision to OpenVINO."""

    build_seconds: float | None = None

    def __init__(
        self,
        module: Any,
        model: Path,
        threads: int,
        cache: Path | None,
        hint: str | None = "f32",
    ) -> None:
        self.name, self._version = str(model), module.__version__
        self.runtime = f"openvino {self._version.split('-')[0]}"
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        if hint is not None:
            options["INFERENCE_PRECISION_HINT"] = hint
        with self.refusals():
            core = shared_core(module)
            self._compiled = compile_model(core, self._version, model, options, cache)
            self._request = self._compiled.create_infer_request()

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """What OpenVINO raises inside the block, in one line. Raises `error`."""
        try:
            yield
        except Exception as error:  # openvino raises bare RuntimeErrors
            raise self.error(
                f"OpenVINO {self._version} refuses it: {one_line(error)}; a newer openvino may take it"
            ) from None

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) -> the first output, (B, K), copied out of the runtime."""
        made = self._request.infer([x], share_inputs=False, share_outputs=False)
        logits: NDArray[np.float32] = made[0]
        return logits

    def computes_in(self) -> str:
        """What most convolutions and matrix products of the compiled graph run in."""
        return computes_in(self._compiled)
