"""OpenVINO on the CPU, with the hint to compute in f32: else it takes bfloat16 or f16 where the CPU has it."""

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

PRECISION_OF_TYPE = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8"}
PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution", "MHA")
SCHEMA = "cakd.compiled/1"


@functools.cache
def shared_core(module: Any) -> Any:
    """The one Core of this process, never released."""
    # On a CPU with AMX each Core installs a signal stack for the thread and restores the previous one when it is
    # destroyed. Of two destroyed in the order of their creation, the second restores memory that the first has
    # freed: the next signal that Python handles is a segmentation fault (openvino 2026.4.1).
    return module.Core()


def compile_model(core: Any, version: str, model: Path, options: Any, cache: Path | None) -> Any:
    """The model compiled for the CPU; with a `cache` folder, read from there or written to it."""
    if cache is None:
        return core.compile_model(core.read_model(str(model)), "CPU", options)
    # Not OpenVINO's own CACHE_DIR: it loads a blob whose bytes have changed; here its SHA-256 is checked first.
    files = [p for p in (model, model.with_suffix(".bin")) if p.is_file()]
    key = {
        "schema": SCHEMA,
        "openvino": version,
        "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "options": {key: str(value) for key, value in options.items()},
        "model_sha256": [hashlib.sha256(p.read_bytes()).hexdigest() for p in files],
    }
    path = cache / f"{model.stem}.ov{version.split('-')[0]}.blob"
    cached = compiled_cache.read_cached(path, key)
    if cached is not None:
        return core.import_model(cached, "CPU", options)
    result = core.compile_model(core.read_model(str(model)), "CPU", options)
    compiled_cache.write_cached(path, result.export_model().getvalue(), key)
    return result


def compiled_nodes(compiled: Any) -> list[tuple[str, str, str]]:
    """(Kernel, layer type, element type) of each node of a compiled model: jit_avx512, Convolution, bf16."""
    nodes = []
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info:
            # `runtimePrecision` would name the type of the stored weights.
            kernel, _, kind = info["primitiveType"].astype(str).rpartition("_")
            nodes.append((kernel, info["layerType"].astype(str), kind.lower()))
    return nodes


def computes_in(compiled: Any) -> str:
    """Precision of most convolutions and matrix products of a compiled model; without any, its hint."""
    types = Counter(kind for _, layer, kind in compiled_nodes(compiled) if layer in PRODUCTS)
    if not types:
        types[compiled.get_property("INFERENCE_PRECISION_HINT").to_string()] = 1
    name = types.most_common(1)[0][0]
    return PRECISION_OF_TYPE.get(name, name)


class OvModel(Named):
    """One ONNX or IR model in OpenVINO, on one stream; a `hint` of None leaves the precision to OpenVINO."""

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
        with self.translated_errors():
            core = shared_core(module)
            self._compiled = compile_model(core, self._version, model, options, cache)
            self._request = self._compiled.create_infer_request()

    @contextlib.contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise `error`, in one line, for what OpenVINO raises inside the block."""
        try:
            yield
        except Exception as error:  # openvino raises bare RuntimeErrors
            raise self.error(
                f"OpenVINO {self._version} rejects it: {one_line(error)}; try a newer openvino"
            ) from None

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) -> the first output, (B, K), copied out of the runtime."""
        try:
            outputs = self._request.infer([x], share_inputs=False, share_outputs=False)
        except Exception as error:  # openvino raises bare RuntimeErrors
            raise self.error(
                f"fails on an input {list(x.shape)}: {one_line(error)}; export it for this batch and image size"
            ) from None
        logits: NDArray[np.float32] = outputs[0]
        return logits

    def computes_in(self) -> str:
        """Precision of most convolutions and matrix products of the compiled graph."""
        return computes_in(self._compiled)
